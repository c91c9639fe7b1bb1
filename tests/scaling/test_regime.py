"""The rule of experiments/calibration.py on tables whose truth is known."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data.corpora import reasoning
from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.scaling import regime
from phi3_jax.scaling.regime import LOSS, RECALL, Block, Planned, Run, floor

SIZES = {"a": 50e3, "b": 100e3, "c": 200e3, "d": 400e3, "e": 800e3}
FILTERS = {f"f{n}": 1 / n for n in (16, 8, 4, 2, 1)}
HALVES = {f"f{2 ** (half / 2):.0f}": 2 ** (-half / 2) for half in range(14, 5, -1)}  # those of block B
SUM = (RECALL, LOSS)
RULE = dict(
    after_pilot={"margin of recall": 3.5, "margin of recall and reasoning": 3.5, "seeds of B": 8},
    utilities={"recall": (RECALL,), "recall and reasoning": SUM},
    admitted=(0.05, 0.95),
    smallest_slope=0.25,
    at_edge=2,
    reasoning_margin=0.05,
    controls=("held",),
)
Truth = Callable[[float, float], float]


def table(
    utility: Truth,
    seeds: int = 8,
    noise: float = 0.0,
    rng: int = 0,
    tokens: int = 4_000_000,
    filters: Mapping[str, float] = FILTERS,
) -> list[Run]:
    """Runs whose utility in points at (size, f) is given; a seed shifts all of its runs, and each has noise of its own.

    A filter keeps all of the universe's weight, so that it has no ceiling below 100 points.
    """
    draw, runs = np.random.default_rng(rng), []
    for seed in range(seeds):
        shift = draw.normal() * noise
        for member, size in SIZES.items():
            for arm, f in filters.items():
                points = utility(size, f) + shift + draw.normal() * noise
                scores = {RECALL: points / 100, LOSS: floor() * (1 - points / 100)}
                runs.append(Run(f"{arm}-{member}-s{seed}-{tokens}", arm, member, seed, tokens, f, 1.0, size, scores))
    return runs


def moving(slope: float, at: float = 0.25, bend: float = 6) -> Truth:
    """A best filter of `at` at the middle size, which grows as size^slope."""
    return lambda size, f: 60 - bend * (np.log2(f / at) - slope * np.log2(size / 200e3)) ** 2


def whole(runs: list[Run]) -> Block:
    return Block([planned(run) for run in runs], runs)


def planned(run: Run) -> Planned:
    return Planned(**{field.name: getattr(run, field.name) for field in dataclasses.fields(Planned)})


def slopes(slope: float, noise: float, tables: int) -> Counter[str]:
    """How often E1 says each word on the filters of block B."""
    made = (table(moving(slope, 2**-5), 6, noise, rng=i, filters=HALVES) for i in range(tables))
    return Counter(regime.of_slope(one, SUM, RULE).word for one in made)


def regrets(truth: Truth, noise: float, tables: int, seeds: int = 6) -> Counter[str]:
    """The same of E2."""
    made = (table(truth, seeds, noise, rng=i) for i in range(tables))
    return Counter(regime.of_regret(one, SUM, 3.5, RULE).word for one in made)


def test_the_slope_of_a_best_filter_inside_the_grid_is_found() -> None:
    for slope in (0.4, 0.0, -0.3):
        e, stars, at_edge = regime.slope(table(moving(slope)), SUM)
        assert e.value == pytest.approx(slope, abs=1e-9) and at_edge == 0
        assert 2 ** stars[2] == pytest.approx(0.25)
    assert regime.of_slope(table(moving(0.4), noise=0.5), SUM, RULE).word == "rises"
    assert regime.of_slope(table(moving(0.15), noise=0.1), SUM, RULE).word == "rises, little"
    assert regime.of_slope(table(moving(0.0), noise=0.3), SUM, RULE).word == "does not"


def test_false_words_are_rare_and_noise_determines_nothing() -> None:
    flat, steep = slopes(0.0, 4, 60), slopes(0.5, 4, 60)
    assert flat["rises"] + flat["rises, little"] <= 5 and steep["does not"] <= 1  # two or three are expected at most
    assert flat["does not"] > 20 and steep["rises"] > 50  # positive control
    assert slopes(0.25, 15, 30)["not determined"] > 20


def test_sizes_at_the_end_of_the_grid_are_left_out_and_two_of_them_determine_nothing() -> None:
    """A size at an end would be counted as data without noise, and flatten the slope."""
    verdict = regime.of_slope(table(moving(1.0), noise=0.1), SUM, RULE)
    assert verdict.word == "not determined" and "2 at an end" in verdict.sentence
    one = table(moving(0.9, at=0.35), noise=0.1)  # the largest size's lies beyond the grid
    e, stars, at_edge = regime.slope(one, SUM)
    assert at_edge == 1 and regime.of_slope(one, SUM, RULE).word == "rises"
    assert np.polyfit(np.log2([*SIZES.values()]), stars, 1)[0] < 0.86 < e.value == pytest.approx(0.9, abs=0.03)


def test_intervals_of_the_slope_cover_the_truth() -> None:
    inside = []
    for rng in range(100):
        e = regime.slope(table(moving(0.2), noise=1.5, rng=rng), SUM)[0]
        inside.append(e.low <= 0.2 <= e.high)
    assert 0.9 <= np.mean(inside) <= 0.99


PEAKS = dict(zip(SIZES.values(), (2, 2, 2, 3, 3), strict=True))  # places on the grid
WORSE: Truth = lambda size, f: 60 - 5 * (np.log2(16 * f) - PEAKS[size]) ** 2  # noqa: E731  # of 5 points


def test_regret_is_what_the_smallest_sizes_filter_costs_the_largest() -> None:
    found = regime.regret(table(WORSE), SUM)
    assert found.estimate.value == pytest.approx(5.0) and not found.same and not found.at_edge
    noisy = regime.of_regret(table(WORSE, noise=1), SUM, 3.5, RULE)
    assert noisy.word == "rises" and noisy.estimate.low > 0


def test_a_noisy_study_does_not_say_that_a_regret_is_none() -> None:
    """Where both sizes choose one filter by chance the interval had no width, and the larger the noise the more often."""
    for noise in (2, 5, 10):
        assert regrets(WORSE, noise, 60)["does not"] <= 2
    assert regrets(WORSE, 1, 20)["rises"] >= 18 and regrets(moving(0.0), 1, 20)["does not"] >= 18  # positive controls


def test_no_interval_of_a_regret_has_no_width() -> None:
    """One filter for both in every half: what the best other filter would gain stands in, which is below 0."""
    found = regime.regret(table(moving(0.0), noise=0.5), SUM)
    assert found.same and found.estimate.low < found.estimate.value < found.estimate.high < 0
    assert found.estimate.value == pytest.approx(-6, abs=0.7)  # one octave from the vertex


def test_equal_filters_have_no_regret_whatever_the_noise() -> None:
    """Choosing and scoring on the same seeds would make one out of noise; halves do not."""
    for noise in (3, 8):
        assert regrets(moving(0.0), noise, 100)["rises"] <= 6  # 2.5 are expected at most
    made = [regime.regret(table(lambda size, f: 50.0, noise=3, rng=rng), SUM) for rng in range(100)]
    values = [found.estimate.value for found in made if not found.same]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_a_best_filter_at_the_end_of_the_grid_bars_does_not() -> None:
    """Of a grid that lies beyond every optimum all sizes choose the same end, whatever they lose there."""
    verdict = regime.of_regret(table(moving(0.2, at=1 / 64, bend=1), noise=0.2), SUM, 3.5, RULE)
    assert verdict.word == "not determined" and "at an end of the grid" in verdict.sentence


def test_the_longest_horizon_decides() -> None:
    """The largest wants everything once there are tokens enough: the regret comes with the horizon."""
    runs = [
        run
        for tokens, slope in ((1, 0.0), (4, 0.0), (16, 0.5))
        for run in table(moving(slope), 4, 0.3, rng=tokens, tokens=tokens * 1_000_000)
    ]
    verdict = regime.of_horizons(whole(runs), SUM, 3.5, RULE)
    assert verdict.word == "rises" and "at 1,000,000 tokens, " in verdict.sentence
    short = regime.of_horizons(whole([run for run in runs if run.tokens < 16e6]), SUM, 3.5, RULE)
    assert short.word == "does not"
    block = Block(whole(runs).planned, [run for run in runs if run.tokens < 16e6])
    with pytest.raises(UserError, match="0 of 4 seeds have every planned run"):
        regime.of_horizons(block, SUM, 3.5, RULE)  # the longest that ran is not the longest that was planned


def test_an_equal_share_of_the_loss_is_no_difference_between_sizes() -> None:
    """Differences of nats are larger where the loss is, so that in nats the smallest size would pay most."""

    def losses(larger: float) -> list[Run]:
        draw, made = np.random.default_rng(1), []
        for run in table(lambda size, f: 50.0):
            grown = np.log2(16 * run.f) * (0.03 + (larger if run.size == 800e3 else 0))
            nats = 0.4 * (run.size / 50e3) ** -0.3 * np.exp(grown + 0.01 * draw.normal())
            made.append(dataclasses.replace(run, scores=run.scores | {LOSS: nats}))
        return made

    assert regime.of_reasoning(losses(0), "f16", "f1", RULE).word == "does not"
    worse = regime.of_reasoning(losses(0.05), "f16", "f1", RULE)
    assert worse.word == "rises" and worse.estimate.value == pytest.approx(0.2, abs=0.02)
    deep = [dataclasses.replace(r, scores=dict(r.scores) | {regime.DEEP: r.f * (r.size > 4e5)}) for r in losses(0)]
    assert "right to 6.2 % in f16 and 100.0 % in f1." in regime.of_reasoning(deep, "f16", "f1", RULE).sentence


def test_an_endpoint_is_judged_by_the_ceilings_of_the_filters_that_decide() -> None:
    def saturated(share: float) -> list[Run]:
        """Every filter recalls this share of what it keeps, and keeps more the larger it is."""
        return [
            dataclasses.replace(run, kept=kept, scores={RECALL: share * kept, LOSS: 0.3})
            for run in table(lambda size, f: 50.0, seeds=2)
            for kept in [0.2 + 0.16 * np.log2(16 * run.f)]
        ]

    with pytest.raises(
        UserError, match=f"endpoint '{RECALL}', which is not admitted: .* lies at 100, 100 % of its range"
    ):
        regime.check_admitted(saturated(1.0), [RECALL], RULE["admitted"])
    regime.check_admitted(saturated(0.9), [RECALL], RULE["admitted"])
    with pytest.raises(UserError, match="not admitted"):
        regime.check_admitted(saturated(0.03), [RECALL], RULE["admitted"])
    # Most arms at the floor do not hide those that decide.
    peaked = table(lambda size, f: 60.0 if f == 1 / 4 else 0.5, seeds=2)
    regime.check_admitted(peaked, [RECALL], RULE["admitted"])
    # A loss that two steps without depth reach is no reasoning, though it is far below that of one step's operator.
    shallow = reasoning.depthless_policies()
    assert floor() == shallow["compose_2"].nll < 0.55 < shallow["last_step"].nll
    poor = [dataclasses.replace(run, scores=run.scores | {LOSS: 0.55}) for run in saturated(0.9)]
    with pytest.raises(UserError, match=f"endpoint '{LOSS}', which is not admitted"):
        regime.check_admitted(poor, SUM, RULE["admitted"])
    for names, why in ((("reasoning/all/nl",), "no floor here; did you mean"), (("a/b",), "no floor here")):
        with pytest.raises(UserError, match=why):
            regime.check_admitted(peaked, names, RULE["admitted"])


def test_words_that_rise_by_chance_are_held_together() -> None:
    def verdict(name: str, t: float) -> regime.Verdict:
        e = regime.Estimate(t, 1.0, t - 2.36, t + 2.36, 8)
        return regime.Verdict(name, "rises" if e.low > 0 else "not determined", e, "")

    words = lambda *ts: [v.word for v in regime.holm([verdict(str(i), t) for i, t in enumerate(ts)])]  # noqa: E731
    assert words(2.5, 0, 0) == ["not determined"] * 3  # p = .041 of three
    assert words(2.5, 5, 5) == ["rises"] * 3  # the last of three steps
    assert words(5.0, -9, 2.5) == ["rises", "not determined", "not determined"]  # p = .041 at the second step


def blocks(truth: Truth, noise: float = 0.3) -> dict[str, Block]:
    main = table(truth, noise=noise)
    held = [dataclasses.replace(r, name=f"held-{r.name}", arm="held") for r in main if r.arm == "f16"]
    rates = [dataclasses.replace(r, arm=f"{r.arm}_{rate}") for r in main if r.seed == 0 for rate in ("half", "same")]
    return {"pilot": whole(main), "B": whole(main + held), "C": whole(main), "D": whole(rates)}


def test_nothing_is_decided_before_the_pilot_has_fixed_the_margins() -> None:
    waiting = RULE | {"after_pilot": {"margin of recall": 1.0, "seeds of B": None}}
    (verdict,) = regime.decide(blocks(moving(0.4)), waiting)
    assert verdict.word == "not decided" and "waits for the pilot, which fixes: seeds of B." in verdict.sentence
    assert "points of recall that seeds see: " in verdict.sentence


def test_what_the_pilot_lets_seeds_see_follows_its_noise() -> None:
    """Two cells differ with an SD of sqrt(2) of a cell's; the shift of a seed is in both."""
    found = [regime.seen(table(lambda size, f: 50.0, 8, 2, rng=i), (RECALL,), 8, (0.05, 0.95)) for i in range(20)]
    assert np.mean(found) == pytest.approx(
        (2.365 + 0.896) * 2 * np.sqrt(2) / np.sqrt(8), rel=0.35
    )  # the largest of five
    with pytest.raises(UserError, match="in transition"):
        regime.seen(table(lambda size, f: 99.0), (RECALL,), 8, (0.05, 0.95))


