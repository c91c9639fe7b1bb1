"""Synthetic text: a model writes textbooks and exercises, or rephrases pages, and rules decide what stays.

    python launch/curate.py --config experiments/synthetic.py --endpoint http://localhost:8000/v1 --output curated/made
    python launch/curate.py --config experiments/synthetic.py:web=curated/mine,count=2000 --model runs/phi3-mini
    python launch/run.py    --config experiments/scaling.py:sweep,data=curated/made                    # trains on it

Words after the colon, separated by commas:

    templates=A+B       which: textbook, exercise, exercise_code, rephrase, opening (phi3_jax/curation/templates.py).
                        Default: the first three, and rephrase where there is web=. opening goes on with the first words of
                        a page, for models that nobody taught to chat
    count=120           requests in all, spread evenly over the templates
    subjects=FILE       subjects, one a line, in place of those that the templates bring
    web=FOLDER          a curated folder: its pages are rephrased, and what is like one of them is dropped
    benchmarks=FOLDER   items of benchmarks that no text may hold: NAME/test.jsonl, or a .jsonl file
    licence=NAME        licence of what the model writes, as its terms say; it stands in every document
    phase1=4M phase2=1M as in experiments/curation.py; the roles are textbook and exercise

Every number is a key: --config.synthetic.temperature=0.7, --config.rules.near.jaccard=0.7.

A template of your own, in a copy of this file:

    from phi3_jax.curation.templates import TEMPLATES, Template
    TEMPLATES["letter"] = Template(1, "Write a letter about {subject}.", "fiction", {"subject": ("rain", "a fair")})
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.wanted import KEYS
from phi3_jax.experiment import parse_arguments
from phi3_jax.keys import parse_count

WORDS = {"templates": str, "subjects": str, "web": str, "benchmarks": str, "licence": str, "count": str} | {
    f"phase{n}": str for n in (1, 2)
}
ASKED = ("textbook", "exercise", "exercise_code")
ROLES = ("textbook=textbook+fiction:0.7:0.4", "exercise=reasoning+code:0.3:0.6")
CODE = ("code",)


def get_config(argument: str = "") -> ConfigDict:
    """The config; `argument` is what follows the colon on the command line."""
    _, words = parse_arguments(argument, ("synthetic",), WORDS)
    config = base()
    for phase in ("phase1", "phase2"):
        if phase in words:
            config.update({phase: parse_count(words[phase]), "roles": ROLES})
    default = ASKED + ("rephrase",) * ("web" in words)
    names = tuple(words["templates"].split("+")) if "templates" in words else default
    asked = {name: key.default for name, key in KEYS.items()} | {"templates": names}
    asked |= {"pages": words.get("web", ""), "subjects": words.get("subjects", ""), "licence": words.get("licence", "")}
    if "count" in words:
        asked["count"] = parse_count(words["count"], "a number of requests")
    config.synthetic = ConfigDict(asked)
    order = ["normalise", "language", "gopher_repetition", "gopher_quality", "answers", "exact", "near"]
    rules = {
        "language": {"least": 0.5, "exempt": CODE},
        "gopher_repetition": {"exempt": CODE},
        "gopher_quality": {"exempt": CODE + ("reasoning",)},
    }
    if "web" in words:
        order.append("against")
        rules["against"] = {"corpus": words["web"]}
    if "benchmarks" in words:
        order.append("decontaminate")
        rules["decontaminate"] = {"benchmarks": words["benchmarks"]}
    return with_steps(config, *order, "personal", **rules)
