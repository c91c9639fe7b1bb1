"""The rule of experiments/curated.py: its plan, and each of its words from runs that earn it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.__main__ import main
from phi3_jax.data.corpora import factbook
from phi3_jax.experiment import load_config
from phi3_jax.records import tables
from phi3_jax.reporting import arms
from phi3_jax.scaling import causal, curated, regime
from phi3_jax.scaling.regime import LOSS, RECALL
from phi3_jax.study.asked import asked_runs

FILE = str(Path(__file__).parents[2] / "experiments" / "curated.py")
SIZES = {"mini": 119_808, "small": 212_992, "medium": 479_232}
SMALLEST = SIZES["mini"]
Truth = Callable[[float, float], float]  # (doublings above the smallest size, threshold) -> composite in points


def at(*best: float) -> Truth:
    """The composite falls off on both sides of a best threshold for each size."""
    places = dict(zip(np.log2(np.array(list(SIZES.values())) / SMALLEST).round(6), best, strict=True))
    return lambda doublings, f: 40 - 60 * (f - places[round(doublings, 6)]) ** 2


RISES, ALIKE, FALLS = at(0.25, 0.5, 0.75), at(0.5, 0.5, 0.5), at(0.75, 0.5, 0.25)


def write(
    folder: Path,
    truth: Truth,
    noise: float = 0.3,
    seeds: int = 3,
    random: float = 0.0,
    shuffled: float = 0.0,
    words: str = "standard",
) -> Path:
    """A folder of all planned runs of the first seeds.

    Recall lies 5 points above a run's composite, arithmetic as much below; `random` is what random countries are worse by,
    `shuffled` what the loss of the largest is lower by, as a logarithm.
    """
    config, rng, records = load_config(f"{FILE}:{words}").to_dict(), np.random.default_rng(0), []
    for run in curated.planned(config):
        if run.seed >= config["seed"] + seeds:
            continue
        doublings = np.log2(SIZES[run.member] / SMALLEST)
        points = truth(doublings, 1.0 if run.arm == "shuffled" else run.f) + noise * rng.normal()
        points -= random if run.arm.startswith("random") else 0
        loss = (1 - (points - 5) / 100) * regime.floor()
        loss *= np.exp(-shuffled * (run.arm == "shuffled" and run.member == "medium"))
        one = dict(arm=run.arm, member=run.member, non_embedding=SIZES[run.member], seed=run.seed, status="finished")
        recall = (points + 5) / 100 if run.arm != "shuffled" else 0.03
        records.append(one | {RECALL: recall, LOSS: loss, "reasoning/row/exact": 0.1})
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "runs.csv", list(records[0]), records)
    (folder / "study.json").write_text(json.dumps({"design": {"config": config}}, default=list))
    return folder


def words(folder: Path) -> dict[str, str]:
    """{estimand, or Verdict: its word}."""
    said = (line.partition(": ") for line in curated.lines_of(folder) if line.startswith(("E", "Verdict")))
    return {name: rest.partition(" (")[0] for name, _, rest in said}


def test_the_plan_counts_what_the_file_says() -> None:
    plan = asked_runs(load_config(f"{FILE}:standard"), "pico")
    assert len(plan) == 69 == len(curated.planned(load_config(f"{FILE}:standard").to_dict()))
    assert len([run for run in plan if run.arm.startswith("keep")]) == 5 * 3 * 3
    assert {run.size for run in plan if not run.arm.startswith("keep")} == {"mini", "medium"}
    assert {run.budget for run in plan} == {5_000_000} and {run.seed for run in plan} == {600, 601, 602}
    quick = asked_runs(load_config(FILE), "pico")
    assert len(quick) == 6 and {run.seed for run in quick} == {500}
    some = asked_runs(load_config(f"{FILE}:standard,arms=keep25+keep100,seeds=1,tokens=200k"), "pico")
    assert len(some) == 6 and {run.budget for run in some} == {200_000}


@pytest.mark.parametrize("argument", ["standrd", "arms=keep33", "token=1M", "tokens=none", "seeds=0"])
def test_wrong_words_are_one_line(argument: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(f"{FILE}:{argument}")
    assert "\n" not in str(error.value)


def test_thresholds_have_the_ceiling_that_they_allow() -> None:
    assert curated.floor() == pytest.approx(0.0329, abs=1e-4)
    for seed, (share, kept) in itertools.product((600, 601), ((25, "25"), (50, "random50"), (100, "100"))):
        f, ceiling = curated.threshold(f"factbook:{kept}", seed)
        assert f == share / 100 <= ceiling + 0.005 and ceiling <= f + 0.03
    assert curated.threshold("factbook:shuffled", 0) == (0.0, curated.floor())
    book = factbook.shipped()
    known = book.kept(0.5, 601) | book.usual
    assert curated.threshold("factbook:random50", 601)[1] == pytest.approx(book.bits[known].sum() / book.bits.sum())


@pytest.mark.parametrize(
    ("truth", "noise", "trend", "regret", "verdict"),
    [
        (RISES, 0.3, "rises", "rises", "the best threshold rises with size"),
        (ALIKE, 0.3, "not determined", "does not", "the best threshold does not rise with size"),
        (FALLS, 0.3, "not determined", "does not", "the best threshold does not rise with size"),
        (ALIKE, 12.0, "not determined", "not determined", "the best threshold is not determined"),
        # All facts suit every size: the grid ends there.
        (at(1, 1, 1), 0.3, "not determined", "not determined", "the best threshold is not determined"),
    ],
)
def test_each_word_from_runs_that_earn_it(
    truth: Truth, noise: float, trend: str, regret: str, verdict: str, tmp_path: Path
) -> None:
    found = words(write(tmp_path, truth, noise))
    assert found["E1, recall and reasoning"] == trend and found["E2, recall and reasoning"] == regret
    assert found["Verdict"] == verdict


def test_the_table_shows_what_the_composite_is_made_of(tmp_path: Path) -> None:
    said = curated.lines_of(write(tmp_path, RISES, noise=0))
    table = [line for line in said if line.startswith(("keep", "random", "shuffled"))]
    assert [line.split()[0] for line in table[::3][:5]] == ["keep0", "keep25", "keep50", "keep75", "keep100"]
    assert len(table) == 5 * 3 + 4 * 2
    best = next(line for line in table if line.startswith("keep25 mini")).split()
    assert best[2:] == ["3", "40.0", "45.0", "27.0", "35.0", "10.0"]


def test_noise_does_not_make_a_rise(tmp_path: Path) -> None:
    """One threshold for all sizes, 60 studies: by chance few rise (the test of the trend alone is exact at 5 %)."""
    config = load_config(f"{FILE}:standard,arms=keep0+keep25+keep50+keep75+keep100").to_dict()
    draw, rule = np.random.default_rng(1), config["curated"]
    rises = {"E1": 0, "E2": 0}
    for _ in range(60):
        runs = []
        for p in curated.planned(config):
            points = ALIKE(0, p.f) + 4 * draw.normal()
            scores = {RECALL: points / 100, LOSS: (1 - points / 100) * regime.floor()}
            runs.append(regime.Run(**vars(p), size=SIZES[p.member], scores=scores))
        block = regime.Block(curated.planned(config), runs)
        for verdict in (
            curated.of_trend((RECALL, LOSS), rule, block, "E1"), curated.of_regret((RECALL, LOSS), rule, block, "E2"),
        ):  # fmt: skip
            rises[verdict.estimand[:2]] += verdict.word == "rises"
    assert rises["E1"] <= 8 and rises["E2"] <= 5  # 3 and 1.5 are expected at most


def test_the_trend_is_exact() -> None:
    perfect = np.array([[0.0, 0, 0], [0.25, 0.25, 0.5], [0.5, 0.75, 0.75], [1, 1, 1]])
    assert curated.ordered(perfect) == pytest.approx(24.0**-3)
    assert curated.ordered(perfect[::-1]) == pytest.approx(1) and curated.ordered(np.ones((4, 3))) == 1
    one = np.array([[0.5, 0.25], [0.25, 0.5], [1.0, 1.0]])  # by hand: all 36 pairs of orders
    places = np.arange(3)
    sums = [places @ a + places @ b for a, b in itertools.product(*map(itertools.permutations, one.T))]
    assert curated.ordered(one) == pytest.approx(np.mean(np.array(sums) >= (places @ one).sum() - 1e-9))


def test_controls_have_words_of_their_own(tmp_path: Path) -> None:
    found = words(write(tmp_path / "a", RISES, shuffled=0.3))
    assert (found["E3"], found["E4"]) == ("rises", "rises")
    assert "it is the amount of facts, whatever the filter's order" in curated.lines_of(tmp_path / "a")[-1]
    found = words(write(tmp_path / "b", RISES, random=30))  # random countries are worth less than none or all
    assert (found["E3"], found["E4"]) == ("not determined", "does not")
    assert "amount of facts" not in curated.lines_of(tmp_path / "b")[-1]


def test_a_rise_needs_sizes_that_learn_facts_and_does_not_hang_on_weights(tmp_path: Path) -> None:
    floor = write(tmp_path / "floor", RISES)
    lines = [row | ({RECALL: 0.03} if row["member"] == "mini" else {}) for row in tables.read(floor / "runs.csv")]
    tables.write(floor / "runs.csv", list(lines[0]), lines)
    said = "".join(curated.lines_of(floor))
    assert "mini learns no facts in any arm" in said and words(floor)["E2, recall and reasoning"] == "not determined"
    none = write(tmp_path / "none", at(0, 0.5, 0.75))
    assert words(none)["E2, recall and reasoning"] == "not determined"
    assert "does best without any facts" in "".join(curated.lines_of(none))
    weights = write(tmp_path / "weights", ALIKE, noise=0.1)
    lines = []
    for row in tables.read(weights / "runs.csv"):
        f, size = curated.threshold(load_config(f"{FILE}:standard").arms[row["arm"]].data, 600)[0], row["member"]
        best = 0.75 if size == "medium" else 0.25  # by arithmetic alone; recall says the opposite, less so
        loss = (0.6 + 2 * (f - best) ** 2) * regime.floor()
        recall = 0.4 - 0.6 * (f - (1 - best)) ** 2 if row["arm"] != "shuffled" else 0.03
        noise = 1e-3 * int(row["seed"][-1])
        lines.append(row | {LOSS: loss + noise, RECALL: recall})
    tables.write(weights / "runs.csv", list(lines[0]), lines)
    assert "on one endpoint it does not rise" in "".join(curated.lines_of(weights))


def test_arithmetic_below_its_floor_counts_as_none() -> None:
    plan = curated.planned(load_config(f"{FILE}:standard").to_dict())[0]
    for loss, points in ((1.5, 0), (0.5, 50)):
        run = regime.Run(**vars(plan), size=1.0, scores={LOSS: loss * regime.floor(), RECALL: 0.1})
        assert curated.clipped(run).score(LOSS) == pytest.approx(points)


def test_what_does_not_suffice_determines_nothing(tmp_path: Path) -> None:
    said = curated.lines_of(write(tmp_path / "one", RISES, seeds=1))
    assert said[0] == "23 of 69 planned runs ran." and "keep0-mini-s601" in said[1]
    assert said[-2:] == ["The rule is silent until every planned run has finished.", "Verdict: none."]
    low = write(tmp_path / "low", lambda doublings, f: RISES(doublings, f) / 20)
    assert "is not admitted" in "".join(curated.lines_of(low)) or "learns no facts" in "".join(curated.lines_of(low))
    for other in ("tokens=200k", "arms=keep25+keep100", "seed=1", "seeds=6", "data=books"):
        folder = write(tmp_path / other, RISES, words=f"standard,{other}", seeds=6)
        assert curated.lines_of(folder)[-1] == "Verdict: none."
        assert any(line.startswith("Another design than the rule's (") for line in curated.lines_of(folder))
    assert curated.lines_of(write(tmp_path / "quick", RISES, words="quick"))[-1] == "Verdict: none."


def test_the_report_draws_it(tmp_path: Path) -> None:
    rows, config = causal.with_rule(write(tmp_path / "study", RISES), "curated", FILE)
    drawn = {figure.name: figure for figure in arms.draw(tmp_path, rows, config, None, "made")}
    svg = drawn["thresholds"].svg.read_text()
    assert all(f"<!-- {label} -->" in svg for label in (*SIZES, "mini, random", "medium, random"))
    assert "<!-- small, random -->" not in svg


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", FILE, str(write(tmp_path / "study", RISES))]) == 0
    assert (
        "Verdict: the best threshold rises with size (E2, recall and reasoning; real facts beside"
        in capsys.readouterr().out
    )
    assert main(["verdict", FILE, str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
