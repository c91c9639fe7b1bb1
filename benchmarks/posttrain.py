"""Useful tokens/s of post-training compared with TRL, and the step of adapters compared with the full one.

    python benchmarks/posttrain.py [--cases sft:pico,sft:7.5M,dpo:pico,dpo:7.5M,lora:69M] [--runs 7] [--tunix PYTHON]

`sft` and `dpo`: both sides go over the same conversations, or pairs, whose lengths are log-normal (medians: prompts 120
tokens, answers 250, as in UltraFeedback), as many a step. `useful` tokens are those that are no padding, once for each
sequence. phi3_jax packs them into windows and takes the launcher's own step. TRL (`pip install -e '.[trl]'`; without it its
columns are empty) runs its own trainer's step, sdpa attention, padded to the longest of a batch; `trl packed` is its `bfd`
packing of SFT with `use_cache=False`, without which documents see one another. Both get the same ids, and the
log-probabilities of the reference from before, so that no side pays for a second model. `used` is the share of positions
that hold tokens.

`tunix` of `dpo` is the preparation and step of its DPOTrainer, on the model of `phi3_jax.interop.nnx` (it has no Phi of its
own), padded to the longest prompt and response as its records are; it computes the reference in each step, its only
way. --tunix names the Python of an environment with it: `pip install -e . google-tunix==0.1.7`.

`lora`: a step that trains adapters of rank 16 on all projections, and one that trains all weights, same batch.

The sides take turns, each in a process of its own with all cores given; medians are shown. `others` is the part of a core
that other processes took meanwhile: the figures mean something only where it is near 0. `in CPU s` compares the CPU time of
the processes, which other processes disturb less.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.study.workers import MALLOC

sys.path.insert(0, str(Path(__file__).parent))
from train_step import SHAPES, busy, model_of, note

CASES = ("sft:pico", "sft:7.5M", "dpo:pico", "dpo:7.5M", "lora:69M")
SIDES = {"sft": ("phi3_jax", "trl", "trl packed"), "dpo": ("phi3_jax", "trl", "tunix"), "lora": ("adapters", "full")}
STEPS = 4  # that a turn takes of `sft` and `dpo`
ROWS = {"sft:pico": 16, "sft:7.5M": 4, "dpo:pico": 8, "dpo:7.5M": 2}  # conversations, or pairs, a step
WINDOW = {"sft": 1024, "dpo": 2048}
Turn = Callable[[], float]  # takes a turn's steps; the last loss


def rows_of(case: str) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, answers) of a turn's rows as ids; one answer each, or a chosen and a rejected one."""
    vocab, rng = SHAPES[case.partition(":")[2]][4], np.random.default_rng(0)

    def ids(median: float, sigma: float) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(median), sigma), 8, WINDOW["sft"] // 2 - 2))
        return rng.integers(4, vocab, length).tolist()

    answers = 2 if case.startswith("dpo") else 1
    return [(ids(120, 0.7), [ids(250, 0.8) for _ in range(answers)]) for _ in range(ROWS[case] * STEPS)]


def useful(case: str) -> int:
    """Tokens of a turn that are no padding."""
    return sum(len(prompt) + len(answer) for prompt, answers in rows_of(case) for answer in answers)


# ------------------------------------------------------------------------------------------------ phi3_jax


