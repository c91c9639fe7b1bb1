"""A data source and a meter are one file and one line of a table each; what names sources elsewhere follows the tables."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_jax.data import meters, sources
from phi3_jax.data.corpora import drawn
from phi3_jax.data.sources.mixture import PHASES
from phi3_jax.errors import UserError
from phi3_jax.experiment import SOURCE, base_config
from phi3_jax.study.data import data_arguments, vocabulary_of

ROOT = Path(__file__).resolve().parents[2]
SQUARES = '''
"""Squares, written out: enough of a text to train on."""

from phi3_jax import keys
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Request, Source, Texts


def texts(spec: str, text_field: str = "text") -> Texts:
    return Texts((f"{n} times {n} is {n * n}. " * 20 for n in range(300)), Inputs(versions=["squares", "1"]), "squares")


def recipe(request: Request) -> Recipe:
    made = plain.recipe(request)
    made.generator["power"] = request.options["power"]
    for part in made.evals:
        part.meter = "halves"
    return made


plain = documents.source("squares", "squares, written out", texts)
SOURCE = Source("squares", plain.what, recipe, documents.OPTIONS | {"power": keys.whole("shown only", 2)}, texts)
'''
HALVES = '''
"""Share of targets that are right in the first half of a window."""

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row


def measure(e: Evaluation) -> list[Row]:
    half = e.hit.shape[1] // 2
    right = e.hit[:, :half][e.domains[:, :half] > 0]
    return [row("halves", "first", "accuracy", statistics.proportion(np.asarray(right)), chance=1 / e.vocab)]


METER = Meter(measure)
'''


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with two more files, and with one more line in each of the two tables."""
    root = tmp_path_factory.mktemp("grown")
    shutil.copytree(ROOT / "phi3_jax", root / "phi3_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for table, name, text, last in (("sources", "squares", SQUARES, "mixture"), ("meters", "halves", HALVES, "text")):
        folder = root / "phi3_jax" / "data" / table
        (folder / f"{name}.py").write_text(text)
        init, line = folder / "__init__.py", f'        "{last}",\n'
        assert init.read_text().count(line) == 1
        init.write_text(init.read_text().replace(line, f'{line}        "{name}",\n'))
    return root


def python(package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=env, cwd=package)


def test_a_new_source_exports_and_is_lent(grown: Path, tmp_path: Path) -> None:
    command = ("-m", "phi3_jax.data.export", "--out", tmp_path / "d", "--data", "squares", "--window", 32, "--power", 3)
    done = python(grown, *command)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert made["generator"]["power"] == 3 and made["generator"]["data"] == "squares"
    assert made["inputs"] == ["squares", "1"] and made["evals"][0]["meter"] == "halves"
    assert made["sources"][0]["bytes"] > 100_000
    lent = ("--text-share", 0.25, "--text-source", "squares", "--tokens", "24k", "--facts", 90, "--universe", 180)
    done = python(grown, "-m", "phi3_jax.data.export", "--out", tmp_path / "f", "--data", "facts", *lent)
    assert done.returncode == 0, done.stderr
    assert [s["name"] for s in json.loads((tmp_path / "f" / "manifest.json").read_text())["sources"]][-1] == "text"
    said = python(grown, "-m", "phi3_jax.data.export", "--help").stdout
    assert "squares, written out" in said and "--power" in said
    done = python(ROOT, *command)  # without the line nobody knows it
    assert done.returncode == 2 and "unknown argument '--power'" in done.stderr


def test_a_study_trains_on_a_new_source_and_reports_a_new_meter(grown: Path, tmp_path: Path) -> None:
    words = "mini,scale=pico,budgets=20k,data=squares"
    run = (
        ROOT / "launch" / "run.py",
        "--config",
        f"{ROOT}/experiments/scaling.py:{words}",
        "--workdir",
        tmp_path / "s",
    )
    done = python(grown, *run, "--config.data.window=64")
    assert done.returncode == 0, done.stderr
    (config,) = (tmp_path / "s").glob("mini-*/config.json")
    data = json.loads(config.read_text())["config"]["data"]
    assert (data["source"], data["window"]) == ("squares", 64)
    rows = [json.loads(line) for file in config.parent.glob("*.jsonl") for line in file.read_text().splitlines()]
    values = [
        r for r in rows if (r.get("suite"), r.get("task"), r.get("metric")) == ("halves", "text first", "accuracy")
    ]
    assert values and all(0 <= r["value"] <= 1 for r in values)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_source_declares_what_it_takes(name: str) -> None:
    source = sources.SOURCES[name]
    assert source.takes(source.name) and sources.find(source.name if name != "path" else ".") is source
    for option, key in source.options.items():
        assert key.doc and key.valid(key.default, option) == key.default, "a default out of its own range"


def test_choices_name_every_source_and_phase() -> None:
    for word in (*sources.names(), *PHASES):
        assert word in sources.choices()
    assert SOURCE in sources.names()
    assert sources.find("tfds:a/b:train") is sources.SOURCES["tfds"]


@pytest.mark.parametrize("name", [n for n in sources.SOURCES if n != "facts"])
def test_a_study_asks_a_source_for_what_it_takes_and_no_more(name: str) -> None:
    config = base_config()
    specs = {"path": ".", "tfds": "tfds:x", "mixture": "mixture:phi3_phase1", "chats": "chats:rows.jsonl"}
    specs |= {"needles": "needles:pydocs", "mixed": "mix:pydocs", "long": "long:pydocs", "prose": "prose:8"}
    specs |= {"curated": "curated:1:curated/mine", "drawn": "drawn:picture", "factbook": "factbook:50"}
    spec = specs.get(name, name)
    config.data.update(source=spec, tokenizer="here", text_field="body", seed=3)
    asked = data_arguments(config, "micro", 20_000)
    assert asked.pop("data") == spec and asked.keys() <= sources.SOURCES[name].options.keys()
    expected = {"window": 1024, "tokenizer": "here", "text_field": "body"}
    expected = {"tokenizer": "here", "template": ""} if name == "chats" else expected  # its window depends on its rows
    expected = {"tokens": 20_000, "seed": 3} if name in ("drawn", "factbook") else expected
    assert {key: asked[key] for key in expected} == expected and ("window" in asked) == ("window" in expected)


def test_a_study_of_drawn_items_has_a_vocabulary_of_its_own() -> None:
    config = base_config()
    config.data.source = "drawn:text"
    assert vocabulary_of(data_arguments(config, "pico", 20_000))["vocab_size"] == drawn.VOCAB


def test_a_study_of_facts_grows_with_its_scale() -> None:
    config = base_config()
    counts = dict(facts=4500, universe=9000, pool=256, tokens=20_000)
    given = dict(data="facts", frequency="uniform", value_bits=8, seed=0)
    assert data_arguments(config, "pico", 20_000) == given | counts
    larger = data_arguments(config, "micro", 20_000)
    assert (larger["facts"], larger["universe"], larger["pool"]) == (144_000, 288_000, 1024)
    config.data.update(facts=0, universe=70_000, reading=0.1)
    larger = data_arguments(config, "pico", 20_000)
    assert (larger["facts"], larger["universe"], larger["pool"], larger["reading"]) == (0, 70_000, 1024, 0.1)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: sources.recipe("pydoc"), r"'pydoc' does not exist; did you mean 'pydocs'\?"),
        (lambda: sources.recipe("facts", window=64), "--window belongs to --data pydocs, PATH, "),
        (lambda: sources.recipe("facts", poool=64), "unknown option --poool; did you mean 'pool'"),
        (lambda: sources.recipe("facts", tokens=0), "--tokens 0 must be an integer, 1 or more"),
        (lambda: sources.recipe("facts", share=0.5, reading=0.6), "at most 1 together"),
        (lambda: sources.texts("facts"), "facts is no text for a part of other data; name one of pydocs, PATH"),
        (lambda: sources.recipe("s3://a/b"), "is an address, not a local path"),
        (lambda: meters.find("knowlege"), "unknown meter 'knowlege'; did you mean 'knowledge'"),
    ],
)
def test_what_is_no_request_says_why(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        ask()
    assert "\n" not in str(error.value)


def names_in(path: Path) -> set[str]:
    return {
        n.value
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }


def test_nobody_but_the_table_imports_a_module_of_it() -> None:
    """The tables import by name, so test_rooms does not see rings through them: no module below may import its table."""
    package = ROOT / "phi3_jax" / "data"
    for room in ("sources", "meters"):
        for path in (package / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and path.name != "__init__.py":
                    names = {f"{node.module}.{alias.name}" for alias in node.names}
                    assert node.module != f"phi3_jax.data.{room}" or names <= {f"phi3_jax.data.{room}.documents"}, path
                    assert f"phi3_jax.data.{room}" not in names, path


def test_the_exporter_names_no_source_and_no_meter() -> None:
    text = names_in(ROOT / "phi3_jax" / "data" / "export.py")
    assert not text & {"facts", "pydocs", "tfds", "mixture", *meters.METERS}
    assert "knowledge" in names_in(ROOT / "phi3_jax" / "data" / "sources" / "facts.py")  # the control