def test_each_utility_is_decided_in_its_own_line_and_controls_take_no_part() -> None:
    made = blocks(moving(0.4))
    found = {v.estimand: v for v in regime.decide(made, RULE)}
    assert [*found] == [f"{e}, {line}" for line in RULE["utilities"] for e in ("E1", "E2", "E3")] + [
        "E4", "E4, reasoning tokens held",
    ]  # fmt: skip
    assert found["E1, recall"].word == found["E2, recall"].word == "rises"
    flat = [dataclasses.replace(r, scores=r.scores | {LOSS: 0.55}) for r in made["B"].runs]
    found = {v.estimand: v for v in regime.decide(made | {"B": Block(made["B"].planned, flat)}, RULE)}
    assert found["E1, recall"].word == "rises" and "not admitted" in found["E1, recall and reasoning"].sentence


def test_what_did_not_run_takes_no_other_verdict_away() -> None:
    made = blocks(moving(0.4))
    for name in made:
        found = {v.estimand: v for v in regime.decide(made | {name: Block(made[name].planned)}, RULE)}
        assert len(found) == 8
        assert (found["E1, recall"].word == "rises") == (name != "B")
        assert (found["E3, recall"].word == "rises") == (name != "C")
    half = Block(made["B"].planned, [run for run in made["B"].runs if run.seed or run.arm != "f4"])
    e1 = regime.decide(made | {"B": half}, RULE)[0]
    assert "(7 seeds)" in e1.sentence and "Not final: 5 runs miss." in e1.sentence


