"""What can be set: every key has a type, a range and a meaning, and a value outside is one line wherever it enters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_jax import commands, experiment, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.configs import DataConfig, OptimConfig, RunConfig
from phi3_jax.errors import UserError
from phi3_jax.experiment import base_config, load_config
from phi3_jax.family import proxy
from phi3_jax.keys import Key
from phi3_jax.verbs import asked

ROOT = Path(__file__).resolve().parents[1]
SCALING = str(ROOT / "experiments/scaling.py")


def complaint(do: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        do()
    text = str(error.value)
    assert text and "\n" not in text
    return text


def outside(key: Key) -> list[str]:
    """Texts that a key cannot mean, by its declaration."""
    if key.kind is bool:
        return ["2", "yes", ""]
    if key.kind is tuple:
        return [text for text in outside(key.item) if text] + ([","] if key.low else [])
    if key.choices:
        return [[*key.choices][-1] + "x"]
    if key.kind in (int, float):
        found = ["nan", "inf", "-inf", "1e999", "x", "", str(key.low - 1), "9" * 5000, str(key.high * 10)]
        return [*found, "1.5"] if key.kind is int else found
    return ["gs://bucket/x"] if key.check is keys.place else []


def test_every_key_has_a_range_and_a_meaning() -> None:
    assert len(experiment.TABLE) > 50
    for name, key in (experiment.TABLE | experiment.OWN | experiment.ARM).items():
        assert key.doc, f"{name} does not say what it means"
        if key.kind in (int, float):
            assert key.low is not None and key.high is not None and math.isfinite(key.high), f"{name} has no range"
        if key.kind is tuple:
            assert isinstance(key.item, Key), f"{name} does not say of what it is a list"
        key.valid(key.default, name)


def test_the_config_has_the_declared_keys_and_no_others() -> None:
    def leaves(node: object, prefix: str = "") -> list[str]:
        return [
            name
            for key, value in node.items()
            for name in (leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else [prefix + key])
        ]

    assert sorted(leaves(base_config())) == sorted(experiment.TABLE)
    config = base_config()
    experiment.check(config)
    del config.train["log_every"]
    assert "train.log_every is missing" in complaint(lambda: experiment.check(config))


@pytest.mark.parametrize("name", experiment.TABLE)
def test_a_value_out_of_range_is_one_line_as_an_option_and_in_a_file(name: str, tmp_path: Path) -> None:
    last = name.rpartition(".")[2]
    for text in outside(experiment.TABLE[name]):
        assert last in complaint(lambda text=text: asked(["--config", SCALING, f"--config.{name}={text}"]))
    wrong = {bool: "3", int: "-3", float: "float('nan')", tuple: "3", str: "3"}[experiment.TABLE[name].kind]
    file = tmp_path / "mine.py"
    head = "from phi3_jax.experiment import base_config\ndef get_config(argument=''):\n    config = base_config()\n"
    file.write_text(f"{head}    config.{name} = {wrong}\n    return config\n")
    assert "mine.py" in complaint(lambda: load_config(str(file)))


@pytest.mark.parametrize(
    "words,said",
    [
        ("sweep,seeds=0", "seeds=0 must be an integer, 1 to"), ("sweep,seeds=1001", "seeds=1001"),
        ("sweep,seed=1.5", "seed='1.5'"), ("sweep,seed=²", "seed="), ("sweep,tokens=1e30", "'1e30' is not a token budget"),
        ("sweep,tokens=1.5", "'1.5' is not"), ("sweep,budgets=1M,1e30", "'1e30'"), ("sweep,budgets=0", "'0' is not"),
        ("sweep,seed=1,seed=2", "seed= is given twice"), ("sweep,data=s3://b/x", "s3:// is no place"),
    ],
)  # fmt: skip
def test_a_word_out_of_range_is_one_line(words: str, said: str) -> None:
    assert said in complaint(lambda: load_config(f"{SCALING}:{words}"))


@pytest.mark.parametrize(
    "more,said",
    [
        (["--workdir="], "--workdir is empty"), (["--workdir", "gs://b/x"], "--workdir gs://b/x: gs:// is no place"),
        (["--workdir", "a", "--workdir", "b"], "--workdir is given twice"),
        (["--config.seeds=1", "--config.seeds=2"], "--config.seeds is given twice"),
        (["--config.sizes=mini,mini"], "names mini twice"), (["--config", "x.py"], "--config is given twice"),
        (["--config.arms.a.facts=1"], "unknown section config.arms"),
    ],
)  # fmt: skip
def test_options_are_given_once_and_mean_something(more: list[str], said: str) -> None:
    assert said in complaint(lambda: asked(["--config", SCALING, *more]))


@pytest.mark.parametrize("more", ["filtered.facts=-3", "loose.knowledge=-1", "loose.reasoning=nan", "loose.facts=1.5"])
def test_arms_are_checked_too(more: str) -> None:
    words = ["--config", str(ROOT / "experiments/data_optimal.py"), f"--config.arms.{more}"]
    assert f"config.arms.{more.partition('=')[0]}" in complaint(lambda: asked(words))


def test_a_study_of_ones_own_may_add_keys(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    head = "from phi3_jax.experiment import base_config\ndef get_config(argument=''):\n    config = base_config()\n"
    file.write_text(f"{head}    config.mine = 2.5\n    return config\n")
    assert load_config(str(file)).mine == 2.5
    assert "mine=inf" in complaint(lambda: asked(["--config", str(file), "--config.mine=inf"]))


def test_files_that_are_no_experiment(tmp_path: Path) -> None:
    texts = {
        "words.md": b"# It's text\n'", "zero.py": b"\0\0", "latin.py": b"# \xe9\nx = 'a'\n", "raises.py": b"\n1 / 0\n",
        "leaves.py": b"raise SystemExit(3)", "other.py": b"def get_config(a):\n    return {}\n",
        "none.py": b"get_config = 3\n",
        "late.py": b"def get_config(a):\n    return a.nothing\n",
    }  # fmt: skip
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        assert name in complaint(lambda name=name: load_config(str(tmp_path / name)))
    assert "line 2: ZeroDivisionError" in complaint(lambda: load_config(str(tmp_path / "raises.py")))


@pytest.mark.parametrize(
    "name,value",
    [
        ("log_every", 0),
        ("eval_points", -1),
        ("seed", 1.5),
        ("keep_latest", 0),
        ("batch_timeout", math.nan),
        ("strategy", "fsdq"),
    ],
)
def test_a_run_is_checked_by_the_same_declarations(name: str, value: object) -> None:
    run = RunConfig("a", proxy("mini"), OptimConfig(), DataConfig("facts", "x", "f", 24, 320), 44, 100)
    assert name in complaint(lambda: dataclasses.replace(run, **{name: value}))


def test_choices_are_those_of_the_rooms_that_know_them() -> None:
    from phi3_jax.data.corpora.facts import FREQUENCIES, MAX_VALUE_BITS
    from phi3_jax.models.attention import IMPLEMENTATIONS
    from phi3_jax.planning.memory import KEPT

    assert set(experiment.TABLE["train.attention"].choices) == set(IMPLEMENTATIONS)
    assert set(experiment.TABLE["train.remat"].choices) == set(KEPT)
    assert (
        experiment.TABLE["data.frequency"].choices == FREQUENCIES
        and experiment.TABLE["data.value_bits"].high == MAX_VALUE_BITS
    )
    assert {*experiment.SOURCES, "facts", "seeds", "data"} == experiment.ARM.keys()
    assert experiment.ARM.keys() < {field.name for field in dataclasses.fields(experiment.Arm)}


def test_counts() -> None:
    right = {"1": 1, "500k": 500_000, "2.75M": 2_750_000, "3.3T": 3_300_000_000_000, "1e6": 10**6, "4B": 4 * 10**9}
    assert {text: keys.parse_count(text) for text in right} == right
    for text in ("", "k", "0", "-4M", "1.5", "nan", "inf", "1e30", "0.0001k", "x", "1e999999999", "9" * 400):
        complaint(lambda text=text: keys.parse_count(text))


@pytest.mark.parametrize(
    "words,said",
    [
        (["--limit", "-3"], "--limit -3 must be an integer, 1 or more"), (["--limit=1.5"], "--limit 1.5 must be"),
        (["--share", "nan"], "--share nan must be a number, 0 to 1"), (["--share=2"], "--share 2 must be"),
        (["--out", "gs://b/x"], "--out gs://b/x: gs:// is no place"), (["--out="], "--out is empty"),
        (["--out", "hf:s3://b"], "s3:// is no place"), (["--kind", "c"], "--kind c is unknown"),
        (["--limit", "1", "--limit", "1"], "--limit is given twice"), (["--text", "\udcff"], "is no UTF-8 text"),
        (["--line", "a", "--line", "\udcff"], "is no UTF-8 text"),
    ],
)  # fmt: skip
def test_flags_are_checked_by_their_declarations(words: list[str], said: str) -> None:
    table = {
        "limit": keys.whole("items", None, 1), "share": keys.share("of all"), "out": keys.local("results"),
        "kind": keys.word("which", "a", "a", "b"), "text": keys.word("any", None),
    }  # fmt: skip
    flags = {name: Flag(key) for name, key in table.items()} | {"line": Flag(keys.word("a line", None), repeated=True)}
    command = Command("x", "Does.", "", flags)
    right = ["--limit", "4k", "--share=0.5", "--out", "a b", "--line", "x", "--line", "y"]
    found = {"limit": 4000, "share": 0.5, "out": "a b", "kind": "a", "text": None, "line": ("x", "y")}
    assert commands.parse(command, right) == found
    assert said in complaint(lambda: commands.parse(command, words))
