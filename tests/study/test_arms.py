"""A study with arms is a list of plain studies: data, budgets and names follow from absolute counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import experiment
from phi3_jax.configs import fingerprint
from phi3_jax.data.corpora import facts
from phi3_jax.errors import UserError
from phi3_jax.experiment import Arm, arms_config, arms_of
from phi3_jax.family import proxy
from phi3_jax.study.arms import Part, parts
from phi3_jax.study.asked import asked_runs, resolve_runs
from phi3_jax.study.data import data_arguments
from phi3_jax.study.runs import budgets_of, groups, plan_study

FILE = str(Path(__file__).parents[2] / "experiments" / "data_optimal.py")
MANIFEST = {"window": 24, "vocab": 320, "kind": "facts", "fingerprint": "0" * 64}


def config(words: str = "full") -> Any:
    return experiment.load_config(f"{FILE}:{words}")


def data_of(arm: Part) -> dict[str, Any]:
    return data_arguments(arm.config, "pico", max(budgets_of(arm.config, "pico", arm.config.sizes[0])))


def test_every_kept_fact_is_seen_equally_often_in_the_arms_that_say_so() -> None:
    seen = {}
    for arm in parts(config(), "pico"):
        data, (budget, *_) = data_of(arm), arm.config.budgets
        if data["facts"] and arm.arm != "published":
            seen[arm.arm] = data["share"] * budget / 8 / data["facts"]
    assert seen.pop("repeated") == pytest.approx(55.6, abs=0.1)
    assert len(seen) > 10 and all(value == pytest.approx(27.8, abs=0.1) for value in seen.values())


def test_each_seed_has_its_own_universe_and_arms_of_one_corpus_share_it() -> None:
    made = parts(config(), "pico")
    loose = [a for a in made if a.arm == "loose"]
    assert [data_of(a)["seed"] for a in loose] == [10, 11, 12, 13, 14] and len({a.data for a in loose}) == 5
    places = {a.arm: a.data for a in made if a.config.seed == 10}
    shared = ("filtered", "lr_half", "lr_double", "published", "off_recipe", "width_filtered")
    assert len({places[name] for name in shared}) == 1
    assert (
        len({places[name] for name in ("filtered", "loose", "repeated", "dropped", "to_text", "bits1", "bits4")}) == 7
    )
    # One place, one request: no two arms may ask for different data there.
    for place in set(places.values()):
        requests = [data_of(a) for a in made if a.data == place and a.arm != "published"]
        assert all(r == requests[0] for r in requests)


def test_planned_runs_are_the_asked_ones_and_differ_where_the_arms_do() -> None:
    made = config("full,seeds=2")
    manifests = {arm.data: MANIFEST | {"fingerprint": str(arm.data)} for arm in parts(made, "pico")}
    runs = plan_study(made, "pico", manifests, Path("s"), 1)
    asked = asked_runs(made, "pico")
    assert {run.name for run in runs} == set(resolve_runs(asked, runs)) == {ask.name for ask in asked}
    by_name = {run.name: run for run in runs}
    assert by_name["published-mini-s10-2.75M"].steps == (2_750_000 // 1056)
    assert by_name["lr_half-mini-s10-4M"].optim.peak_lr == 1.5e-3 != by_name["filtered-mini-s10-4M"].optim.peak_lr
    assert by_name["off_recipe-small-s10-4M"].model.kv_heads == 1
    assert by_name["width_loose-above-s11-4M"].model == proxy("above", "pico", "width", vocab=320)
    assert [g[0].seed for g in groups(runs)] == sorted(run.seed for run in runs)


def test_the_width_ladder_changes_width_alone() -> None:
    models = [proxy(s, "pico", "width") for s in ("below", "mini", "small", "small-medium", "medium", "above")]
    assert [m.embed for m in models] == [32, 48, 64, 80, 96, 112]
    assert {(m.layers, m.head_dim, m.mlp / m.embed, m.heads * m.head_dim / m.embed) for m in models} == {(4, 16, 3, 1)}
    with pytest.raises(UserError, match="width ladder"):
        proxy("mini-small", "pico", "width")


def test_counts_scale_together_and_bad_arms_are_named() -> None:
    small, whole = (parts(config(words), "pico")[0] for words in ("quick,tokens=400k", "quick"))
    assert (
        data_of(small)["facts"] * 10 == data_of(whole)["facts"] and data_of(small)["share"] == data_of(whole)["share"]
    )
    assert [a.arm for a in parts(config("full,arms=loose,seeds=1"), "pico")] == ["loose"]
    with pytest.raises(UserError, match="unknown arm 'lose'.*loose"):
        config("quick,arms=lose")


def test_a_plain_study_is_its_own_single_arm() -> None:
    plain = experiment.load_config(str(Path(FILE).with_name("scaling.py")))
    (arm,) = parts(plain, "pico")
    assert arm.arm == "" and arm.config is plain and arm.data == Path("data")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(budgts=dict(mini=1000)), "unknown key arm.budgts; did you mean 'budgets'"),
        (dict(reasonin=5), "unknown key arm.reasonin; did you mean 'reasoning'"),
        (dict(sizes=("mini", "smal")), "arm.sizes=mini,smal: 'smal' is unknown; did you mean 'small'"),
        (dict(budgets=dict(mni=1000)), "arm.budgets.mni is unknown; did you mean 'mini'"),
        (dict(peak_lr=-1.0), "arm.peak_lr=-1.0 must be a number"), (dict(knowledge=0), "arm has no tokens"),
    ],
)  # fmt: skip
def test_a_misspelt_key_of_an_arm_names_the_nearest(given: dict[str, Any], said: str) -> None:
    whole = dict(facts=10, knowledge=100) | given
    with pytest.raises(UserError, match=said):
        Arm(**whole)
    good = Arm(facts=10, knowledge=100)
    with pytest.raises(UserError, match=said):
        dataclasses.replace(good, **given)


def test_a_file_with_a_misspelt_arm_is_refused_with_its_place(tmp_path: Path) -> None:
    text = Path(FILE).read_text()
    (tmp_path / "mine.py").write_text(text.replace("Arm(facts=3000,", "Arm(fact=3000,"))
    with pytest.raises(UserError, match="unknown key arm.fact; did you mean 'facts'"):
        experiment.load_config(f"{tmp_path / 'mine.py'}:full")
    plain = "config.arms = ConfigDict({'a': dict(facts=3, knowledge=5, budgts=7)})\n    return config\n"
    head = text[: text.index("    config.arms =")]
    (tmp_path / "plain.py").write_text(f"{head}    {plain}")
    with pytest.raises(UserError, match="unknown key .*config.arms.a.budgts; did you mean 'budgets'"):
        experiment.load_config(str(tmp_path / "plain.py"))


def test_arms_come_back_from_a_config_and_its_json_as_they_went_in() -> None:
    made = config()
    arms = arms_of(made)
    assert arms_config(arms).to_dict() == made.arms.to_dict()
    assert arms_of(json.loads(json.dumps(made.to_dict(), default=list))) == {
        name: dataclasses.replace(arm, sizes=list(arm.sizes) if arm.sizes else None) for name, arm in arms.items()
    }
    assert arms["published"].budgets == {"mini": 2_750_000} and arms["lr_half"].peak_lr == 1.5e-3
    with pytest.raises(dataclasses.FrozenInstanceError):
        arms["loose"].facts = 1


def test_arms_that_weigh_a_fact_differently_are_refused_unless_the_study_says_so() -> None:
    """Half the share of a domain is twice the weight of its targets, by domain; by token the weight never moves."""
    filtered, loose = (Arm(facts=f, knowledge=k, reasoning=4e6 - k) for f, k in ((4500, 1e6), (9000, 2e6)))
    assert filtered.fact_weight("domain") == 2 * loose.fact_weight("domain")
    assert filtered.fact_weight("token") == loose.fact_weight("token")
    made = config("quick")
    assert made.train.weighting == "domain" and len(parts(made, "pico")) == 2
    made.train.weighting = ""
    with pytest.raises(
        UserError, match="a fact weighs 2.00 times as much in the loss of arm filtered as in that of loose"
    ):
        parts(made, "pico")
    made.arms = arms_config({name: dataclasses.replace(a, weighting="domain") for name, a in arms_of(made).items()})
    assert len(parts(made, "pico")) == 2  # each arm says so
    made.arms = arms_config(dict(a=filtered, b=dataclasses.replace(filtered, peak_lr=1e-3)))
    assert len(parts(made, "pico")) == 2  # nothing to say: they weigh alike


def test_weighting_is_a_runs_own_and_leaves_runs_by_domain_as_they_were() -> None:
    manifest = MANIFEST | {"loss": "domain_mean"}

    def prints(weighting: str) -> list[str]:
        made = config("quick,arms=loose")
        made.train.weighting = weighting
        data = {part.data: manifest for part in parts(made, "pico")}
        return [fingerprint(run) for run in plan_study(made, "pico", data, Path("s"), 1)]

    assert prints("") == prints("domain") != prints("token")
    assert config("quick,weighting=token").train.weighting == "token"
    manifest["loss"] = "preference"
    with pytest.raises(UserError, match="train.weighting=token says nothing of preference pairs"):
        prints("token")


CALIBRATION = FILE.replace("data_optimal", "calibration")


@pytest.mark.parametrize(("block", "count"), [("A", 60), ("pilot", 32), ("B", 388), ("C", 216), ("D", 12)])
def test_the_blocks_of_the_study_have_the_runs_that_were_announced(block: str, count: int) -> None:
    made = experiment.load_config(f"{CALIBRATION}:{block}")
    asked = asked_runs(made, made.scale)
    assert len({run.name for run in asked}) == len(asked) == count
    weights = {arm.fact_weight(arm.weighting or made.train.weighting) for arm in arms_of(made).values()}
    assert weights == ({1.0, 2.0} if block == "A" else {1.0})  # the second weighting of A is said by name


def test_a_filter_frees_tokens_and_leaves_the_visits_of_the_kept_facts() -> None:
    """Of every block in the universe of persons by rank; C's horizons have 1, 4 and 16 times the visits."""
    visits: dict[float, int] = {}
    for block in ("pilot", "B", "C", "D"):
        made = experiment.load_config(f"{CALIBRATION}:{block}")
        assert made.universe * 48 == pytest.approx(4 * 2 * proxy("medium", "pico", "width").matrix_params, rel=1e-4)
        for name, arm in arms_of(made).items():
            data = data_of(next(part for part in parts(made, made.scale) if part.arm == name))
            people = facts.Universe(data["universe"], data["facts"], data["pool"], frequencies=data["frequency"])
            assert data["pool"] == (256 if block == "C" else 512)
            seen = data["share"] * arm.tokens * (0.25 if block == "C" else 1) / 8 * people.frequency[0]
            times = int(name.partition("_x")[2] or 1)
            visits[round(seen / times)] = visits.get(round(seen / times), 0) + 1
    assert visits == {60: 8 + 13 + 12 + 6}  # of the most frequent person


