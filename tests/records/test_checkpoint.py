"""Checkpoints: what is saved comes back bit for bit, and nothing that is damaged is ever used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from phi3_jax.errors import UserError
from phi3_jax.records import checkpoint
from phi3_jax.records.checkpoint import CheckpointWarning, Keep, list_steps, newest_whole, restore

REPO = Path(__file__).resolve().parents[2]


def make_state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "params": {"w": jnp.asarray(rng.standard_normal((64, 32)), jnp.float32), "b": jnp.zeros((3, 1), jnp.int8)},
        "opt": (jnp.asarray(rng.standard_normal(8), jnp.bfloat16), jnp.float32(np.nan)),
    }


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def save(root: Path, *steps: int, keep: Keep | None = None) -> checkpoint.Checkpointer:
    saver = checkpoint.Checkpointer(root, keep or Keep(99))
    for step in steps:
        saver.save(step, make_state(step), {"next_step": step})
        saver.wait()
    return saver


def test_what_is_saved_comes_back_bit_for_bit_with_its_extra(tmp_path):
    save(tmp_path, 3, 7)
    found = restore(tmp_path, make_state(0))
    assert (found.step, found.extra, found.skipped) == (7, {"next_step": 7}, ())
    assert same_bits(found.state, make_state(7)) and not same_bits(found.state, make_state(3))
    assert same_bits(restore(tmp_path, make_state(0), at_most=6).state, make_state(3))
    assert restore(tmp_path, make_state(0), at_most=2) is None
    assert restore(tmp_path / "nowhere", make_state(0)) is None


def test_plain_orbax_reads_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    assert np.array_equal(ocp.load(tmp_path / "1" / "state")["params.w"], make_state(1)["params"]["w"])


def test_the_state_saved_is_the_one_before_donated_steps_reuse_its_memory(tmp_path, monkeypatch):
    """With a slow disk, several donated steps run before the bytes are read."""
    step = jax.jit(lambda x: {"w": x["w"] * 1.5 + 1}, donate_argnums=0)
    x = step({"w": jnp.arange(1 << 16, dtype=jnp.float32)})
    expected, pointer = np.array(x["w"]), x["w"].unsafe_buffer_pointer()
    real = ocp.save_async

    class Late:  # Orbax begins to read only when the result is asked for
        def __init__(self, path, state):
            self.path, self.state = path, state

        def result(self):
            gate.result()
            real(self.path, self.state).result()

    gate = checkpoint.concurrent.futures.Future()
    monkeypatch.setattr(checkpoint.ocp, "save_async", Late)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, x, {})
    reused = False
    for _ in range(5):
        x = step(x)
        reused |= x["w"].unsafe_buffer_pointer() == pointer
    jax.block_until_ready(x)
    gate.set_result(None)
    saver.wait()
    assert reused, "positive control: donation really reused the memory that was being saved"
    assert np.array_equal(restore(tmp_path, x).state["w"], expected)


def test_leaves_go_to_the_shardings_asked_for(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    x = {"w": jax.device_put(jnp.arange(16.0).reshape(8, 2), sharding)}
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(1, x, {})
    saver.wait()
    w = restore(tmp_path, {"w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding)}).state["w"]
    assert w.sharding == sharding and np.array_equal(w, x["w"])


RESHARD = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from phi3_jax.records import checkpoint
from phi3_jax.records.checkpoint import Checkpointer, restore
checkpoint.CHUNK_BYTES, checkpoint.LAYER_BYTES = 512, 128
x = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
def on(shape, spec):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "tensor")), spec)
saver = Checkpointer(sys.argv[1])
saver.save(1, {"w": jax.device_put(x, on((4, 2), P("data", "tensor")))}, {})
saver.wait()
for sharding in (on((1, 1), P()), on((2, 4), P("tensor", "data")), on((8, 1), P(None, None)), on((2, 1), P("data"))):
    w = restore(sys.argv[1], {"w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}).state["w"]
    assert w.sharding == sharding and np.array_equal(w, x), sharding
print("equal")
"""


def test_a_state_of_eight_devices_comes_back_on_any_other_mesh(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags(8)}
    child = subprocess.run(
        [sys.executable, "-c", RESHARD, str(tmp_path)], capture_output=True, text=True, env=env, cwd=REPO
    )
    assert child.stdout.strip() == "equal", child.stderr
    warnings = [line for line in child.stderr.splitlines() if "target_byte_size too small" not in line]
    assert not warnings, "and silently, but for the tiny chunks that this test sets"


def test_a_part_of_the_state_does_not_fit(tmp_path):
    save(tmp_path, 1)
    want = {"params": {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    with pytest.raises(UserError, match="leaves differ"):
        restore(tmp_path, want)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s | {"more": jnp.zeros(1)}, "'more' is not in the checkpoint"),
        (lambda s: {k: v for k, v in s.items() if k != "step"}, "'step' is not in the model"),
        (lambda s: s | {"step": jnp.zeros(2, jnp.int32)}, r"step is int32\[\] there and int32\[2\] here"),
        (lambda s: s | {"step": jnp.float32(0)}, "step is int32"),
    ],
)
def test_a_state_of_another_model_is_refused_in_one_line(tmp_path, change, said):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=said) as caught:
        restore(tmp_path, change(make_state(0)))
    assert "\n" not in str(caught.value)


