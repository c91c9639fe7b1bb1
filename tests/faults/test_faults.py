"""Faults injected into real training processes: each restart goes on bit for bit from the last whole checkpoint.

What is tested elsewhere: kills inside each stage of a save, signals at every kind of step, a checkpoint ahead of its
evaluation (`tests/training/test_loop.py`); damage of every file of a checkpoint, a full disk, one that cannot be written
(`tests/records/test_checkpoint.py`); kill -9 and SIGTERM of the whole command (`tests/launch/test_run.py`); damaged
compiled programs (`tests/test_compile_cache.py`); what makes a step be skipped (`tests/training/test_step.py`).
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from harness import Faulty, assert_equal, plan, said, tuned, untimed, wait_until

from phi3_jax.errors import STOPPED
from phi3_jax.records.goodput import account, read
from phi3_jax.records.rows import read_rows

PICO = "mini,scale=pico,budgets=60k"
NANO = "mini,scale=nano,budgets=400k"


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """An unbroken run of 56 steps with checkpoints every 8."""
    unbroken = plan(tmp_path_factory.mktemp("pico") / "unbroken", PICO, checkpoint_every=8)
    assert unbroken.finish()[-1]["status"] == "done"
    return unbroken


def another(unbroken: Faulty, name: str, **train: object) -> Faulty:
    return plan(unbroken.folder.parent / name, PICO, checkpoint_every=8, **train)


def kill_again_and_again(broken: Faulty, targets: list[int], seed: int) -> tuple[int, int, list[float]]:
    """kill -9 once each step of `targets` is done, every second time while a save is half done.

    Returns (how many died in a save, steps lost, seconds that each process lived).
    """
    rng, lost, in_saves, lived = random.Random(seed), 0, 0, []
    for i, target in enumerate(targets):
        target = max(target, broken.steps() + 1)  # a step that no attempt before has reached
        begin, process = time.monotonic(), broken.start("slow_disk=0.2")
        wait_until(process, lambda target=target: broken.steps() >= target)
        if i % 2:
            wait_until(process, broken.saving)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        lived.append(time.monotonic() - begin)
        assert said(process)[0]["exit"] == -signal.SIGKILL and not (broken.run / "done.json").exists()
        steps, newest = broken.steps(), broken.checkpoint()
        assert steps >= max(target, newest), "a checkpoint is never ahead of its rows"
        in_saves += broken.saving()
        lost += steps - newest
    return in_saves, lost, lived


def finishes(broken: Faulty, lived: list[float]) -> None:
    """The last attempt; the account then says where nearly all the time of the processes went."""
    begin = time.monotonic()
    assert broken.finish("slow_disk=0.2")[-1]["status"] == "done"
    lived = [*lived, time.monotonic() - begin]
    found = account(broken.run)
    assert found["attempts"] == len(lived) and sum(found["seconds"].values()) == pytest.approx(found["wall_s"])
    # At most a pulse before each kill, and the last process's own end, are not seen; on a busy machine a pulse may be late.
    seen = {row["attempt"]: sum(row["seconds"].values()) for row in read(broken.run)}
    assert all(0 < seen[i + 1] < whole for i, whole in enumerate(lived))
    assert statistics.median(seen[i + 1] / whole for i, whole in enumerate(lived)) > 0.85
    assert min(found["seconds"].values()) >= 0 and found["seconds"]["restarted"] > 0


@pytest.mark.slow
def test_killed_at_random_moments_saves_included(pico, table) -> None:
    broken = another(pico, "killed")
    targets = sorted(random.Random(0).sample(range(4, 44), 4))
    in_saves, lost, lived = kill_again_and_again(broken, targets, 0)
    finishes(broken, lived)
    assert_equal(broken, pico)
    assert in_saves >= 1, "control: some of the kills hit a save"
    assert account(broken.run)["lost_steps"] <= lost
    table(f"kill -9 at random moments, pico ({in_saves} in a save, on a slow disk)", 4, 4, lost, "bit for bit")


@pytest.mark.kills
def test_killed_at_twenty_random_moments_of_a_nano_run(tmp_path: Path, table) -> None:
    runs = [plan(tmp_path / name, NANO, checkpoint_every=10, eval_points=1) for name in ("unbroken", "killed")]
    unbroken, broken = runs
    assert unbroken.finish()[-1]["status"] == "done"
    targets = sorted(random.Random(1).sample(range(4, 280), 20))
    in_saves, lost, lived = kill_again_and_again(broken, targets, 1)
    finishes(broken, lived)
    assert_equal(broken, unbroken)
    assert in_saves >= 5
    table(f"kill -9 at random moments, nano ({in_saves} in a save, on a slow disk)", 20, 20, lost, "bit for bit")


@pytest.mark.slow
def test_sigterm_is_answered_in_an_evaluation_that_never_ends(pico, table) -> None:
    broken, marker = another(pico, "terminated"), pico.folder / "evaluating"
    process = broken.start(f"endless_evaluation={marker}")
    wait_until(process, marker.exists)
    process.terminate()
    out = said(process)  # and so before the grace of 30 s is over: the evaluation alone would take for ever
    assert out[0]["exit"] == STOPPED and out[-1]["status"] == "stopped"
    assert broken.checkpoint() == broken.steps() == 28 and not read_rows(broken.run / "evals.jsonl")
    again = broken.start()
    wait_until(again, lambda: bool(read_rows(broken.run / "evals.jsonl")))
    again.kill()  # between the evaluation made up for and the next checkpoint: it must not be there twice
    said(again)
    lost = broken.steps() - broken.checkpoint()
    assert broken.finish()[-1]["status"] == "done"
    assert_equal(broken, pico)
    table("SIGTERM in an evaluation, then kill -9 after it", 2, 2, lost, "exit 75, saved; bit for bit")


@pytest.mark.slow
def test_a_source_of_batches_that_hangs_is_given_up_and_the_state_saved(pico, table) -> None:
    broken = another(pico, "hung", batch_timeout=1.5)
    out = broken.finish("hang=13")
    assert out[0]["exit"] == 2 and "batch of step 13 did not come within 1.5 s" in out[-1]["error"]
    assert "\n" not in out[-1]["error"] and broken.checkpoint() == broken.steps() == 13
    assert broken.finish()[-1]["status"] == "done"
    assert_equal(broken, pico)
    table("data worker hangs", 1, 1, 0, "one line, exit 2, saved; bit for bit")


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped_with_a_warning(pico, table) -> None:
    """One after the other, while no process runs: the next goes on from the checkpoint before."""
    broken, lost = another(pico, "damaged"), 0
    for target, how in ((18, "truncated"), (26, "flipped"), (34, "deleted")):
        process = broken.start()
        wait_until(process, lambda target=target: broken.steps() >= target and broken.checkpoint() >= target - 8)
        process.kill()
        said(process)
        newest, steps = broken.checkpoint(), broken.steps()
        largest = max(
            (broken.run / "checkpoints" / str(newest)).rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
        )
        spoil(largest, how)
        assert 0 < broken.checkpoint() < newest
        lost += steps - broken.checkpoint()
    out = broken.finish()
    assert out[-1]["status"] == "done" and any("is missing" in line for line in out[-1]["skipped_checkpoints"])
    assert_equal(broken, pico)
    table("newest checkpoint truncated, bit-flipped, deleted in part", 3, 3, lost, "the one before; bit for bit")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_space_lets_it_go_on(pico, table) -> None:
    broken = another(pico, "full")
    place = broken.run / "checkpoints"
    place.mkdir(parents=True)
    size = sum(p.stat().st_size for p in (pico.run / "checkpoints" / "56").rglob("*") if p.is_file())
    option = f"size={int(2.5 * size)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        out = broken.finish()
        assert out[0]["exit"] == 2 and "no space left on device; step 16 is intact" in out[-1]["error"]
        assert "\n" not in out[-1]["error"] and broken.checkpoint() == 16
        lost = broken.steps() - 16
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", place], check=True)
        assert broken.finish()[-1]["status"] == "done"
        assert_equal(broken, pico)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    table("disk full during a save", 1, 1, lost, "one line, exit 2, older checkpoints whole; bit for bit")


@pytest.mark.slow
def test_bad_steps_are_skipped_and_counted_and_jumps_of_the_clock_change_nothing(pico, table) -> None:
    """nan at one step and spikes at two, then again with a clock that jumps by 200 s at every look (Orbax bears 300)."""
    folders = [another(pico, name) for name in ("bad", "bad-clock")]
    for broken, faults in zip(folders, ("bad_steps=20+52+53", "bad_steps=20+52+53,clock_jumps=100"), strict=True):
        assert broken.finish(faults)[-1]["status"] == "done"
        rows = read_rows(broken.run / "metrics.jsonl")
        assert [row["skipped"] for row in rows] == [0] * 20 + [1] * 32 + [2] + [3] * 3
        assert [row["step"] for row in rows if row["streak"]] == [21, 53, 54]
        assert sorted(rows[20]["nonfinite"]) == ["grad_norm", "loss"] and "nonfinite" not in rows[52]
        assert all(np.isfinite(value).all() for value in broken.state().values())
        assert all(0 < row["tokens_per_s"] < 1e7 for row in rows[1:])
        goodput = account(broken.run)
        assert (
            min(goodput["seconds"].values()) >= -0.01 and goodput["wall_s"] < 600 and 0 < rows[0]["first_step_s"] < 600
        )
    assert_equal(*folders)
    before = [[row["loss"] for row in untimed(x.run / "metrics.jsonl")[:20]] for x in (folders[0], pico)]
    np.testing.assert_allclose(*before, rtol=1e-4, err_msg="control: up to the first bad step all is as ever")
    table("nan loss, spikes of the gradient", 3, 3, 3, "skipped and counted")
    table("wall clock jumps by 200 s at every look", 1, 1, 0, "bit for bit; rates and goodput right")


# ------------------------------------------------------------------------------------------------ post-training

ASKED = ("What is a tide?", "Why is the sky blue?", "Who needs a map?", "What do bees make?", "How long is a minute?")
SAID = ("The rise and fall of the sea.", "Air scatters blue light.", "Whoever is lost.", "Honey.", "Sixty seconds.")


def rows_of(method: str, count: int) -> list[dict]:
    """Conversations, or preferences, that are all different."""
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    rows = []
    for i in range(count):
        asked, right, wrong = ASKED[i % 5], SAID[i % 5], SAID[(i + 1 + i // 25) % 5]
        user, answer = [turn("user", f"{asked} ({i})")], [turn("assistant", f"{right} {i}")]
        if method == "dpo":
            rows.append({"prompt": user, "chosen": answer, "rejected": [turn("assistant", f"{wrong} {i}")]})
        else:
            rows.append({"messages": user + answer})
    return rows


def kept_parts(broken: Faulty) -> int:
    """Parts of the reference's pass that are whole."""
    return len(list((broken.run / "reference").glob("*.npy")))


