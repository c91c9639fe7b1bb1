"""Studies that follow one another: the three stages of post-training, and the study of what they cost by size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import UserError, family
from phi3_jax.experiment import Command, load_config
from phi3_jax.reporting.tax import figures
from phi3_jax.scaling import tax
from phi3_jax.study import stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def command(text: str, **more: object) -> Command:
    return Command(load_config(text), text, more.pop("workdir", None), "auto", **more)


def test_each_stage_starts_from_the_one_before_in_the_same_folder(tmp_path: Path) -> None:
    found = stages.of(command("experiments/posttrain.py", workdir=tmp_path, overrides=("train.log_every=7",)))
    assert list(found) == ["1-base", "2-sft", "3-dpo"]
    base, sft, dpo = found.values()
    assert base.config.train.init == "" and sft.config.train.init == str(base.workdir) == str(tmp_path / "1-base")
    assert dpo.config.train.init == str(sft.workdir)
    assert {one.config.train.log_every for one in found.values()} == {7}
    assert "text:prose:" in sft.config.data.source and base.config.data.source == "prose:128:0"
    with pytest.raises(UserError, match="--run names runs of one study"):
        stages.of(command("experiments/posttrain.py", runs=("x",)))
    one = command("experiments/scaling.py")
    assert stages.of(one) == {"": one}


def test_the_study_of_the_tax_is_27_runs_each_from_its_own_base() -> None:
    found = stages.of(command("experiments/alignment_tax.py"))
    assert len(found) == 27 and len({one.workdir for one in found.values()}) == 27
    for name, one in found.items():
        chain = name.rpartition("-")[0].rpartition("-")[0]
        assert one.config.train.init in (
            "",
            *(str(Path("runs/alignment-tax") / f"{chain}-{s}") for s in ("1-base", "2-sft")),
        )
        assert bool(one.config.train.init) == (not name.endswith("1-base"))
        assert one.config.seed == int(name.split("-s")[1].split("-")[0]) >= 10
    assert list(found).index("mini-s10-1-base") < list(found).index("mini-s10-2-sft")


def write(folder: Path, values: dict[tuple[str, int, str], tuple[float, float, float]]) -> None:
    for (size, seed, stage), numbers in values.items():
        place = folder / f"{size}-s{seed}-{stage}" / "run"
        place.mkdir(parents=True)
        rows = []
        chat = (0.9, 0.1, 0.8, 0.0)
        for (task, metric), value in zip([*tax.MEASURES.values(), *tax.CHAT.values()], numbers + chat, strict=True):
            rows += [
                {"step": step, "suite": "chat", "task": task, "metric": metric, "value": v}
                for step, v in ((0, 0.5), (9, value))
            ]
        (place / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_rule_says_tax_gain_and_undecided(tmp_path: Path) -> None:
    values = {}
    for k, size in enumerate(("mini", "small", "medium")):
        for seed in (10, 11, 12):
            noise = 0.002 * (seed - 11)
            values[size, seed, "1-base"] = (0.9, 0.5, 0.0)
            values[size, seed, "2-sft"] = (0.8 + 0.04 * k + noise * (1 + k), 0.5 + 10 * noise, 1.0)
    write(tmp_path, values)
    scores = tax.read(tmp_path)
    assert len(scores) == 18
    assert tax.said(tax.changes(scores, "mini", "2-sft", "knowledge"))[0] == "tax"
    assert tax.said(-tax.changes(scores, "mini", "2-sft", "knowledge"))[0] == "gain"
    assert tax.said(tax.changes(scores, "mini", "2-sft", "format"))[0] == "no spread"
    assert tax.said(tax.changes(scores, "mini", "2-sft", "knowledge")[:2])[0] == "incomplete"
    assert tax.limits(scores, "format") == dict.fromkeys(family.TRIO, "floor") and not tax.limits(scores, "reasoning")
    verdict, seen = tax.said(tax.changes(scores, "mini", "2-sft", "reasoning"))
    assert verdict == "undecided" and seen == pytest.approx((4.3027 + 1.0607) * 0.02 / np.sqrt(3), rel=1e-3)
    found = tax.slopes(scores, "2-sft", "knowledge")
    assert len(found) == 3 and found == pytest.approx([0.08 / np.log2(416000 / 110592)] * 3, rel=0.06)
    assert tax.slopes(scores, "2-sft", "format") == pytest.approx([0.0] * 3)
    page = "\n".join(tax.lines(scores))
    assert page.count("depends on size") == 1 and page.count("not run") == 18 and "-10.0" in page
    tax.keep(str(tmp_path), str(tmp_path / "kept"))
    assert tax.lines_of(tmp_path / "kept") == tax.lines_of(tmp_path)
    (drawn,) = figures(tmp_path / "kept")
    assert drawn.svg.is_file() and drawn.png.is_file()
    with pytest.raises(UserError, match="holds no stages"):
        tax.read(tmp_path / "nothing")


def test_the_documents_say_what_the_table_that_ships_says() -> None:
    scores = tax.read(ROOT / "analysis/results/tax")
    assert len(scores) == 27
    (primary,) = (line for line in tax.lines(scores) if line.split()[:4] == ["2-sft", "1-base", "knowledge", "mini"])
    assert primary.split()[-5:] == ["-10.1", "[-14.5,", "-5.7]", "5.5", "tax"]
    text = (ROOT / "docs/posttraining.md").read_text()
    assert "10.1 points of knowledge [-14.5, -5.7]" in text
    refused = [
        100 * np.mean([one["prose refused"] for (size, _, at), one in scores.items() if (size, at) == ("mini", stage)])
        for stage in ("2-sft", "1-base")
    ]
    assert f"{refused[0]:.1f} % of the sentences after SFT and with {refused[1]:.1f} % before" in text
    spilled = 100 * tax.changes(scores, "mini", "2-sft", "prose refused").mean()
    assert f"Of the 10.1, some {spilled:.1f} are refusals" in text
    assert 100 * tax.changes(scores, "mini", "3-dpo", "knowledge", "2-sft").mean() == pytest.approx(6.5, abs=0.05)