def damage_cases(folder: Path) -> list[tuple[Path, str]]:
    return [(path, how) for path in sorted(folder.rglob("*")) if path.is_file() for how in ("cut", "flip", "delete")]


def damage(path: Path, how: str) -> bool:
    """Returns whether anything was changed."""
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif not data:
        return False
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1 << (len(data) % 8)
        path.write_bytes(data)
    return True


def test_any_damage_to_any_file_is_found_and_the_older_checkpoint_used(tmp_path):
    save(tmp_path, 1, 2)
    pristine = {path: path.read_bytes() for path in (tmp_path / "2").rglob("*") if path.is_file()}
    tried = 0
    for path, how in damage_cases(tmp_path / "2"):
        if damage(path, how):
            tried += 1
            step, skipped = newest_whole(tmp_path)
            assert step == 1 and len(skipped) == 1 and str(tmp_path / "2") in skipped[0], (path, how)
            name = str(path.relative_to(tmp_path / "2"))
            assert name in skipped[0], skipped
        path.write_bytes(pristine[path])
        assert how != "flip" or newest_whole(tmp_path) == (2, ()), "positive control: undamaged again"
    assert tried > 20


def test_damage_and_half_written_checkpoints_are_reported_and_cleared_by_the_next_save(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "3.partial" / "state").mkdir(parents=True)
    (tmp_path / "2" / "checkpoint.json").write_text("{")
    with pytest.warns(CheckpointWarning) as caught:
        found = restore(tmp_path, make_state(0))
    assert found.step == 1 and same_bits(found.state, make_state(1))
    assert [str(w.message) for w in caught] == [f"checkpoint skipped: {line}" for line in found.skipped]
    assert any("3.partial: half written" in s for s in found.skipped) and any("damaged" in s for s in found.skipped)
    save(tmp_path, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(tmp_path, make_state(0)).step == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "keep, left",
    [
        (Keep(1), [60]),
        (Keep(2), [50, 60]),
        (Keep(2, steps=frozenset({10, 30})), [10, 30, 50, 60]),
        (Keep(1, steps=frozenset({10})), [10, 60]),
    ],
)
def test_what_the_policy_keeps(tmp_path, keep, left):
    save(tmp_path, 10, 20, 30, 40, 50, 60, keep=keep)
    assert list_steps(tmp_path) == left == sorted(int(p.name) for p in tmp_path.iterdir())


def test_a_crash_during_a_deletion_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    saver = save(tmp_path, 10, 20)
    remove, crashed = checkpoint._remove, []

    def half(path):  # as far as a killed process got
        if path.exists():
            crashed.append(path)
            (path / checkpoint.RECORD).unlink()

    monkeypatch.setattr(checkpoint, "_remove", half)
    saver.keep = Keep(1)
    saver._collect(20)
    monkeypatch.setattr(checkpoint, "_remove", remove)
    assert crashed and list_steps(tmp_path) == [20] and newest_whole(tmp_path, at_most=10) == (None, ())
    save(tmp_path, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30"], "the next save clears the rest"


def test_newer_checkpoints_that_were_set_aside_neither_count_nor_go(tmp_path):
    save(tmp_path, 10, 20, 90)
    save(tmp_path, 30, keep=Keep(2))
    assert list_steps(tmp_path) == [20, 30, 90]


@pytest.fixture
def tiny_disk(tmp_path):
    """A 3 MB file system; mounting needs privileges that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_fails_clearly_and_leaves_older_checkpoints_whole(tiny_disk, caplog):
    small, large = {"w": jnp.ones(50_000)}, {"w": jnp.ones(1_000_000)}
    saver = checkpoint.Checkpointer(tiny_disk / "ck")
    saver.save(1, small, {})
    saver.wait()
    with pytest.raises(UserError, match=r"step 2 \(4\.0 MB\).*no space left on device; step 1 is intact") as caught:
        saver.save(2, large, {})
        saver.wait()
    assert "\n" not in str(caught.value)
    assert not caplog.records, "one line is enough"
    assert [p.name for p in (tiny_disk / "ck").iterdir()] == ["1"]
    assert restore(tiny_disk / "ck", small).step == 1
    saver.save(3, small, {})  # positive control: what fits is saved by the same object
    saver.wait()
    assert restore(tiny_disk / "ck", small).step == 3


def test_a_failed_save_is_raised_by_check_without_waiting(tmp_path, monkeypatch):
    saver = save(tmp_path, 1)

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "checksums", broken)
    saver.save(2, make_state(2), {})
    checkpoint.concurrent.futures.wait([saver._pending])
    with pytest.raises(UserError, match=r"step 2 .*Input/output error; step 1 is intact"):
        saver.check()
    saver.check()  # said once
    monkeypatch.undo()
    assert restore(tmp_path, make_state(0)).skipped == () and list_steps(tmp_path) == [1]


def test_a_read_only_folder_is_refused_before_anything_runs(tiny_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(UserError, match=r"cannot write to .*Read-only file system\); choose another"):
        checkpoint.Checkpointer(tiny_disk / "ck")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "ck").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        checkpoint.Checkpointer(tmp_path / "ck")


def test_the_record_lists_every_file(tmp_path):
    save(tmp_path, 1)
    files = json.loads((tmp_path / "1" / checkpoint.RECORD).read_text())["files"]
    there = {str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(files) == there - {checkpoint.RECORD} and all(size >= 0 for size, _ in files.values())
