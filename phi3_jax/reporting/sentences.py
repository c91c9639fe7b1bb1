"""What a study asks and what its runs answer, in sentences computed from the data and no stronger than its seeds."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_jax.family import TRIO
from phi3_jax.records.table import Run, Study
from phi3_jax.reporting.gains import (
    Cell,
    Difference,
    Gain,
    Lag,
    between_arms,
    between_sizes,
    budgets,
    cells,
    gains,
    lags,
    recall_ceiling,
)
from phi3_jax.scaling.endpoints import Endpoint, endpoints, main_endpoints
from phi3_jax.statistics import Estimate

NO_RUN = "There is no run in this study yet."


def question(study: Study) -> str:
    """What the runs of a study can be asked, in one sentence; "" without a finished run."""
    done = [run for run in study.runs if run.finals]
    members = sorted({run.member for run in done}, key=lambda m: next(r.size or 0 for r in done if r.member == m))
    if not done:
        return ""
    if len(study.arms) == 2:
        first, second = study.arms
        return f"Question: size by size, at equal tokens and seeds, do runs of “{second}” score better than “{first}”?"
    if len(study.arms) > 2:
        first, *others = study.arms
        return (
            f"Question: size by size, at equal tokens and seeds, how do {len(others)} arms differ from “{first}”? "
            "The table of paired differences below answers it."
        )
    if set(TRIO) <= set(members):
        return (
            f"Question: at equal tokens, does a score rise less per doubling of parameters from {TRIO[1]} to {TRIO[2]} "
            f"than from {TRIO[0]} to {TRIO[1]}?"
        )
    if len(members) > 1:
        return f"Question: at equal tokens, how do the scores change with size, from {members[0]} to {members[-1]}?"
    many = len({run.budget_group for run in done}) > 1
    return f"Question: what does {members[0]} score{', and how does that change with its tokens' if many else ''}?"


def rule_question(arms: Sequence[str]) -> str:
    """What the rule of a study with arms decides."""
    return (
        f"Question: is the gain per doubling from {TRIO[1]} to {TRIO[2]}, minus that from {TRIO[0]} to {TRIO[1]}, another "
        f"in “{arms[1]}” than in “{arms[0]}”?"
    )


def headlines(study: Study) -> list[str]:
    """The answer, for each arm of a study apart, and for two arms their paired difference."""
    out = []
    for name, runs in study.arms.items():
        prefix = f"{name[0].upper() + name[1:]}: " if len(study.arms) > 1 else ""
        out += [prefix + sentence for sentence in _arm_headlines(runs)]
    return [*between(study), *out] or [NO_RUN]


def between(study: Study) -> list[str]:
    """The paired difference of a study's two arms at their largest budget; nothing for one arm or more than two."""
    if len(study.arms) != 2:
        return []
    (first, one), (second, two) = study.arms.items()
    out, seeds, known = [], 0, False
    for end in main_endpoints(endpoints([*one, *two])):
        found = between_arms(one, two, end)
        found = [d for d in found if d.budget == found[-1].budget]
        if found:
            seeds, known = min(d.seeds for d in found), known or any(d.value.known for d in found)
            out.append(
                f"{_capital(end)} at {found[-1].budget} tokens, {second} minus {first}, in {_unit_of(end)}: "
                f"{_each(found, [d.member for d in found])}."
            )
    return [*out, seed_sentence(seeds, [*one, *two], known)] if out else []


def _arm_headlines(runs: list[Run]) -> list[str]:
    done = [r for r in runs if r.finished]
    if not done:
        return [f"None of the {len(runs)} run(s) has finished, so there is nothing to compare yet."]
    ends = endpoints(runs)
    if not ends:
        return [f"{len(done)} run(s) finished, none with an evaluation at its last step: nothing to compare."]
    found = [trio for end in main_endpoints(ends) if (trio := gains(runs, end, "points" if end.proportion else "unit"))]
    if found:
        limits = [*_floor_sentences(runs, found), *_ceiling_sentence(runs), *lag_sentences(runs, only_behind=True)]
        every = [gain for trio in found for gain in trio]
        said = seed_sentence(min(g.seeds for g in every), runs, any(g.contrast.known for g in every))
        return [*map(_gain_sentence, found), said, *limits]
    out, seeds, known = [], 0, False
    for end in main_endpoints(ends)[:3]:
        out.append(_score_sentence(runs, end))
        steps = [d for d in between_sizes(runs, end) if d.budget == budgets(cells(runs, end).values())[-1]]
        if steps:
            seeds, known = min(d.seeds for d in steps), known or any(d.value.known for d in steps)
            out.append(
                f"Each size minus the next smaller one, in {_unit_of(end)}: {_each(steps, [d.member for d in steps])}."
            )
    return [*out, *([seed_sentence(seeds, runs, known)] if seeds else []), _why_no_gains(runs)]


