"""The ways out that error messages name exist: options, config keys, words, extras and files."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3_jax import experiment, verbs

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "phi3_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])
# Options of other programs that messages quote.
FOREIGN = {"--ntasks", "--mem", "--spot", "--cap-add", "--model_args", "--batch_size", "--confirm_run_unsafe_code"}


def text_of(node: ast.AST) -> str:
    """A message with `\0` where values are filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "\0"


def messages() -> Iterator[tuple[str, str]]:
    """(file, text) of every UserError."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError") and node.args:
                yield str(path.relative_to(ROOT)), text_of(node.args[0])


MESSAGES = list(messages())


def options() -> set[str]:
    """Every option that some command of this repository takes."""
    named = {
        name for command in verbs.TABLE.values() for name, flag in command.complete().flags.items() if not flag.bare
    }
    return {f"--{name}" for name in named | {"help"}} | {"--config.KEY"}


OPTIONS = options()


def experiments() -> dict[str, object]:
    found = {}
    for path in (ROOT / "experiments").glob("*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        found[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[path.stem])
    return found


def broken(text: str) -> list[str]:
    """The ways out in a message that do not exist."""
    lost = []
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[\w.]+)?", text):
        if option.startswith("--config."):
            name = option.removeprefix("--config.").rstrip(".")
            if name not in experiment.TABLE and name not in experiment.KEYS:
                lost.append(option)
        elif option not in OPTIONS | FOREIGN:
            lost.append(option)
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lost += [e for e in re.findall(r"pip install -e '\.\[(\w+)\]'", text) if e not in parser["options.extras_require"]]
    lost += [f for f in re.findall(r"(?:launch|experiments|docs)/[\w/.]*\w\.(?:py|md)", text) if not on_disk(f)]
    words = {word for module in experiments().values() for word in module.WORDS}
    known = words | {*experiment.TABLE} | {name.rpartition(".")[2] for name in experiment.TABLE}
    for name in re.findall(
        r"\b(?:use|add|set|give|leave|raise|lower|write|try|with) (?:config\.)?([a-z_]+(?:\.[a-z_]+)?)=", text
    ):
        lost += [f"{name}="] if name not in known and not name.isupper() else []
    return lost


def on_disk(name: str) -> bool:
    return (ROOT / name).exists() or name == "docs/new_task_guide.md"  # lm-eval's


def test_there_are_messages_and_a_wrong_one_is_found() -> None:
    assert len(MESSAGES) > 250
    wrong = "use --workdirr, --config.train.log_evry, pip install -e '.[evall]', launch/rum.py, or use sede=3"
    assert broken(wrong) == ["--workdirr", "--config.train.log_evry", "evall", "launch/rum.py", "sede="]
    assert not broken(
        "use --workdir or --config.train.log_every; pip install -e '.[eval]'; see launch/run.py, or use seed=3"
    )


@pytest.mark.parametrize("file", sorted({file for file, _ in MESSAGES}))
def test_the_ways_out_that_messages_name_exist(file: str) -> None:
    lost = {text.replace("\0", "_"): ways for where, text in MESSAGES if where == file and (ways := broken(text))}
    assert not lost
