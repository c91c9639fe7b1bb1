"""Does a larger model keep more, or less, in a longer window? The size study of experiments/longcontext.py.

Every base is extended with every list, and each extension is trained; a folder of STUDY/extensions, as `launch/extend.py`
writes it, is one of these. Its search also tried the lists without training. The rule was written before any of them ran:

    end          of a list, trained or not: text loss in the last half of the window, on rows that nobody trained on, the
                 same rows for all
    gap          end less the loss of the same tokens in windows of the original length: by the base before training, by the
                 trained model with its own list after, so that what training gives everywhere is in neither
    by size      how much more either is in medium than in mini: its slope on log2 of the parameters over three sizes, seeds
                 as blocks, with its t interval (`statistics.slope_in_blocks`)
    a word       both ends of the gap's interval within the margin: alike; gap above 0: the larger extrapolates worse (end
                 above 0, too), loses a part of its lead (end below 0), or loses more, with the order at the end open; gap
                 below 0: it keeps more; else not determined
    primary      the searched list after training, as the released models have; second: YaRN before training. Together:
                 `together`. All else is described without a word
    gate         a base that writes fewer than .7 of a needle's digits at its own length has none to lose: no word then
    needles      the loss of needles' answers at the window's length less that at the original length, by size; where it and
                 text do not agree in sign nothing is said of retrieval, which RULER asks for
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from phi3_jax import cluster, compile_cache, statistics
from phi3_jax.configs import RunConfig
from phi3_jax.errors import STOPPED, UserError
from phi3_jax.extension import command as extend
from phi3_jax.extension import page
from phi3_jax.extension.command import FACTORS
from phi3_jax.family import TRIO, proxy
from phi3_jax.records import files, tables
from phi3_jax.reporting.figures import Drawn
from phi3_jax.statistics import Estimate
from phi3_jax.study import workers

LISTS = ("none", "pi", "ntk", "yarn", "searched")
SCALE, LADDER, LEVEL, FINDS = "pico", "clean", 0.95, 0.70
FOLDER, TABLE = "extensions", "gaps.csv"  # of a study; of a folder that `keep` wrote
COLUMNS = ("end", "alone", "needles", "digits_first", "digits_last")
WORSE, PART = "the larger extrapolates worse", "the larger loses a part of its lead"
MORE, KEEPS = "the larger loses more, and which ends lower is open", "the larger keeps more"
ALIKE, OPEN = "alike", "not determined"


@dataclass(frozen=True)
class Cell:
    """One extension: of which base, and with which list."""

    base: str
    size: str
    seed: int
    form: str

    @property
    def name(self) -> str:
        return f"{self.size}-s{self.seed}-{self.form}"

    def flags(self, study: Path, how: Mapping[str, Any]) -> dict[str, Any]:
        """What `launch/extend.py` is asked for to make it."""
        searched = self.form == "searched"
        return {
            "model": str(study / self.base), "to": how["to"], "original": None, "factors": None, "data": None,
            "method": "longrope2" if searched else self.form, "fitness": "both", "text_field": "text",
            "evaluations": how["evaluations"] if searched else 1, "train": how["train"], "mix": how["mix"],
            "seed": self.seed, "out": str(study / FOLDER / self.name),
        }  # fmt: skip

    def words(self, study: Path, how: Mapping[str, Any]) -> list[str]:
        """The same as it is typed."""
        given = {name: value for name, value in self.flags(study, how).items() if value is not None}
        return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


# ------------------------------------------------------------------------------------------------ the extensions


def make(study: Path, config: Mapping[str, Any], runs: Sequence[RunConfig]) -> tuple[list[str], bool]:
    """Makes the extensions that are not there yet, each of which goes on where it was stopped.

    Args:
      config: of the study; `extension` has the target, the evaluations of a search, and the tokens and mix of training.
      runs: the bases, trained.

    Returns:
      (errors, whether a signal stopped it).
    """
    planned = [Cell(run.name, run.model.member, run.seed, form) for run in runs for form in LISTS]
    left = [cell for cell in planned if not (study / FOLDER / cell.name / page.NAME).is_file()]  # which comes last
    how = config["extension"]
    _require_alike([cell for cell in planned if cell not in left], study, how)
    print(f"{len(left)} of {len(planned)} extensions to make, in {study / FOLDER}", flush=True)
    (study / FOLDER).mkdir(exist_ok=True)
    if jax.default_backend() == "cpu":
        starts = [functools.partial(_Extension, cell, study, how) for cell in left]
        return workers.side_by_side(starts, lambda _: None, _say)
    with compile_cache.kept():  # this process holds the accelerator's memory
        for cell in left:
            if status := extend.command(cell.flags(study, how)):
                return [], status == STOPPED
    return [], False


def _require_alike(made: Sequence[Cell], study: Path, how: Mapping[str, Any]) -> None:
    """Refuses to go on where what is there was made otherwise."""
    for cell in made:
        old = files.read_state(study / FOLDER / cell.name / extend.SEARCH / extend.RECORD)
        for name in ("train", "mix", *(["evaluations"] if cell.form == "searched" else [])):
            if old.get(name) != how[name]:
                raise UserError(
                    f"{study / FOLDER / cell.name} was made with {name}={old.get(name)}, and {how[name]} is asked for; "
                    "take another name, or put that back"
                )


class _Extension(workers.Beside):
    """The process that makes one extension."""

    def __init__(self, cell: Cell, study: Path, how: Mapping[str, Any], cores: set[int]) -> None:
        environment = os.environ | workers.memory_kept() | {cluster.CORES: ",".join(map(str, sorted(cores)))}
        words = ["phi3_jax", "extension", *cell.words(study, how)]
        super().__init__(words, study / FOLDER, cell.name, cores, stdout=subprocess.DEVNULL, env=environment)

    def finish(self) -> list[str]:
        """Its last words, where it failed."""
        self.log.flush()
        said = [line for line in Path(self.log.name).read_text(errors="replace").splitlines() if line.strip()]
        if self.process.returncode == 2 and said:
            self.errors.append(f"{self.name}: {said[-1].removeprefix('error: ')}")
        return super().finish()


def one(flags: Mapping[str, Any]) -> int:
    """The command of that process."""
    cluster.join()
    return extend.command(flags)


def _say(one: _Extension) -> None:
    if one.process.returncode == 0:
        print(f"extended: {one.name}", flush=True)


# ------------------------------------------------------------------------------------------------ what is measured


class Measured(NamedTuple):
    """What a list makes of the unseen rows, trained or not, in nats per token but for the digits.

    Attributes:
      end: loss of text in the last half of the window.
      alone: loss of the same tokens in windows of the original length: with no list before training, with the list after.
      needles: loss of a needle's answer at the window's length, less that at the original length.
      digits: share of the answer's digits at the original length and at the window's.
    """

    end: float
    alone: float
    needles: float
    digits: tuple[float, float]

    @property
    def gap(self) -> float:
        """What the longer window adds to the loss of the same tokens."""
        return self.end - self.alone


Key = tuple[str, int, str, bool]  # size, seed, list, trained


def read(study: Path) -> dict[Key, Measured]:
    """What is measured so far. What a list does without training is read from the search's own extension.

    Raises:
      UserError: a factors.json, or a kept table, that is not whole.
    """
    if (study / TABLE).is_file():
        return dict(map(_kept, tables.read(study / TABLE)))
    found: dict[Key, Measured] = {}
    for cell in _planned(study):
        path = study / FOLDER / cell.name / FACTORS
        if not path.is_file():
            continue
        made = files.read_json(path).get("made_by") or {}
        try:
            alone = made["lists"]["none"]["unseen"]["alone"]
            if "trained" in made:
                new = made["trained"]["unseen"]
                found[cell.size, cell.seed, cell.form, True] = _measured(new, new["alone"])
            for name, one in made["lists"].items() if cell.form == "searched" else ():
                form = name if name in LISTS else "searched"
                found[cell.size, cell.seed, form, False] = _measured(one["unseen"], alone)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path} is no whole factors.json ({error!r}); remove its folder and make it again"
            ) from error
    return found


def _kept(line: tables.Row) -> tuple[Key, Measured]:
    end, alone, needles, *digits = (line.number(name, positive=False) for name in COLUMNS)
    key = line["size"], round(line.number("seed", positive=False)), line["list"], line["trained"] == "yes"
    return key, Measured(end, alone, needles, (digits[0], digits[1]))


def _measured(unseen: Mapping[str, Any], alone: float) -> Measured:
    needles, digits = [*unseen["needle_nll"].values()], [*unseen["digits"].values()]
    end = float([*unseen["text"].values()][-1])
    return Measured(end, float(alone), float(needles[-1] - needles[0]), (float(digits[0]), float(digits[-1])))


def keep(study: str, folder: str) -> None:
    """Writes what was measured and the design into a folder, from which `lines_of` says the same.

    python -c "from phi3_jax.extension import sizes; sizes.keep('runs/longcontext', 'FOLDER')"
    """
    found = read(Path(study))
    keys = [(cell.size, cell.seed, cell.form, trained) for cell in _planned(Path(study)) for trained in (False, True)]
    rows = [
        dict(size=key[0], seed=key[1], list=key[2], trained="yes" if key[3] else "no")
        | {name: f"{value:.6g}" for name, value in zip(COLUMNS, (*one[:3], *one.digits), strict=True)}
        for key, one in ((key, found[key]) for key in keys if key in found)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    tables.write(Path(folder) / TABLE, ("size", "seed", "list", "trained", *COLUMNS), rows)
    design = _design(Path(study))
    some = {name: design[name] for name in ("sizes", "seeds", "seed", "budgets", "extension")}
    some["data"] = {"source": design["data"]["source"]}
    files.write_json(
        Path(folder) / "study.json", {"title": _described(Path(study))["title"], "design": {"config": some}}
    )


# ------------------------------------------------------------------------------------------------ the rule


def by_size(found: Mapping[Key, Measured], form: str, trained: bool, of: Callable[[Measured], float]) -> Estimate:
    """How much more a quantity is in the largest size than in the smallest, nats: its slope on log2 of the parameters over
    all sizes, seeds as blocks, times the doublings between the two."""
    keys = [key for key in found if key[2:] == (form, trained)]
    x = [np.log2(proxy(size, SCALE, LADDER).matrix_params) for size, *_ in keys]
    doublings = np.ptp([np.log2(proxy(size, SCALE, LADDER).matrix_params) for size in TRIO])
    return statistics.slope_in_blocks(
        np.array(x) / doublings, [of(found[key]) for key in keys], [seed for _, seed, *_ in keys], LEVEL
    )


def word_of(gap: Estimate, end: Estimate, margin: float) -> str:
    """The rule's word for one list: by the intervals of the gap and of the loss at the end of the window."""
    if gap.known and max(-gap.low, gap.high) < margin:
        return ALIKE
    if gap.sign > 0:
        return WORSE if end.sign > 0 else PART if end.sign < 0 else MORE
    return KEEPS if gap.sign < 0 else OPEN


