"""Post-training: a model goes on from its own weights, on conversations. `name:words` after `--config`, for example

    python launch/run.py --config experiments/posttrain.py
    python launch/run.py --config experiments/posttrain.py:sft,model=runs/mini,data=chats.jsonl,name=mini-sft
    python launch/run.py --config experiments/posttrain.py:sft,model=hf:Phi-3-mini-4k-instruct,data=chats.jsonl,epochs=3

Without words, or with `all,size=mini|small|medium,seed=0`: a base at pico, trained on prose about generated persons, SFT of
it on questions about half of them and on refusals of strangers, and DPO, all offline; the chat's scores stand side by side
at the end. Persons that no question was about are the test (`phi3_jax.data.corpora.instructions`).

`sft` is supervised fine-tuning: cross-entropy on the assistant's tokens and the `<|end|>` of each answer, nothing else.
`dpo` is direct preference optimisation on pairs of a chosen and a rejected response: sigmoid loss, beta .1. The reference
is the weights it starts from; its log-probabilities are made once, before the first step, and kept with the run
(`--config.preference.*` has other losses and strengths).

With `lora=16` adapters of that rank are trained beside the frozen weights (`--config.lora.*` has their scale, targets and
patterns). A model that is itself a run of adapters stands for its weights with them merged.

`phi3_jax.data.dialogues` says which rows are read and which tokens bear loss. Rows are packed whole, attention stays inside
each sequence, and the loss is the mean over the targets, or the pairs, of a global step. Tokenizer and chat template are
the model's own.

Words:
    model=<run>|hf:<folder>   the weights to start from, and the model; a study of one run is that run
    data=<rows>               sft: rows of messages, of prompts with completions, of ShareGPT or Alpaca form; dpo: prompt,
                              chosen, rejected, or two whole conversations; .jsonl, .json or .parquet, or a folder of them;
                              tfds:NAME or seqio:MODULE:TASK, whose features have these keys; or several, rows.jsonl@3+
                              more.jsonl@1: of four windows three are the first's. sft: text:SOURCE among them is text of
                              pre-training, with loss on every token (text:pydocs, text:path/to/texts)
    eval=<file>|<share>       rows to evaluate: of a file, or a share held out of the data; default .02. The checkpoint of
                              the lowest held-out loss, of pairs the highest accuracy, is kept and named
    epochs=<number>           passes over the data, over the first of several; default 3, dpo 1
    lr=<rate>                 peak learning rate; default 2e-5, dpo 1e-6, TRL's for full fine-tuning of released models,
                              and with lora= ten times that. A proxy of some 100,000 parameters wants about 1e-3
    lora=<rank>               trains adapters of this rank and keeps the weights as they are (bfloat16 on accelerators)
    topology=h200:1           hardware to plan for (launch/plan.py); data may then be left out, and model may be mini, small
                              or medium, of which no weights are needed
    continue=true             model is a run of lora=: goes on with its adapters, on its base
    name=<name>               the study is runs/<name>

AdamW (b1 .9, b2 .999, eps 1e-8, no decay), gradients clipped at norm 1, linear schedule with a warm-up of 3 %, rates step
by step as transformers counts them. `--config.optim.*`, `--config.train.batch_tokens` and `--config.data.*` change them.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import TABLE, apply, base_config, parse_arguments
from phi3_jax.family import GIVEN, TRIO

METHODS = {  # rows, and peak rate and epochs, which are TRL's defaults
    "sft": ("conversations", 2e-5, 3.0),
    "dpo": ("preferences", 1e-6, 1.0),
}
WORDS = {
    "model": str, "data": str, "eval": str, "epochs": TABLE["train.epochs"], "lr": TABLE["optim.peak_lr"], "name": str,
    "lora": TABLE["lora.rank"], "continue": TABLE["lora.continued"], "topology": TABLE["topology"],
}  # fmt: skip


PERSONS = 128  # of the world that the three stages of `all` are about
TOKENS = 3_000_000  # of its base


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    if argument and not argument.startswith("all"):
        return _one(argument)
    _, words = parse_arguments(argument, ("all",), {"size": TRIO, "seed": int, "name": str})
    return stages(words.get("size", "mini"), words.get("seed", 0), words.get("name", "posttrain"))


def stages(size: str, seed: int, name: str) -> ConfigDict:
    """A base at pico, SFT of it with half of the windows from its pre-training, and DPO, all on one generated world."""
    world = f"{PERSONS}:{seed}"
    base = base_config()
    base.update(sizes=(size,), scale="pico", budgets=(TOKENS,), seed=seed)
    base.data.update(source=f"prose:{world}", tokenizer="tiny", window=128)
    sft = _one(f"sft,model=@1-base,data=talks:{world}@1+text:prose:{world}@1,epochs=1,lr=2e-3")
    dpo = _one(f"dpo,model=@2-sft,data=pairs:{world},epochs=1,lr=1e-4")
    for one in (sft, dpo):
        one.seed = seed
        one.data.window = 128
    config = base_config()
    config.name = name
    config.stages = ConfigDict({"1-base": base, "2-sft": sft, "3-dpo": dpo})
    return config


def _one(argument: str) -> ConfigDict:
    """SFT or DPO of a given model."""
    method, words = parse_arguments(argument, tuple(METHODS), WORDS)
    for word in ("model", *(() if words.get("topology") else ("data",))):
        if not words.get(word):
            raise UserError(f"{method} needs {word}=; for example {method},model=runs/mini,data=rows.jsonl")
    rows, rate, epochs = METHODS[method]
    if words.get("lora") or words.get("continue"):
        rate *= 10
    config = base_config()
    config.update(sizes=(GIVEN,), scale=GIVEN)
    config.optim.update(
        peak_lr=rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0, schedule="linear", warmup=0.03, final_lr=0.0,
        z_loss=0.0, warmup_from_zero=True,
    )  # fmt: skip
    config.train.epochs = epochs
    config.data.rows = rows
    words["data"] = f"chats:{words.get('data', '')}"
    if _is_number(words.get("eval", "")):
        words["held_out"] = TABLE["data.held_out"].read(words.pop("eval"), "eval")
    keys = {"held_out": "data.held_out", "eval": "data.eval"}
    keys |= {"data": "data.source", "model": "train.init", "epochs": "train.epochs", "lr": "optim.peak_lr"}
    keys |= {"lora": "lora.rank", "continue": "lora.continued"}
    return apply(config, words, keys)


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False