def test_a_best_filter_that_hangs_on_the_learning_rate_is_said() -> None:
    made = blocks(moving(0.4))
    assert "learning rate" not in regime.decide(made, RULE)[0].sentence
    other = [
        dataclasses.replace(r, scores=dict(r.scores) | {RECALL: 0.99}) if r.arm == "f16_half" and r.member == "a" else r
        for r in made["D"].runs
    ]
    assert "the better filter of a differs" in regime.of_rates(Block(made["D"].planned, other), (RECALL,))
    assert "has not run" in regime.of_rates(Block(made["D"].planned), (RECALL,))
    lost = next(run for run in other if run.arm == "f4_same" and run.member == "e")
    said = regime.of_rates(Block(made["D"].planned, [run for run in other if run is not lost]), (RECALL,))
    assert f"{lost.name} did not run to the end" in said and "the better filter of a differs" in said


def test_rows_that_the_plan_does_not_have_are_refused(tmp_path: Path) -> None:
    row = dict(arm="f1", member="a", seed=1, non_embedding=5e4, budget=999_500, steps=1000, build="b1", dirty=False)
    row |= {"scorer": 2, RECALL: 0.5, LOSS: 0.3}
    plan = [
        Planned("f1-a-s1-1M", "f1", "a", 1, 1_000_000, 1.0, 1.0),
        Planned("f1-a-s2-1M", "f1", "a", 2, 1_000_000, 1.0, 1.0),
    ]
    path = tmp_path / "B.csv"

    def refused(*rows: dict) -> str:
        tables.write(path, list(row), rows)
        with pytest.raises(UserError) as error:
            regime.read(path, plan)
        assert "\n" not in str(error.value)
        return str(error.value)

    other = row | {"seed": 2}
    assert "mixes runs of 2 builds (b1, b2)" in refused(row, other | {"build": "b2"})
    assert "mixes runs of 2 scorer versions (1, 2)" in refused(row, other | {"scorer": 1})
    assert "scores of scorer 1, whose recall is teacher-forced" in refused(row | {"scorer": 1})
    assert "f2 of a with seed 1 and budget 999500 is no run of the plan" in refused(row | {"arm": "f2"})
    assert "line 3: f1 of a with seed 3" in refused(row, row | {"seed": 3})
    assert "budget 400000 is no run of the plan" in refused(row | {"budget": 400_000, "steps": 400})
    assert "f1-a-s1-1M is there twice" in refused(row, row)
    assert "uncommitted changes" in refused(row, other | {"dirty": True})
    tables.write(path, list(row), [row, other])
    run, _ = regime.read(path, plan)
    assert (run.f, run.seed, run.score(RECALL), run.score(LOSS)) == (1.0, 1, 50.0, 100 * (1 - 0.3 / floor()))
