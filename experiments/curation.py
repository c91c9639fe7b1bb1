"""From raw pages to a corpus: which rules, in which order, with which limits.

    python launch/curate.py --config experiments/curation.py --input FOLDER --output curated/mine
    python launch/curate.py --config experiments/curation.py:fineweb --input crawl --output curated/web
    python launch/curate.py --config experiments/curation.py:for=mini --input FOLDER --output curated/mini
    python launch/run.py    --config experiments/scaling.py:sweep,data=curated/mine          # trains on it

Words after the colon, separated by commas:

    own | fineweb       which rules (default own). fineweb: those of FineWeb (arXiv:2406.17557) in its order, with the
                        decisions of datatrove 0.10.1, whose words are spaCy's. own: the same families with words between
                        white space; genres whose form they misread (the field `genre` of a row) are exempt from a rule
    rule=FILE.py:NAME   a rule of your own as well: a function (text, row) -> number or true and false, see `own` below
    benchmarks=FOLDER   items of benchmarks that the corpus must not hold: NAME/test.jsonl, or a .jsonl file, with question
                        and answer or target. Documents with one are dropped (--config.rules.decontaminate.mode=cut|tag)
    for=mini|small|...  the knowledge filter for a model of this size, or of so many parameters (for=3.8B): of documents
                        that state facts those with the fewest bits of facts per word stay, until the distinct bits reach
                        --config.rules.knowledge.bits times the parameters; for=medium keeps more, and all that mini keeps.
                        With --reuse curated/mini it only selects: nothing is measured again
    perplexity=RUN      bits per byte of each document under a model; --config.rules.perplexity.most=2.5 says how odd a text
                        may be. Another limit with --reuse scores nothing again
    learnability=A+B    bits per byte under A, a run of the size that the corpus is for, minus those under B, a larger one
    quality=LABELS      how probably a text is labelled 1, learned from JSON lines with text, label (0 or 1) and source;
                        --config.rules.quality.least=0.5; the page says how right it is on sources that it never saw
    phase1=4M  phase2=1M   tokens of the two phases that the corpus is for: each document gets a role (ROLES below, or
                        --config.roles) and its phases; epochs are printed. data=curated:1:curated/mine trains on phase 1
    scale=pico          for= names the proxy of this scale, as in scaling.py; full: the released model
    text_field=text     the field of a row that holds its text

Every parameter of every step is a key: --config.rules.near.jaccard=0.9. The order is one too: --config.order=exact,near.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.curation.config import base, with_steps
from phi3_jax.errors import UserError
from phi3_jax.experiment import parse_arguments
from phi3_jax.family import MEMBERS, SCALES, proxy, published
from phi3_jax.keys import parse_count

TARGETS = ("own", "fineweb")
WORDS = {
    "rule": str,
    "quality": str,
    "perplexity": str,
    "learnability": str,
    "text_field": str,
    "benchmarks": str,
    "for": str,
    "scale": ("full", *SCALES),
} | {f"phase{n}": str for n in (1, 2)}
CODE, SPEECH = ("code", "technical-docs"), ("dialogue", "drama", "reading-qa", "instruction")
# Words that add a step before personal data are replaced, and the parameter that they give it.
STEPS = {
    "benchmarks": ("decontaminate", "benchmarks"),
    "quality": ("quality", "labels"),
    "perplexity": ("perplexity", "model"),
}
LISTS = ("factual", "reasoning")  # fields and values, steps of a calculation: few words of a language, few sentences


def get_config(argument: str = "") -> ConfigDict:
    """The curation as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    config = base(text_field=words.get("text_field", "text"))
    for phase in ("phase1", "phase2"):
        if phase in words:
            config.update({phase: parse_count(words[phase]), "roles": ROLES})
    order, rules = FINEWEB if target == "fineweb" else OWN
    order = list(order)
    if "rule" in words:
        order.insert(order.index("exact"), "own")
        rules = rules | {"own": {"rule": words["rule"]}}
    for word, (step, parameter) in STEPS.items():
        if word in words:
            order.insert(order.index("personal"), step)
            rules = rules | {step: {parameter: words[word]}}
    if "learnability" in words:
        small, plus, large = words["learnability"].partition("+")
        if not plus or not large:
            raise UserError(f"learnability={small} names one model; write learnability=SMALL+LARGE")
        order.insert(order.index("personal"), "learnability")
        rules = rules | {"learnability": {"small": small, "large": large}}
    if "for" in words:
        order.append("knowledge")
        rules = rules | {"knowledge": {"parameters": parameters(words["for"], words.get("scale", "pico"))}}
    elif "scale" in words:
        raise UserError(f"scale={words['scale']} says which proxy for= means; name one, such as for=mini")
    return with_steps(config, *order, **rules)


# As in the phases of phi3_jax/data/sources/mixture.py: the report publishes no rates.
ROLES = (
    "web=*:0.9:0.5",
    "textbook=textbook+technical-docs+nonfiction+code:0.1:0.2",
    "reasoning=reasoning+instruction:0:0.3",
)


def parameters(size: str, scale: str) -> int:
    """Non-embedding parameters of a size at a scale, or the number that was typed.

    Raises:
      UserError: neither.
    """
    if size[:1].isdigit():
        return parse_count(size, "a number of parameters")
    if scale == "full" and size not in MEMBERS:
        raise UserError(f"for={size} at scale=full is none of {', '.join(MEMBERS)}")
    return (published(size) if scale == "full" else proxy(size, scale)).matrix_params


# FineWeb's order; C4 without its rule on how a line ends, as FineWeb uses it. Addresses are replaced last, as there.
FINEWEB = (
    ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "exact", "near", "personal"),
    {
        "gopher_repetition": {"words": "spacy"},
        "gopher_quality": {"words": "spacy"},
        "c4": {"words": "spacy", "terminal": False},
        "fineweb": {"words": "spacy"},
        "personal": {"phones": False, "ipv6": False},
    },
)
OWN = (
    ("normalise", "language", "gopher_repetition", "gopher_quality", "fineweb", "exact", "near", "personal"),
    {
        "language": {"least": 0.5, "exempt": CODE + LISTS},
        "gopher_repetition": {"exempt": CODE + LISTS},
        "gopher_quality": {"exempt": CODE + ("reasoning",)},
        "fineweb": {"quotes": True, "min_ended": 0.05, "max_repeated": 0.1, "exempt": CODE + SPEECH + LISTS},
    },
)