def ours(case: str) -> tuple[Turn, float]:
    """(a turn, share of positions in use): rows packed as an export packs them, and the launcher's own step."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from phi3_jax.configs import PreferenceConfig
    from phi3_jax.data.dialogues import Example, Report
    from phi3_jax.data.packing import pack
    from phi3_jax.data.windows import concatenate, positions
    from phi3_jax.sharding import rules
    from phi3_jax.training import preference, step

    method, _, shape = case.partition(":")
    length = WINDOW[method]
    rows = [
        tuple(Example(np.array(p + a, np.int32), np.arange(len(p + a)) >= len(p)) for a in answers)
        for p, answers in rows_of(case)
    ]
    windows = concatenate(list(pack(iter(rows), length, Report())))
    count = -(-len(windows) // STEPS)
    fields = {
        name: np.pad(getattr(windows, name), ((0, count * STEPS - len(windows)), (0, 0)))
        for name in ("tokens", "targets", "segments", "domains")
    }
    fields["positions"] = positions(fields["segments"])
    used = float((fields["segments"] > 0).mean())
    run, mesh = _run(shape, count, length)
    if method == "dpo":
        loss = step.Loss(("chosen", "rejected"), False, None, preference.preference(PreferenceConfig()))
        fields["reference"] = np.where(fields["domains"] > 0, np.float32(-6), np.float32(0))
    else:
        most = max(int((part > 0).sum()) for part in np.split(fields["domains"], STEPS))
        loss = step.Loss(("answers",), False, most if most <= 0.75 * count * length else None)
    batches = []
    for number in range(STEPS):
        batch = {k: v[number * count : (number + 1) * count] for k, v in fields.items()}
        placed = {k: jax.device_put(v, rules.batch_sharding("dp", mesh)) for k, v in batch.items()}
        if loss.capacity:
            index = step.loss_index(batch["domains"], 1, loss.capacity)
            placed["loss_index"] = jax.device_put(index, rules.batch_sharding("dp", mesh))
        batches.append(placed)
    state, train_step = step.init_state(run, mesh), step.compile_steps(run, loss)[0]

    def turn() -> float:
        nonlocal state
        for batch in batches:
            state, metrics = train_step(state, batch, np.float32(1e-4))
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return turn, used


def _run(shape: str, windows: int, length: int, lora: Any = None) -> tuple[Any, Any]:
    """The run that a launcher would plan for a shape, and a mesh of one device, which is set."""
    import jax

    from phi3_jax.configs import DataConfig, OptimConfig, RunConfig
    from phi3_jax.sharding.mesh import make_mesh

    optim = OptimConfig(b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0)
    data = DataConfig("", "", "", length, SHAPES[shape][4])
    run = RunConfig(shape, model_of(shape), optim, data, windows, 100, lora=lora, init="x" if lora else "")
    mesh = make_mesh(jax.devices()[:1])
    jax.set_mesh(mesh)
    return run, mesh


def lora_step(side: str, shape: str) -> tuple[Turn, float]:
    """(one step, 1): of adapters of rank 16 on all projections, or of all weights."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from phi3_jax.configs import LoraConfig
    from phi3_jax.models.spec import init_params
    from phi3_jax.sharding import rules
    from phi3_jax.training import step

    windows, length = SHAPES[shape][5:]
    how = LoraConfig(16, 32.0) if side == "adapters" else None
    run, mesh = _run(shape, windows, length, how)
    ids = np.random.default_rng(0).integers(4, SHAPES[shape][4], (windows, length + 1)).astype(np.int32)
    ones = np.ones((windows, length), np.int32)
    where = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": ones, "domains": ones, "positions": where}
    batch = jax.device_put(batch, rules.batch_sharding("dp", mesh))
    state, train_step = step.init_state(run, mesh), step.compile_steps(run, step.Loss(("answers",), False))[0]
    frozen = (jax.jit(lambda: init_params(run.model, 0))(),) if how else ()

    def turn() -> float:
        nonlocal state
        state, metrics = train_step(state, batch, np.float32(1e-4), *frozen)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    return turn, 1.0


# ------------------------------------------------------------------------------------------------ TRL