def together(before: str, after: str) -> str:
    """What the rule's two comparisons are together: of a list before training, and of one after it."""
    loses = (WORSE, PART, MORE)
    if before in loses and after in (ALIKE, KEEPS):
        return "the larger loses more in the longer window until it is trained there"
    if before in loses and after in loses:
        return "the larger loses more in the longer window, training or not"
    if before in (ALIKE, KEEPS) and after in (ALIKE, KEEPS):
        return "the larger does not lose more in the longer window"
    return "open"


def lines_of(study: Path) -> list[str]:
    """What ran, and what the rule says of it."""
    planned, found, design = _planned(study), read(study), _design(study)
    left = [cell.name for cell in planned if (cell.size, cell.seed, cell.form, True) not in found]
    said = [f"{len(planned) - len(left)} of {len(planned)} planned extensions ran"]
    said += [f"not run: {', '.join(left)}"] if left else []
    blind = _blind(found)
    said += [f"bases that do not find needles at their own length: {', '.join(blind)}"] if blind else []
    rule, words = _rule(design), {}
    if found:
        said.append(
            f"{TRIO[-1]} compared with {TRIO[0]}, nats per token, 95 % intervals where there are seeds enough: what the "
            "longer window adds (gap), the loss at its end, what it adds to needles' answers"
        )
    for trained in (False, True):
        for form in LISTS:
            if any(key[2:] == (form, trained) for key in found):
                gap, end = (by_size(found, form, trained, of) for of in (lambda m: m.gap, lambda m: m.end))
                needles = by_size(found, form, trained, lambda m: m.needles)
                said.append(f"{_name(form, trained)}: gap {_shown(gap)}; end {_shown(end)}; needles {_shown(needles)}")
                words[form, trained] = word_of(gap, end, rule["margin"] if rule else 0)
    if not rule:
        return [*said, "a trial: of other settings than the study's its rule says nothing"]
    if left or blind:
        return [*said, "the rule is silent until every planned extension ran, of bases that find needles"]
    for name in ("primary", "second"):
        form, trained = rule[name]
        said.append(f"{name}, {_name(form, trained)}: {words[form, trained]} (predicted: {rule['predictions'][name]})")
    (form, trained), second = rule["primary"], rule["second"]
    said.append(f"verdict: {together(words[second[0], second[1]], words[form, trained])}")
    text, needle = (by_size(found, form, trained, of).sign for of in (lambda m: m.gap, lambda m: m.needles))
    said.append(
        f"retrieval: needles and text {'agree' if text == needle else 'do not agree'} in sign for the primary list"
        + ("" if text == needle else "; nothing is said of RULER")
    )
    return said