def kill_in_the_reference(broken: Faulty, faults: str, kills: int, seed: int) -> int:
    """kill -9 each time a part more is kept; how many parts the passes that were killed have left."""
    rng = random.Random(seed)
    for _ in range(kills):
        parts = kept_parts(broken)
        process = broken.start(faults)
        wait_until(process, lambda parts=parts: kept_parts(broken) > parts)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert said(process)[0]["exit"] == -signal.SIGKILL
        assert kept_parts(broken) > parts and not (broken.run / "reference.npz").exists(), "killed within the pass"
    return kept_parts(broken)


def kill_in_steps(broken: Faulty, faults: str, targets: list[int], seed: int) -> int:
    """kill -9 once each step of `targets` has a row; steps lost."""
    rng, lost = random.Random(seed), 0
    for i, target in enumerate(targets):
        target = max(target, broken.steps() + 1)
        process = broken.start(faults)
        wait_until(process, lambda target=target: broken.steps() >= target)
        if i % 2:
            wait_until(process, broken.saving)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert said(process)[0]["exit"] == -signal.SIGKILL and not (broken.run / "done.json").exists()
        lost += broken.steps() - broken.checkpoint()
    return lost


def killed(tmp_path: Path, words: str, rows: int, kills: int, in_pass: int, **keys: object) -> tuple[int, int]:
    """(parts, steps lost) of a run that was killed so often, `in_pass` times in the reference's pass, and ended equal."""
    method = words.partition(",")[0]
    pair = [tuned(tmp_path / name, words, rows_of(method, rows), **keys) for name in ("unbroken", "killed")]
    unbroken, broken = pair
    faults = "slow_disk=0.2" + (",slow_reference=0.2" if method == "dpo" else "")
    assert unbroken.finish(faults)[-1]["status"] == "done"
    steps = unbroken.steps()
    parts = kill_in_the_reference(broken, faults, in_pass, 0)
    targets = sorted(random.Random(1).sample(range(2, steps - 4), kills - in_pass))
    lost = kill_in_steps(broken, faults, targets, 2)
    assert broken.finish(faults)[-1]["status"] == "done"
    assert_equal(broken, unbroken)
    assert (broken.run / "best.json").read_text() == (unbroken.run / "best.json").read_text()
    if method == "dpo":
        one, other = (np.load(run.run / "reference.npz") for run in pair)
        assert one["arr_0"].tobytes() == other["arr_0"].tobytes() and np.abs(one["arr_0"]).max() > 1
        assert not (broken.run / "reference").exists()
    return parts, lost


@pytest.mark.slow
def test_adapters_on_preferences_killed_in_the_reference_and_in_steps(tmp_path: Path, table) -> None:
    words = "dpo,lora=2,epochs=12,lr=1e-3"
    keys = {"train.batch_tokens": 512, "train.checkpoint_every": 6}
    parts, lost = killed(tmp_path, words, 60, 4, 2, **keys)
    assert parts >= 2
    table("kill -9 of DPO with adapters, two in the reference's pass", 4, 4, lost, "bit for bit")


@pytest.mark.kills
@pytest.mark.parametrize(
    ("words", "in_pass"),
    [("sft,epochs=40,lr=1e-3", 0), ("dpo,epochs=40,lr=1e-3", 6), ("sft,lora=4,epochs=40,lr=1e-2", 0)],
)
def test_post_training_killed_at_twenty_random_moments(tmp_path: Path, words: str, in_pass: int, table) -> None:
    keys = {"train.batch_tokens": 512, "train.checkpoint_every": 6}
    rows = 100 if words.startswith("dpo") else 200
    _, lost = killed(tmp_path, words, rows, 20, in_pass, **keys)
    table(f"kill -9 of {words}, {in_pass} in the reference's pass", 20, 20, lost, "bit for bit")
