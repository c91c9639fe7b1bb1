"""The table of commands: every flag is printed, said of what type it is, and agrees with the room that does the work."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import commands, experiment, keys, verbs
from phi3_jax.__main__ import main
from phi3_jax.commands import Command, Flag, parse, usage
from phi3_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {name: command for name, command in verbs.TABLE.items() if not command.hidden}


def toy(body: object = "no.such.module:main", **more: object) -> Command:
    flags = {
        "study": Flag(keys.local("a folder"), "STUDY", needed=True, bare=True),
        "draws": Flag(keys.whole("how many", 1000, 0, 5000)),
        "only": Flag(keys.word("keeps these", None), "COLUMN=VALUE", repeated=True),
        "sizes": Flag(keys.Key("three", (1.0, 2.0), tuple, 1, item=keys.number("a size", None))),
        "dry_run": Flag(keys.switch("prints alone")),
        "serve": Flag(keys.word("", None), hidden=True),
    }
    return Command("toy", "Does it.\n\nAnd more.", body, flags, "runs/x", **more)  # type: ignore[arg-type]


def complaint(*words: str, **more: object) -> str:
    with pytest.raises(UserError) as error:
        parse(toy(**more), words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_ways_to_type_a_flag() -> None:
    words = ["--draws", "2k", "a b", "--only", "x=1", "--sizes=1,2.5,4", "--only=y=2", "--dry-run"]
    found = parse(toy(), words)
    assert found.words == tuple(words)
    assert found == {
        "study": "a b", "draws": 2000, "only": ("x=1", "y=2"), "sizes": (1.0, 2.5, 4.0), "dry_run": True, "serve": None,
    }  # fmt: skip
    assert parse(toy(), ["x"])["draws"] == 1000 and parse(toy(), ["x"])["only"] == ()


def test_what_is_wrong_is_one_line_that_says_the_way_out() -> None:
    assert complaint("x", "--drwas", "3").startswith("unknown argument '--drwas'; did you mean '--draws' or")
    assert "--serve" not in complaint("x", "--srve=1").partition("valid:")[2]
    assert complaint("x", "y") == "'y' is one too many; give STUDY"
    assert complaint("x", "-n").startswith("unknown argument '-n';")
    assert complaint("x", "--study", "y").startswith("unknown argument '--study'")
    assert complaint() == "STUDY missing; for example runs/x"
    assert complaint("x", "--draws") == complaint("x", "--draws", "--dry_run") == "--draws needs a value"
    assert complaint("x", "--dry_run=1") == "--dry_run takes no value"
    assert complaint("x", "--dry_run", "--dry-run") == "--dry_run is given twice"
    assert complaint("x", "--draws=1", "--draws", "2") == "--draws is given twice"
    assert complaint("x", "--draws", "6k") == "--draws 6k must be an integer, 0 to 5,000"
    assert complaint("x", "--draws=") == "--draws is empty; give a value or leave it out"
    assert complaint("") == "STUDY is empty; give a value or leave it out"
    assert "gs:// is no place" in complaint("gs://b/x")
    assert complaint("x", "--config.a=1").startswith("unknown argument '--config.a=1'")


def test_keys_of_an_experiment_are_kept_as_typed() -> None:
    table = {"a.b": keys.whole("it", 1)}
    found = parse(toy(keys=table), ["x", "--config.a.b=2", "--config.c", "3"])
    assert found[commands.OVERRIDES] == {"a.b": "2", "c": "3"}
    assert complaint("x", "--config.c=1", "--config.c=2", keys=table) == "--config.c is given twice"
    assert complaint("x", "--config.c", keys=table) == "--config.c needs a value"


def test_the_help_is_printed_and_the_body_is_not_imported(capsys: pytest.CaptureFixture) -> None:
    for words in ([], ["-h"], ["x", "--help"]):
        assert commands.call(toy(), words) == 0
        assert capsys.readouterr().out.startswith("Does it.\n\n    phi3-jax toy runs/x\n\nAnd more.\n")
    ran = []
    assert commands.call(toy(lambda flags: ran.append(flags["study"]) or 7), ["x"]) == 7 and ran == ["x"]
    with pytest.raises(ModuleNotFoundError):
        commands.call(toy(), ["x"])


@pytest.mark.parametrize("name", verbs.TABLE)
def test_every_flag_says_its_meaning_type_and_default(name: str) -> None:
    command = verbs.TABLE[name].complete()
    text = usage(command)
    for flag_name, flag in command.flags.items():
        shown = (flag.shown or flag_name.upper()) if flag.bare else f"--{flag_name}"
        assert (re.search(rf"^{re.escape(shown)}(?!\w)", text, re.MULTILINE) is None) == flag.hidden, shown
        assert flag.hidden or flag.key.doc
    rows = re.split(r"\n(?=\S)", text.partition("--help")[0])
    for row in (row for row in rows if row.startswith("--")):
        flat = " ".join(row.split())
        assert flat.endswith("]") or "the keys are below" in flat, flat
        kind, _, default = flat.rpartition("[")[2].rstrip("]").rpartition("; ")
        assert default == "switch" or "the keys are" in flat or (kind and default), flat
    assert all(len(line) <= 124 or line.startswith("    ") for line in text.splitlines())


@pytest.mark.parametrize("name", ["run", "plan", "submit"])
def test_the_help_lists_every_key_of_an_experiment(name: str) -> None:
    listed = dict(
        re.findall(r"^--config\.([\w.]+)=\S+\s+(.*(?:\n .*)*)", usage(verbs.TABLE[name].complete()), re.MULTILINE)
    )
    listed.pop("KEY")
    assert [*listed] == [*experiment.TABLE]
    for key, row in listed.items():
        flat, declared = " ".join(row.split()), experiment.TABLE[key]
        assert declared.doc in flat, key
        default = "none" if declared.default is None else keys.text(declared.default) or "empty"
        assert flat.lower().endswith(f"; default {default.lower()}]"), flat


def test_help_imports_nothing_that_takes_time() -> None:
    heavy = ("jax", "numpy", "ml_collections", "datasets", "scipy", "hashlib", "difflib", "json")
    code = "import sys; from phi3_jax.__main__ import main\n" + "\n".join(
        f"assert main([{name!r}, '--help']) == 0" for name in verbs.TABLE if name not in ("data", "curate")
    )
    code += f"\nprint([m for m in {heavy!r} if m in sys.modules])"
    code += "\nassert main(['data', '--help']) == main(['curate', '--help']) == 0"  # their tables bring NumPy
    code += "\nassert 'jax' not in sys.modules; print([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("[")][-2:] == ["[]", "[]"], done.stderr


def test_every_body_is_there_and_every_name_starts_its_command() -> None:
    for name, command in verbs.TABLE.items():
        module, _, function = str(command.body).partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
        program = command.also.removeprefix("python ")
        if program:
            parts = program.removeprefix("-m ").removesuffix(".py").replace(".", "/")
            assert f'start("{name}")' in (ROOT / f"{parts}.py").read_text(), name


def test_an_unknown_command_is_one_line_and_no_command_lists_all(capsys: pytest.CaptureFixture) -> None:
    assert main(["evalute"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unknown command 'evalute'; did you mean 'evaluate'") and err.count("\n") == 1
    for words in ([], ["--help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"phi3-jax {name}" in out for name in SHOWN) and "worker" not in out


def test_the_options_of_all_sources_are_flags_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    from phi3_jax.data import sources

    command = verbs.DATA.complete()
    assert {"out", "data", "overwrite"} | sources.options().keys() == command.flags.keys()
    text = " ".join(usage(command).split())
    for name, (key, owners) in sources.options().items():
        assert f"--{name}" in text and f"{', '.join(owners)}: {key.doc}" in text
        assert command.flags[name].default in (None, ()), "an option of another source must not seem to be given"
    words = ["--out", "x", "--data", "facts", "--text-share=0.5", "--source", "a=b", "--source", "c=d"]
    found = {name: value for name, value in parse(command, words).items() if value not in (None, (), False)}
    assert found == {"out": "x", "data": "facts", "text_share": 0.5, "source": ("a=b", "c=d")}
    assert main(["data", "--out", "x"]) == 2 and "--data missing" in capsys.readouterr().err


def test_there_is_no_other_parser() -> None:
    pattern = re.compile(r"argparse|getopt|optparse|absl\.flags|sys\.argv\[(?!1:\])")
    paths = [path for folder in ("phi3_jax", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name for path in paths if pattern.search(path.read_text("utf-8"))}
    found -= {"convert.py"}  # small programs that benchmarks/convert.py times
    assert found == set() and pattern.search("parser = argparse.ArgumentParser()") and pattern.search("sys.argv[2]")


def test_defaults_and_choices_are_those_of_the_rooms_that_know_them() -> None:
    from phi3_jax.evaluation import command as evaluate
    from phi3_jax.inference.sampling import Sampling
    from phi3_jax.interop import gguf
    from phi3_jax.models import quantized
    from phi3_jax.scaling import fit, power
    from phi3_jax.submission.command import BACKENDS

    def default(command: Command, name: str) -> object:
        return command.flags[name].default

    for command, made in ((verbs.GENERATE, Sampling()), (verbs.POWER, power.Design((110_592, 212_992, 416_000)))):
        for field in dataclasses.fields(made):
            assert default(command, field.name) == getattr(made, field.name), field.name
    choices = (
        (verbs.EVALUATE, "scoring", evaluate.SCORINGS), (verbs.EXPORT, "format", gguf.FILES),
        (verbs.QUANTIZE, "format", quantized.FORMATS), (verbs.SUBMIT, "backend", BACKENDS),
    )  # fmt: skip
    for command, name, known in choices:
        assert set(command.flags[name].key.choices) == set(known), name
    assert verbs.POWER.flags["seeds"].key.high == power.MOST_SEEDS
    assert verbs.POWER.flags["items"].key.high == power.MOST_ITEMS
    assert verbs.FIT.flags["bootstrap"].key.high == fit.MAX_DRAWS