def _capital(end: Endpoint) -> str:
    return end.label[0].upper() + end.label[1:]


def quantity(end: Endpoint) -> str:
    """An endpoint's label within a sentence."""
    return end.label[0].lower() + end.label[1:]


def unit(gain: Gain) -> str:
    """The unit of a gain."""
    return "points" if gain.scale == "points" else "log-odds" if gain.scale == "logit" else gain.endpoint.unit


def _unit_of(end: Endpoint) -> str:
    return "points" if end.proportion else f"{end.unit} saved" if end.down else end.unit


def digits(gain: Gain) -> int:
    """Decimals that a gain is written with."""
    return 1 if gain.scale == "points" else 2 if gain.scale == "logit" else 3


def interval(value: Estimate, places: int) -> str:
    """'+18.3 [17.7, 18.9]', or '+18.3' where there is no interval."""
    text = f"{value.value:+z.{places}f}"
    if value.known:
        text += f" [{value.low:z.{places}f}, {value.high:z.{places}f}]"
    return text.replace("-", "−")


def _each(found: Sequence[Difference], names: Sequence[str]) -> str:
    places = 1 if found[0].endpoint.proportion else 3
    return ", ".join(f"{name} {interval(d.value, places)}" for name, d in zip(names, found, strict=True))


def _gain_sentence(found: Sequence[Gain]) -> str:
    """Second gain minus first at every budget, and what all of them allow to say together."""
    last, places = found[-1], digits(found[-1])
    spread = ", ".join(f"{interval(g.contrast, places)} at {g.budget}" for g in found)
    return (
        f"{_capital(last.endpoint)}, {unit(last)}{' saved' if last.endpoint.down else ''} per doubling of parameters: "
        f"at {last.budget} tokens {interval(last.first, places)} from mini to small, then "
        f"{interval(last.second, places)} from small to medium. Second step minus first: {spread} tokens. "
        f"{_reading(found)}"
    )


def _reading(found: Sequence[Gain]) -> str:
    if found[0].seeds == 1:
        written = [round(g.contrast.value, digits(g)) for g in found]
        if len(found) == 1:
            return ""
        if min(written) < 0 < max(written):
            return "Its sign changes with the budget."
        sign = "positive" if max(written) > 0 else "negative" if min(written) < 0 else "0"
        return f"It is {sign}{' or 0' if any(written) and not all(written) else ''} at each budget."
    by_sign = {s: [g.budget for g in found if g.contrast.sign == s] for s in (1, -1, 0)}
    words = [f"{word} at {_and(by_sign[s])}" for s, word in ((1, "larger"), (-1, "smaller")) if by_sign[s]]
    if not words:
        each = "The interval" if len(found) == 1 else "Each interval"
        return f"{each} includes 0: these runs do not tell the two steps apart."
    text = f"The second step is {' and '.join(words)}, where the interval excludes 0"
    return f"{text}; at {_and(by_sign[0])} it includes 0." if by_sign[0] else f"{text}."


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _floor_sentences(runs: list[Run], found: Sequence[Sequence[Gain]]) -> list[str]:
    """A warning for every share that no size lifts a point above chance: it cannot show a gain."""
    out = []
    for trio in found:
        table = cells(runs, trio[0].endpoint).values()
        low = [g.budget for g in trio if all(c.value < (c.chance or 0.0) + 0.01 for c in table if c.budget == g.budget)]
        if trio[0].endpoint.proportion and low:
            out.append(
                f"No size is a point above chance in {quantity(trio[0].endpoint)} at {_and(low)} tokens: its gains there "
                "are noise, train longer."
            )
    return out


