"""A study with arms is a list of plain studies: data, budgets and names follow from absolute counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_jax import launcher, study
from phi3_jax.errors import UserError
from phi3_jax.family import proxy

FILE = str(Path(__file__).parent.parent / "experiments" / "data_optimal.py")
MANIFEST = {"window": 24, "vocab": 320, "kind": "facts", "fingerprint": "0" * 64}


def config(words: str = "full") -> Any:
    return launcher.load_config(f"{FILE}:{words}")


def data_of(arm: study.Arm) -> dict[str, Any]:
    return study.data_arguments(arm.config, "pico", max(study.budgets_of(arm.config, "pico", arm.config.sizes[0])))


def test_every_kept_fact_is_seen_equally_often_in_the_arms_that_say_so() -> None:
    seen = {}
    for arm in study.arms(config(), "pico"):
        data, (budget, *_) = data_of(arm), arm.config.budgets
        if data["facts"] and arm.name != "published":
            seen[arm.name] = data["share"] * budget / 8 / data["facts"]
    assert seen.pop("repeated") == pytest.approx(55.6, abs=0.1)
    assert len(seen) > 10 and all(value == pytest.approx(27.8, abs=0.1) for value in seen.values())


def test_each_seed_has_its_own_universe_and_arms_of_one_corpus_share_it() -> None:
    arms = study.arms(config(), "pico")
    loose = [a for a in arms if a.name == "loose"]
    assert [data_of(a)["seed"] for a in loose] == [10, 11, 12, 13, 14] and len({a.data for a in loose}) == 5
    places = {a.name: a.data for a in arms if a.config.seed == 10}
    shared = ("filtered", "lr_half", "lr_double", "published", "off_recipe", "width_filtered")
    assert len({places[name] for name in shared}) == 1
    assert (
        len({places[name] for name in ("filtered", "loose", "repeated", "dropped", "to_text", "bits1", "bits4")}) == 7
    )
    # One place, one request: no two arms may ask for different data there.
    for place in set(places.values()):
        requests = [data_of(a) for a in arms if a.data == place and a.name != "published"]
        assert all(r == requests[0] for r in requests)


def test_planned_runs_are_the_asked_ones_and_differ_where_the_arms_do() -> None:
    made = config("full,seeds=2")
    manifests = {arm.data: MANIFEST | {"fingerprint": str(arm.data)} for arm in study.arms(made, "pico")}
    runs = study.plan_study(made, "pico", manifests, Path("s"), 1)
    asked = study.asked_runs(made, "pico")
    assert {run.name for run in runs} == set(study.resolve_runs(asked, runs)) == {ask.name for ask in asked}
    by_name = {run.name: run for run in runs}
    assert by_name["published-mini-s10-2.75M"].steps == (2_750_000 // 1056)
    assert by_name["lr_half-mini-s10-4M"].optim.peak_lr == 1.5e-3 != by_name["filtered-mini-s10-4M"].optim.peak_lr
    assert by_name["off_recipe-small-s10-4M"].model.kv_heads == 1
    assert by_name["width_loose-above-s11-4M"].model == proxy("above", "pico", "width", vocab=320)
    assert [g[0].seed for g in study.groups(runs)] == sorted(run.seed for run in runs)


def test_the_width_ladder_changes_width_alone() -> None:
    models = [proxy(s, "pico", "width") for s in ("below", "mini", "small", "small-medium", "medium", "above")]
    assert [m.embed for m in models] == [32, 48, 64, 80, 96, 112]
    assert {(m.layers, m.head_dim, m.mlp / m.embed, m.heads * m.head_dim / m.embed) for m in models} == {(4, 16, 3, 1)}
    with pytest.raises(UserError, match="width ladder"):
        proxy("mini-small", "pico", "width")


def test_counts_scale_together_and_bad_arms_are_named() -> None:
    small, whole = (study.arms(config(words), "pico")[0] for words in ("quick,tokens=400k", "quick"))
    assert (
        data_of(small)["facts"] * 10 == data_of(whole)["facts"] and data_of(small)["share"] == data_of(whole)["share"]
    )
    assert [a.name for a in study.arms(config("full,arms=loose,seeds=1"), "pico")] == ["loose"]
    with pytest.raises(UserError, match="unknown arm 'lose'.*loose"):
        config("quick,arms=lose")


def test_a_plain_study_is_its_own_single_arm() -> None:
    plain = launcher.load_config(str(Path(FILE).with_name("scaling.py")))
    (arm,) = study.arms(plain, "pico")
    assert arm.name == "" and arm.config is plain and arm.data == Path("data")