def _name(form: str, trained: bool) -> str:
    return f"{form}, {'trained' if trained else 'untrained'}"


def _shown(e: Estimate) -> str:
    return f"{e.value:+.3f}" + (f" [{e.low:+.3f}, {e.high:+.3f}]" if e.known else "")


def _blind(found: Mapping[Key, Measured]) -> list[str]:
    """Bases whose digits at their own length are too few for a longer window to lose any."""
    return [
        f"{size}-s{seed} ({one.digits[0]:.2f})"
        for (size, seed, form, trained), one in found.items()
        if form == "none" and not trained and one.digits[0] < FINDS
    ]


# ------------------------------------------------------------------------------------------------ the study's folder


def _described(study: Path) -> dict[str, Any]:
    described = files.read_state(study / "study.json")
    if not (described.get("design") or {}).get("config", {}).get("extension"):
        raise UserError(f"{study} is no study of extensions; give the folder that experiments/longcontext.py wrote")
    return described


def _design(study: Path) -> dict[str, Any]:
    config: dict[str, Any] = _described(study)["design"]["config"]
    return config


def _planned(study: Path) -> list[Cell]:
    """The extensions of a study, or of a folder of `keep`, in order.

    Raises:
      UserError: no such study.
    """
    design = _design(study)
    names = {(run["model"]["member"], run["seed"]): run["name"] for run in _described(study).get("runs", ())}
    seeds = range(design["seed"], design["seed"] + design["seeds"])
    return [
        Cell(names.get((size, seed), ""), size, seed, form)
        for size in design["sizes"]
        for seed in seeds
        for form in LISTS
    ]


def _rule(design: Mapping[str, Any]) -> dict[str, Any]:
    """The rule, where the study is the one that it was written for; else nothing."""
    rule: dict[str, Any] = design["extension"].get("rule") or {}
    now = {name: value for name, value in design["extension"].items() if name != "rule"}
    now |= {name: design[name] for name in ("seed", "seeds", "budgets")} | {"data": design["data"]["source"]}
    return rule if rule and now == rule["of"] and list(design["sizes"]) == list(TRIO) else {}


def figures(study: Path) -> list[Drawn]:
    """The study's figure, where two sizes have a list in common."""
    found = read(study)
    sizes = {size: proxy(size, SCALE, LADDER).matrix_params for size in _design(study)["sizes"]}
    gaps = {key: one.gap for key, one in found.items()}
    return page.by_size(study / "figures", gaps, sizes, f"{_described(study)['title']}, NOT the released models")