def test_the_control_of_the_arithmetic_has_the_reasoning_tokens_of_the_loosest_filter() -> None:
    arms = arms_of(experiment.load_config(f"{CALIBRATION}:B"))
    assert arms["f128_held"].reasoning == arms["f8"].reasoning < arms["f128"].reasoning
    assert arms["f128_held"].knowledge == arms["f128"].knowledge


def test_sizes_of_a_block_are_of_one_recipe_and_horizons_of_one_schedule() -> None:
    """One head's width, depth and mlp ratio; every run of C warms up over the same share of its own steps."""
    for block in ("pilot", "B", "C", "D"):
        made = experiment.load_config(f"{CALIBRATION}:{block}")
        models = [proxy(size, made.scale, made.ladder) for size in made.sizes]
        assert len({(m.head_dim, m.layers, m.mlp / m.embed) for m in models}) == 1 and len(models) > 1
        assert all(run.trunk is None for run in asked_runs(made, made.scale))


def test_a_trial_adds_no_row_to_the_blocks_tables() -> None:
    rows = {
        words: experiment.load_config(f"{CALIBRATION}:B{words}").rows
        for words in ("", ",arms=f8", ",tokens=400k", ",seed=9")
    }
    assert rows[""] == rows[",arms=f8"] != "" == rows[",tokens=400k"] == rows[",seed=9"]


def test_ratios_are_tokens_a_parameter_of_every_size() -> None:
    made = experiment.load_config(f"{CALIBRATION}:A,seeds=1,arms=loose")
    made.scale, made.arms.loose.ratios = "femto", (36, 144, 576)
    found = {part.config.sizes[0]: part.config.budgets for part in parts(made, "femto")}
    for size, budgets in found.items():
        params = proxy(size, "femto").matrix_params
        assert budgets == tuple(ratio * params for ratio in (36, 144, 576))
    assert set(found) == {"mini", "small", "medium"}


def test_runs_that_stand_in_the_table_of_rows_are_left_out(monkeypatch: Any, capsys: Any) -> None:
    from phi3_jax.study import launch

    study = config("quick")
    runs = plan_study(study, "pico", {a.data: MANIFEST for a in parts(study, "pico")}, Path("s"), 1)
    monkeypatch.setattr(
        launch, "kept", lambda path, build: {(runs[0].name, fingerprint(runs[0])), (runs[1].name, "other")}
    )
    assert launch._left(study, runs) is runs
    study.rows = "rows.csv"
    assert launch._left(study, runs) == runs[1:]
    assert f"1 of {len(runs)} runs stand in rows.csv" in capsys.readouterr().out
