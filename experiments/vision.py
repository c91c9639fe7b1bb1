"""Does what a model sees, and what it makes of it, grow with its size as reading does? And phi-3-vision, trained further.

    python launch/run.py --config experiments/vision.py             # quick: every cell of the study, one seed
    python launch/run.py --config experiments/vision.py:standard    # 3 seeds, in the same folder: for the rule
    phi3-jax verdict experiments/vision.py runs/vision-study        # what ran, and what the rule below says

    python launch/run.py --config experiments/vision.py:pretrain,model=runs/vision,data=captions.json,images=FOLDER
    python launch/run.py --config experiments/vision.py:sft,model=runs/vision,data=llava.json,images=FOLDER,train=lora
    python launch/run.py --config experiments/vision.py:sft,model=runs/vision,data=a.jsonl,images=FOLDER,train=lm+tower@0.1

THE STUDY. The report gave eyes to mini alone. Here the three pico proxies each get a tower of one shape and the same drawn
pictures (`phi3_jax.data.corpora.drawn`: symbols and shapes, bar charts, sums whose operators are colours), never one twice.
Tower, projector and language model learn together from nothing. Arms:

    text             the content as text, a token a cell
    picture          the same items, their content seen
    hidden           mini alone, the content neither read nor seen: what a model that does not see reaches

Every item is asked in the same way, one answer for each cell. Difficulty is graded: transcribing symbols, reading the
heights of bars, and sums after 1, 2 and 3 steps of which the last alone is written. `sums` exact, all seven results right,
decides.

Words after the colon, separated by commas:

    quick | standard         default quick; both are of seeds from 10 on, so that the second goes on from the first
    seed=10  seeds=1         first seed, number of seeds
    tokens=1.8M              of each run; another number is a trial
    arms=text+picture        only these arms

What a score can be. Sums: a result is right in 20.3 % of cases for who always says the likeliest, in 22.5 % for who says
the likeliest after the result before it; all seven right: near 0. `hidden` measures it. The ceiling is 100 %. A cell whose
mean lies above 95 or below 5 % is not compared (log-odds say little there), nor are pictures of which a size does not
transcribe 90 % of the symbols: then the eye is what differs.

What three seeds can show. Before this file, in another design (a shared frozen tower, 54,000 pictures, 2 seeds), seeds of a
size had an SD of .22 log-odds. An interaction is a difference of four such cells, of SD .45; by Student's t, three seeds
find one of 1.4 log-odds in 4 of 5 studies, and five seeds one of .7. There medium led mini by .9 on pictures, and one seed
of mini lay .8 below its text. So three seeds will leave an interaction of usual size undecided, and one seed shows a shape
and claims nothing.

The rule, written before any run of this file, and with it what was expected, is `RULE` below.

FURTHER TRAINING, by the words `pretrain`, `sft` and `dpo`, or any that stands below (then sft).

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
from phi3_jax.experiment import TABLE, Arm, apply, arms_config, base_config, parse_arguments, take_arms
from phi3_jax.family import GIVEN, TRIO
from phi3_jax.keys import parse_count

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

STUDIES = {"quick": 1, "standard": 3}  # seeds
STUDY_WORDS = {"arms": str, "seed": int, "seeds": int, "tokens": str}
TOKENS, BATCH = 1_800_000, 18 * 42  # 42 tokens a picture or its text
ARMS = {
    "text": Arm(data="drawn:text"),
    "picture": Arm(data="drawn:picture"),
    "hidden": Arm(data="drawn:hidden", sizes=("mini",)),
}
# Read by phi3_jax.scaling.seeing. Scores are compared in log-odds, within a seed, with Student's t over seeds.
RULE = dict(
    seeds=STUDIES["standard"],
    endpoint="seeing/sums/exact",
    arms=("text", "picture"),
    sizes=(TRIO[0], TRIO[-1]),
    # (picture, largest - smallest) - (text, largest - smallest): seeing grows more where its interval lies above 0, less
    # where below, alike where inside +-margin; else undecided.
    margin=0.5,
    # Cells of the endpoint whose mean over seeds lies outside say nothing of a difference; the floor is that of `hidden`
    # where it is higher.
    admitted=(0.05, 0.95),
    floor=("hidden", TRIO[0]),
    # Every size sees: this much of this endpoint in the arm of pictures.
    sees=("seeing/scenes/accuracy", 0.9),
    # Of one cell over seeds, in log-odds: what a pilot of another design had.
    seed_sd=0.22,
    # Beside the decision: gaps of modality by size, and the second step minus the first, a doubling each.
    predictions={
        "interaction": "undecided",
        "gap of mini": "below 0",
        "gap of medium": "below 0",
        "second minus first step, picture": "undecided",
    },
)  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    given = {piece.partition("=")[0].strip() for piece in argument.split(",")}
    return _further(argument) if given & {*METHODS, *WORDS} else _study(argument)


def _study(argument: str) -> ConfigDict:
    """The study of proxies."""
    target, words = parse_arguments(argument, (*STUDIES, *METHODS), STUDY_WORDS)
    chosen = take_arms(words, ARMS)
    tokens = parse_count(words.pop("tokens", str(TOKENS)))
    config = base_config()
    config.update(
        name="vision-study" if tokens == TOKENS else "vision-trial", scale="pico", sizes=TRIO, seed=10,
        seeds=STUDIES[target], size_factor=tokens / TOKENS, verdict="phi3_jax.scaling.seeing:lines_of",
    )  # fmt: skip
    config.arms = arms_config(chosen)
    config.seeing = ConfigDict(RULE)
    config.budgets = (round(tokens),)
    config.train.update(batch_tokens=BATCH, eval_points=1, log_every=100, checkpoint_every=400)
    return apply(config, words, {})


def _further(argument: str) -> ConfigDict:
    """A phi-3-vision trained further."""
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
