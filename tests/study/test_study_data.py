"""A study and its data: how a path is typed, what the export says, and a study that goes on with data that were moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_jax import configs
from phi3_jax.data import export
from phi3_jax.errors import UserError
from phi3_jax.experiment import load_config
from phi3_jax.study import runs
from phi3_jax.study.data import called, data_arguments, export_data

SCALING = Path(__file__).parents[2] / "experiments" / "scaling.py"


def test_a_path_with_a_comma_has_a_way_in():
    with pytest.raises(UserError, match=r"after data=a: a comma ends a value; .*--config.data.source=PATH"):
        load_config(f"{SCALING}:mini,data=a,b.jsonl")
    with pytest.raises(UserError, match="unknown word 'nonsense'; did you mean|unknown word 'nonsense'"):
        load_config(f"{SCALING}:mini,seeds=2,nonsense")


def planned(source: str, folder: Path) -> configs.RunConfig:
    config = load_config(f"{SCALING}:mini,scale=pico,budgets=20k,data={source}")
    config.data.window = 64
    arguments = data_arguments(config, "pico", 20_000)
    manifest = export.export(folder / "data", arguments.pop("data"), **arguments)
    (run,) = runs.plan_runs(config, "pico", manifest, folder / "data", 1)
    return run


def test_a_study_goes_on_with_data_that_were_moved(tmp_path, monkeypatch):
    texts, folder = tmp_path / "texts", tmp_path / "study"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"entry {i} " * 9}) + "\n" for i in range(300)))
    first = planned(str(texts), folder)
    (folder / "study.json").write_text(json.dumps({"runs": [{"data": vars(first.data)}]}))
    monkeypatch.chdir(tmp_path)
    texts = texts.rename(tmp_path / "elsewhere")
    folder = folder.rename(tmp_path / "moved")
    for typed in ("elsewhere", f"{texts}/", "./elsewhere/../elsewhere"):
        again = planned(typed, folder)
        assert configs.fingerprint(again) == configs.fingerprint(first) and again.data.folder == str(folder / "data")
    (texts / "b.jsonl").write_text(json.dumps({"text": "more"}))
    with pytest.raises(UserError, match="its input files have changed: b.jsonl"):
        planned("elsewhere", folder)
    for damaged in ("", "{}", "[]", '{"runs": [{}]}'):  # a study.json that says nothing decides nothing
        (folder / "study.json").write_text(damaged)
        assert called("typed", folder / "data", first.data.fingerprint) == "typed"


def test_what_the_export_says_reaches_the_command(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one document " * 99}))
    (tmp_path / "b.csv").write_text("x")
    export_data(dict(data=str(tmp_path), window=64), tmp_path / "out")
    said = capsys.readouterr()
    assert said.err.startswith("warning: source 'text' has too few documents") and said.err.count("\n") == 1
    assert said.out.startswith("data: 1 file read (1 x .jsonl; ") and "left out: 1 x .csv (b.csv)" in said.out
    with pytest.raises(UserError, match="does not exist"):
        export_data(dict(data=str(tmp_path / "nowhere")), tmp_path / "none")
