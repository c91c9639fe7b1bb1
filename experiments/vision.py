"""A phi-3-vision goes on from its own weights, on rows with pictures. `name:words` after `--config`, for example

    python launch/run.py --config experiments/vision.py:pretrain,model=runs/vision,data=captions.json,images=FOLDER
    python launch/run.py --config experiments/vision.py:sft,model=runs/vision,data=llava.json,images=FOLDER,train=lora
    python launch/run.py --config experiments/vision.py:sft,model=runs/vision,data=a.jsonl,images=FOLDER,train=lm+tower@0.1

`pretrain` aligns pictures with text: documents of text with pictures, all of whose text bears loss, and conversations, such
as captions; by default the projector alone learns (LLaVA's first stage). `sft` is supervised fine-tuning: loss on the
answers. `dpo` is direct preference optimisation on pairs of responses to prompts with pictures. Pictures bear no loss.

`phi3_jax.data.picture_rows` says how rows name their pictures, and `phi3_jax.data.dialogues` which tokens bear loss. The
whole file is checked first, and every picture is decoded once; then all are written to one data set, from which training
reads.

Words:
    model=<run>|hf:<folder>   the weights to start from, of a phi-3-vision
    data=<rows>               as of experiments/posttrain.py; rows may have pictures
    images=<folder>           that pictures are named in
    train=<parts>             all, or lm, projector (with the separators) and tower, joined by +; tower@0.1 learns at a
                              tenth of the rate. What is left out stays as it is, bit for bit, and takes no memory of the
                              optimiser. Or lora: adapters beside frozen weights, of language model, projector and tower
                              (--config.lora.targets=lm,projector leaves the tower out). Default all; of pretrain projector
    lora=<rank>               of train=lora; default 32, which counts twice (Microsoft's recipe has 32)
    crops=<number>            tiles that a picture is cut into at most; default: what the model's files say
    eval=<file>|<share>       as of experiments/posttrain.py; a picture is held out or not, with all its rows that begin
                              with it
    epochs=<number>           default 1, sft 2
    lr=<rate>                 peak learning rate; default 1e-5, projector alone 1e-3, lora 2e-4, dpo a tenth of these
    topology=h200:1           hardware to plan for (launch/plan.py); data may then be left out, and model may be vision or
                              vision-3.5, of which no weights are needed
    name=<name>               the study is runs/<name>

Rates: of all weights PhiCookBook's 5e-6 to 5e-5, of LoRA its 2e-4; of a projector LLaVA's 1e-3 (arXiv:2310.03744). AdamW
(b1 .9, b2 .95, eps 1e-7, decay .01), gradients clipped at norm 1, linear schedule with a warm-up of 3 %.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import TABLE, apply, base_config, parse_arguments
from phi3_jax.family import GIVEN

METHODS = {  # rows, passes, what is trained, factor of the rate
    "sft": ("conversations", 2.0, "all", 1.0),
    "pretrain": ("conversations", 1.0, "projector", 1.0),
    "dpo": ("preferences", 1.0, "all", 0.1),
}
RATES = {"projector": 1e-3, "lora": 2e-4}
RATE, RANK = 1e-5, 32
WORDS = {
    "model": str, "data": str, "images": str, "train": str, "lora": TABLE["lora.rank"], "crops": TABLE["data.crops"],
    "eval": str, "epochs": TABLE["train.epochs"], "lr": TABLE["optim.peak_lr"], "name": str,
    "topology": TABLE["topology"],
}  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    method, words = parse_arguments(argument, tuple(METHODS), WORDS)
    for word in ("model", *(() if "topology" in words else ("data",))):
        if word not in words:
            raise UserError(
                f"{method} needs {word}=; for example {method},model=runs/vision,data=llava.json,images=FOLDER"
            )
    rows, epochs, parts, factor = METHODS[method]
    parts = words.pop("train", parts)
    config = base_config()
    config.update(sizes=(GIVEN,), scale=GIVEN)
    config.optim.update(
        peak_lr=RATES.get(parts, RATE) * factor, b1=0.9, b2=0.95, eps=1e-7, weight_decay=0.01, clip=1.0, schedule="linear",
        warmup=0.03, final_lr=0.0, z_loss=0.0, warmup_from_zero=True,
    )  # fmt: skip
    config.train.epochs = epochs
    config.data.rows = rows
    words["data"] = f"chats:{words.get('data', '')}"
    return apply(config, words | _trained(parts, words), _PLACES | _held(words))


_PLACES = {
    "data": "data.source", "images": "data.images", "crops": "data.crops", "model": "train.init", "epochs": "train.epochs",
    "lr": "optim.peak_lr", "lora": "lora.rank", "parts": "train.parts",
}  # fmt: skip


def _trained(parts: str, words: dict[str, Any]) -> dict[str, Any]:
    if parts == "lora":
        return {"lora": words.get("lora", RANK)}
    if "lora" in words:
        raise UserError(f"lora={words['lora']} is of train=lora; leave one of lora= and train={parts} out")
    return {"parts": () if parts == "all" else tuple(parts.split("+"))}


def _held(words: dict[str, Any]) -> dict[str, str]:
    """Where `eval` goes: a number is a share of the data."""
    text = words.get("eval", "")
    try:
        float(text)
    except ValueError:
        return {"eval": "data.eval"}
    words["eval"] = TABLE["data.held_out"].read(text, f"eval={text}")
    return {"eval": "data.held_out"}
