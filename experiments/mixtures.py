"""Which mixture of your texts serves a size best? Each mixture is an arm; all are scored on the same held-out documents.

    python launch/run.py --config experiments/mixtures.py                                    # documentation and made prose
    python launch/run.py --config experiments/mixtures.py:data=code+prose,weights=1:0/1:1/0:1,seeds=3,budgets=1M,2M
    python launch/run.py --config experiments/mixtures.py:data=web+books,weights=9:1/1:1,scale=milli,ratio=20,tokenizer=tok/

Words after the colon, separated by commas:

    data=A+B[+...]           sources of text: paths, pydocs, tfds:NAME, or prose and reasoning, which are generated
    weights=1:0/1:1/0:1      an arm each: how many of its tokens are of each source, in their order. A source of weight 0 is
                             evaluated all the same: all arms are scored on the held-out documents of all sources, which
                             are chosen by their hash and are trained on in none
    budgets=250k,500k        tokens, of all sizes from one trunk; or ratio=20,160 or isoflop=1e12,4e12, as in scaling.py
    sizes=mini+medium        default mini+small+medium
    scale=pico|nano|...      of the ladder of widths and depths (clean)
    tokenizer=bytes|PATH     one for all arms
    seed=0  seeds=1          first seed, number of seeds; three or more give intervals of paired differences

The report draws loss against compute by arm, and each arm minus the first by size, paired by seed. Repetition: a source
whose share of a budget is more than it has is passed over again; ratio= and isoflop= refuse that.

Cost on 2 CPU cores: the default, three arms of three sizes at 500k tokens, takes some 4 minutes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import TABLE, Arm, apply, arms_config, base_config, parse_arguments
from phi3_jax.family import SCALES
from phi3_jax.keys import number

WORDS = {
    "data": str, "weights": str, "budgets": list, "ratio": TABLE["ratios"], "isoflop": TABLE["flops"], "sizes": str,
    "scale": SCALES, "tokenizer": str, "seed": int, "seeds": int, "name": str,
}  # fmt: skip
WEIGHT = number("a weight", 1.0, 0.0, 1e4)


def arms_of(data: str, weights: str) -> dict[str, Arm]:
    """An arm for each of the weights, which names it.

    Raises:
      UserError: another number of weights than sources, a weight that is no number, or one mixture twice.
    """
    sources, arms = data.split("+"), {}
    for word in weights.split("/"):
        shares = [WEIGHT.read(share, f"weights={weights}: {share!r}") for share in word.split(":")]
        if len(shares) != len(sources):
            raise UserError(
                f"weights={weights}: {word!r} has {len(shares)} weights for {len(sources)} sources in data={data}"
            )
        if word in arms:
            raise UserError(f"weights={weights} names {word!r} twice; name each once")
        mixed = "+".join(f"{source}@{share:g}" for source, share in zip(sources, shares, strict=True))
        arms[word] = Arm(data=f"mix:{mixed}")
    return {name.replace(":", "-"): arm for name, arm in arms.items()}


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    _, words = parse_arguments(argument, ("mixtures",), WORDS)
    config = base_config()
    config.update(name="mixtures", scale="pico", ladder="clean", budgets=(250_000, 500_000), size_factor=1.0)
    if {"ratio", "isoflop"} & words.keys():
        config.budgets = ()
    if "sizes" in words:
        words["sizes"] = tuple(words["sizes"].split("+"))
    config.arms = arms_config(arms_of(words.pop("data", "pydocs+prose"), words.pop("weights", "1:0/1:1/0:1")))
    config.train.update(eval_points=1, log_every=50)
    return apply(config, words, {"ratio": "ratios", "isoflop": "flops", "tokenizer": "data.tokenizer"})