def trl(case: str, packed: bool) -> tuple[Turn, float]:
    """(a turn, share of positions in use): TRL's own trainer, collator and loss, on the same ids."""
    import logging
    import tempfile
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    method, _, shape = case.partition(":")
    width, layers, heads, mlp, vocab, _, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, pad_token_id=0,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=2, attn_implementation="sdpa", tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    # A trainer asks for a tokenizer, and for ids that the shape has.
    words = WordLevel({"<unk>": 0, "</s>": 2, "a": 4, "b": 5, "c": 6}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<unk>", eos_token="</s>")
    common: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        learning_rate=1e-4, disable_tqdm=True, save_strategy="no", logging_strategy="no", max_length=None,
    )  # fmt: skip
    size, rows = ROWS[case], rows_of(case)
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        args = DPOConfig(**common, per_device_train_batch_size=2, precompute_ref_log_probs=True)
        trainer: Any = DPOTrainer(model, args=args, train_dataset=text, processing_class=tokenizer)
        collate = DataCollatorForPreference(pad_token_id=0)
        items = [
            {"prompt_ids": p, "chosen_ids": a, "rejected_ids": b, "ref_chosen_logps": -6.0 * len(a),
             "ref_rejected_logps": -6.0 * len(b)} for p, (a, b) in rows
        ]  # fmt: skip
    else:
        from trl import SFTConfig, SFTTrainer, pack_dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        args = SFTConfig(**common, per_device_train_batch_size=size)
        text = Dataset.from_list([{"input_ids": [4, 5, 6]}] * 2)
        trainer = SFTTrainer(model, args=args, train_dataset=text, processing_class=tokenizer)
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
        items = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, (a,) in rows]
        if packed:
            made = pack_dataset(Dataset.from_list(items), WINDOW["sft"], "bfd")
            items, size = list(made), -(-len(made) // STEPS)
    batches = [collate(items[i : i + size]) for i in range(0, len(items), size)]
    positions = sum(batch["input_ids"].numel() for batch in batches)
    trainer.create_optimizer()
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def turn() -> float:
        for batch in batches:
            loss = trainer.training_step(model, dict(batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return turn, useful(case) / positions


# ------------------------------------------------------------------------------------------------ tunix


def tunix(case: str) -> tuple[Turn, float]:
    """(a turn, share of positions in use) of DPO: tunix's own preparation of a batch, loss and step, on the same ids."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.sft.dpo import dpo_trainer

    from phi3_jax.interop.nnx import Phi3
    from phi3_jax.models.spec import init_params

    cfg, size, rows = model_of(case.partition(":")[2]), ROWS[case], rows_of(case)

    class Model(Phi3):
        """The view as tunix calls it: valid positions come as the diagonal of a mask, and there is a cache."""

        def __call__(self, tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> Any:  # type: ignore[override]
            valid = jnp.diagonal(attention_mask, axis1=-2, axis2=-1)
            return super().__call__(tokens, positions, valid.astype(jnp.int32)), cache

    def padded(lists: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask), as long as the longest of all rows."""
        longest = max(len(p) if left else max(map(len, answers)) for p, answers in rows)
        ids, mask = np.zeros((len(lists), longest), np.int32), np.zeros((len(lists), longest), np.int32)
        for i, one in enumerate(lists):
            where = slice(longest - len(one), None) if left else slice(len(one))
            ids[i, where], mask[i, where] = one, 1
        return ids, mask

    params = init_params(cfg, 0)
    trainer = dpo_trainer.DPOTrainer(
        Model(params, cfg), Model(params, cfg), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
        dpo_trainer.DPOTrainingConfig(beta=0.1, eval_every_n_steps=10**9, max_steps=10**9),
    )  # fmt: skip
    train_step = trainer.jit_train_and_eval_step()[0]
    batches = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        parts = [padded([p for p, _ in some], True), *(padded([a[k] for _, a in some], False) for k in (0, 1))]
        batches.append(dpo_trainer.TrainingInput(*(array for part in parts for array in part)))
    positions = sum(2 * b.prompt_ids.size + b.chosen_ids.size + b.rejected_ids.size for b in batches)

    def turn() -> float:
        for batch in batches:
            found = train_step(trainer._prepare_inputs(batch))
        return float(jax.block_until_ready((found, nnx.state(trainer.model)))[0][0])

    return turn, useful(case) / positions


# ------------------------------------------------------------------------------------------------ turns


def serve(side: str, case: str) -> None:
    """A measuring process: says what it has, then takes a turn for each line of stdin."""
    method, _, shape = case.partition(":")
    if method == "lora":
        turn, used = lora_step(side, shape)
    elif side == "tunix":
        turn, used = tunix(case)
    else:
        turn, used = ours(case) if side == "phi3_jax" else trl(case, side == "trl packed")
    note(case, f"{side}: the first turn, which compiles")
    start = time.perf_counter()
    turn()
    first = time.perf_counter() - start
    turn()
    print("\n" + json.dumps({"used": used, "first": first}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = turn()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print("\n" + json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)


class Side:
    """The measuring process of a column, seen from the parent."""

    def __init__(self, name: str, case: str, python: str = sys.executable) -> None:
        command = [python, __file__, "--serve", name, "--cases", case]
        tuned = {} if name.startswith("trl") else {"GLIBC_TUNABLES": MALLOC}
        self.name = name
        self._process = subprocess.Popen(
            command, env=os.environ | tuned, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        hello = self._answer()
        self.used, self.first = hello["used"], hello["first"]
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.others: list[float] = []

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # what a trainer says beside it is skipped
                return json.loads(line)
        raise SystemExit(f"error: {self._process.args} ended with status {self._process.wait()}")

    def turn(self) -> None:
        assert self._process.stdin is not None
        time.sleep(0.3)  # the other side's threads go to sleep
        before = busy()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        row = self._answer()
        self.walls.append(row["wall"])
        self.cpus.append(row["cpu"])
        self.others.append(max(0.0, busy() - before - row["cpu"]) / row["wall"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(case: str, runs: int, tunix: str) -> list[str]:
    """Runs one case; a row for each side, the first of which the others are compared with."""
    method, _, shape = case.partition(":")
    names = SIDES[method]
    if importlib.util.find_spec("trl") is None:
        names = tuple(name for name in names if not name.startswith("trl"))
    if not tunix:
        names = tuple(name for name in names if name != "tunix")
    sides = [Side(name, case, tunix if name == "tunix" else sys.executable) for name in names]
    for number in range(runs):
        note(case, f"turn {number + 1} of {runs}")
        for side in sides:
            side.turn()
    rows = []
    tokens = useful(case) if method != "lora" else int(np.prod(SHAPES[shape][5:]))
    for side in sides:
        side.close()
        ratio, cpu = (
            statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((sides[0].walls, side.walls), (sides[0].cpus, side.cpus))
        )
        wall = statistics.median(side.walls)
        rows.append(
            f"{case:9}  {side.name:10}  {tokens / wall:10,.0f}  {side.used:5.1%}  {wall:7.3f}  {side.first:7.1f}  "
            f"{ratio:7.2f}x  {cpu:7.2f}x  {statistics.median(side.others):7.0%}"
        )
    return rows


def main(flags: Mapping[str, Any]) -> None:
    if flags["serve"]:
        return serve(flags["serve"], flags["cases"][0])
    found = [compare(case, flags["runs"], flags["tunix"]) for case in flags["cases"]]
    print(
        f"{'case':9}  {'side':10}  {'useful t/s':>10}  {'used':>5}  {'turn s':>7}  {'first s':>7}  {'of first':>8}  "
        f"{'in CPU s':>8}  {'others':>7}"
    )
    print("\n".join(row for rows in found for row in rows))
    print(f"float32, {len(os.sched_getaffinity(0))} cores: python {' '.join(sys.argv)}")


COMMAND = Command(
    "benchmarks/posttrain.py",
    __doc__,
    main,
    {
        "cases": Flag(keys.Key("which to time", CASES, tuple, 1, item=keys.word("a case", None, *CASES))),
        "runs": Flag(keys.whole("turns of each side", 7, 1)),
        "tunix": Flag(keys.local("the Python of an environment with google-tunix", "")),
        "serve": Flag(
            keys.word("", None, *dict.fromkeys(name for names in SIDES.values() for name in names)), hidden=True
        ),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