def _ceiling_sentence(runs: list[Run]) -> list[str]:
    """A warning where the largest size has learned nearly all that its corpus holds."""
    ceiling = recall_ceiling(runs)
    end = next((e for e in endpoints(runs) if e.key == ("knowledge", "universe", "recall")), None)
    if ceiling is None or end is None:
        return []
    table = cells(runs, end)
    cell = table.get((TRIO[-1], budgets(table.values())[-1]))
    if cell is None or cell.value < 0.95 * ceiling:
        return []
    return [
        f"{TRIO[-1].capitalize()} recalls {100 * cell.value:.1f}% of the universe at {cell.budget} tokens, where the "
        f"corpus itself stops at {100 * ceiling:.1f}%: facts that were filtered out cannot be known, so a weaker second "
        "step in knowledge is here a ceiling made by the data. In log-odds of the facts in the corpus it can look "
        "different; see the figure of gains."
    ]


def _behind(lag: Lag) -> bool:
    return round(lag.value, 3) > 0


def _above(value: float) -> str:
    return f"{abs(value):.3f} {'higher' if value > 0 else 'lower'}" if round(value, 3) else "equal"


def lag_sentences(runs: list[Run], only_behind: bool = False) -> list[str]:
    """How forks, whose rate has fallen, compare at equal tokens with their trunks, whose rate is still high."""
    out = []
    found = lags(runs)
    for end in dict.fromkeys(lag.endpoint for lag in found):
        here = [lag for lag in found if lag.endpoint == end and (_behind(lag) or not only_behind)]
        if here:
            parts = [f"{_above(x.value)} at {x.budget} (mean of {x.forks})" for x in here]
            behind = [x.budget for x in here if _behind(x)]
            meaning = behind and (
                f" At {_and(behind)} tokens the fork lags: its rate was falling while the trunk still learned at the full "
                "one, so that its score tells of an early decay as much as of few tokens."
            )
            out.append(
                f"The {quantity(end)} of a fork, whose learning rate has fallen to 0, compared with its trunk at equal "
                f"tokens, whose rate is still high, in {end.unit}: {', '.join(parts)}.{meaning or ''}"
            )
    return out


def seed_sentence(seeds: int, runs: Sequence[Run], known: bool = False) -> str:
    """What the intervals of comparisons cover; `known`: some are there."""
    if seeds == 1 and known:
        return (
            "One seed per size: a description, not a test. The intervals take how far seeds lie apart from other runs of "
            "these sizes and tokens (analysis/results/seed_sd.csv), and test items; where none were measured there is no "
            "interval. seeds=3 measures it here."
        )
    if seeds == 1:
        return (
            "One seed per size: a description, not a test. There is no interval, for the seeds of training, which move "
            "such numbers most, are not measured; seeds=3 measures them."
        )
    data = {run.data_fingerprint for run in runs}
    return (
        f"{seeds} seeds per size, paired: the 95% intervals cover seeds (Student's t over {seeds}) and test items, and are "
        f"not adjusted for their number{'; the data set is the same for all seeds' * (len(data) == 1)}."
    )


def _score_sentence(runs: list[Run], end: Endpoint) -> str:
    table = cells(runs, end)
    names = budgets(table.values())
    members = dict.fromkeys(c.member for c in sorted(table.values(), key=lambda c: c.size))
    if len(members) == 1:
        parts = [f"{_score(c, end)} at {c.budget} tokens" for c in sorted(table.values(), key=lambda c: c.tokens)]
        return f"{_capital(end)} of {next(iter(members))}: {', '.join(parts)}."
    here = sorted((c for c in table.values() if c.budget == names[-1]), key=lambda c: c.size)
    return f"{_capital(end)} at {names[-1]} tokens: {', '.join(f'{c.member} {_score(c, end)}' for c in here)}."


def _score(cell: Cell, end: Endpoint) -> str:
    factor, unit_, places = (100, "%", 1) if end.proportion else (1, f" {end.unit}", 3)
    return f"{factor * cell.value:.{places}f}{unit_}"


def _why_no_gains(runs: list[Run]) -> str:
    done = {r.member for r in runs if r.finals}
    lacking = [m for m in TRIO if m not in done]
    if lacking:
        return f"Gains per doubling need all three sizes; there is no evaluated run of {', '.join(lacking)}."
    return "Gains per doubling need the three sizes at one budget with a seed in common."
