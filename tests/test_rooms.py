"""The house stands on floors: CONTRIBUTING's table of rooms, held against the imports of the package."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib.metadata
import re
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "phi3_jax"
FLOOR = re.compile(r"^\| (\d+) \| (.+?) \| ", re.MULTILINE)
SHIM = re.compile(r"^- `([\w.]+) -> ([\w.]+)`: ", re.MULTILINE)
# What a room must not bring in from outside, at import: {module prefix: forbidden packages}.
LIGHT = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "seqio", "matplotlib")
WITHOUT = {
    **dict.fromkeys(("errors", "statistics", "units", "chips", "cluster", "configs", "family", "experiment"), LIGHT),
    "scaling": LIGHT,
    "data": ("jax", "optax", "orbax", "matplotlib"),
    "curation": (*LIGHT, "pyarrow", "spacy", "daft"),
    "": ("torch", "transformers"),
}
ENGINE = ("daft", "ray")  # imported by curation/engine.py alone: rules are functions that any engine can run
ONLY_TASKS = ("tensorflow", "seqio", "tensorflow_datasets")  # imported by data/tasks.py alone


def modules(root: Path) -> dict[str, Path]:
    """{dotted name without the package: file}."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def _found(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """(import, whether it is inside a function, whether it is for annotations alone) of every import of a file."""
    tree = ast.parse(text)
    typing = [x for x in ast.walk(tree) if isinstance(x, ast.If) and "TYPE_CHECKING" in ast.dump(x.test)]
    typed = {id(x) for block in typing for x in ast.walk(block)}
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for x in ast.walk(f)}
    return [(x, id(x) in inside, id(x) in typed) for x in ast.walk(tree) if isinstance(x, ast.Import | ast.ImportFrom)]


def imports(path: Path, known: dict[str, Path], annotations: bool = True) -> Iterator[tuple[str, bool]]:
    """(module, whether it is inside a function) of every import; without those for `annotations` alone where not asked."""
    for node, inside, typed in _found(path.read_text()):
        if typed and not annotations:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}: relative import"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix(f"{PACKAGE}.") in known else str(node.module) for n in below]
        for name in dict.fromkeys(names):
            yield name, inside


def arrows(root: Path) -> dict[tuple[str, str], list[str]]:
    """{(room, room it imports): the modules that do}, imports inside functions among them."""
    known, found = modules(root), {}
    for module, path in known.items():
        for name, _ in imports(path, known):
            if name.startswith(f"{PACKAGE}."):
                target = name.removeprefix(f"{PACKAGE}.")
                a, b = module.split(".")[0], target.split(".")[0]
                if a and b and a != b:
                    found.setdefault((a, b), []).append(f"{module} -> {target}")
    return found


def floors(text: str) -> dict[str, int]:
    """{room: floor} of CONTRIBUTING's table."""
    return {room: int(n) for n, rooms in FLOOR.findall(text) for room in re.findall(r"`(\w+)`", rooms)}


def problems(root: Path) -> list[str]:
    """Every import that does not go down, and every room that is on no floor or on no disk."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table, excused = floors(text), {f"{a} -> {b}" for a, b in SHIM.findall(text)}
    rooms = {name.split(".")[0] for name in modules(root)} - {"", "__main__"}
    found = [f"{room} is on no floor" for room in sorted(rooms - table.keys())]
    found += [f"{room} is no room" for room in sorted(table.keys() - rooms)]
    for (a, b), places in arrows(root).items():
        if a in table and b in table and table[b] >= table[a]:
            found += [place for place in places if place not in excused]
    return found + rings(root, excused)


def rings(root: Path, excused: set[str]) -> list[str]:
    """Rooms that import one another, directly or through others."""
    below: dict[str, set[str]] = {}
    for (a, b), places in arrows(root).items():
        if set(places) - excused:
            below.setdefault(a, set()).add(b)
    ring = in_rings(below)
    return [f"a ring of rooms: {', '.join(ring)}"] if ring else []


def in_rings(below: dict[str, set[str]]) -> list[str]:
    """Those that come back to themselves."""

    def reach(room: str) -> set[str]:
        seen, todo = set(), [room]
        while todo:
            for other in below.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    return sorted(room for room in below if room in reach(room))


def test_no_import_goes_up() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    excused = [f"{a} -> {b}" for a, b in SHIM.findall(text)]
    print("\nimports that go up, defended in CONTRIBUTING.md:", *excused, sep="\n  ")
    assert len(floors(text)) > 15, "CONTRIBUTING.md has no table of rooms"
    assert not problems(ROOT)
    assert len(excused) <= 3
    used = {place for places in arrows(ROOT).values() for place in places}
    assert set(excused) <= used, "an excuse that nothing needs"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/layers.py", "from phi3_jax.training import step"),
        ("statistics.py", "def f():\n    from phi3_jax.study.runs import plan_runs"),
        ("records/files.py", "import phi3_jax.reporting.page"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    assert not problems(tmp_path)
    path = tmp_path / PACKAGE / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert any("ring" in p for p in problems(tmp_path)) and any(" -> " in p for p in problems(tmp_path))


def test_no_two_files_import_one_another() -> None:
    known, below = modules(ROOT), {}
    for module, path in known.items():
        names = {name.removeprefix(f"{PACKAGE}.") for name, _ in imports(path, known, annotations=False)}
        below[module] = names & known.keys()
    assert not in_rings(below)


def test_rooms_bring_in_no_more_than_they_may() -> None:
    known = modules(ROOT)
    for module, path in known.items():
        for name, lazy in imports(path, known):
            top = name.split(".")[0]
            for prefix, forbidden in WITHOUT.items():
                if (module == prefix or module.startswith(f"{prefix}.") or not prefix) and not lazy:
                    assert top not in forbidden, f"{module} imports {name}"
            assert top not in ONLY_TASKS or module == "data.tasks", f"{module} imports {name}"
            assert top not in ENGINE or module == "curation.engine", f"{module} imports {name}"
            assert top not in ("launch", "experiments"), f"{module} imports {name}"


def undeclared(folder: Path) -> list[str]:
    """Imports at the top of test files that `pip install -e '.[test]'` does not ask for."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = parser["options"]["install_requires"] + parser["options.extras_require"]["test"]
    declared = {canonical(x) for x in re.findall(r"^[\w.-]+", wanted, re.MULTILINE)}
    brought = {"ml_dtypes", "jaxlib", "datasets"}  # by jax and lm-eval
    own = {*brought, PACKAGE, "launch", "experiments", *sys.stdlib_module_names}
    own |= {path.stem for path in (ROOT / "tests").rglob("*")} | {
        path.stem for room in ("benchmarks", "analysis") for path in (ROOT / room).glob("*.py")
    }
    providers = importlib.metadata.packages_distributions()
    found = []
    for path in sorted(set(folder.rglob("*.py")) - {ROOT / "tests/interop/peer_models.py"}):  # marked `peer`
        for name in {name.split(".")[0] for name, inside in imports(path, {}) if not inside} - own:
            if not declared & {canonical(x) for x in providers.get(name, [name])}:
                found.append(f"{path.name}: {name}")
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_tests_import_what_their_extra_installs(tmp_path: Path) -> None:
    assert not undeclared(ROOT / "tests")
    (tmp_path / "test_planted.py").write_text("import json, numpy\nfrom transformers import AutoTokenizer\n")
    assert undeclared(tmp_path) == ["test_planted.py: transformers"]


def test_few_errors_of_types_are_ignored() -> None:
    """Each with its code; the settings of mypy except no room."""
    lines = [line for path in modules(ROOT).values() for line in path.read_text().splitlines()]
    ignored = [line for line in lines if "type: ignore" in line]
    assert len(ignored) <= 30 and all("type: ignore[" in line for line in ignored)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert PACKAGE in settings["files"] and settings["disallow_untyped_defs"] and settings["disallow_incomplete_defs"]
    excepted = {"ignore_errors", "exclude", "follow_imports"}
    assert not any(excepted & part.keys() for part in (settings, *settings["overrides"]))


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest imports them by it: two of one name cannot be collected together."""
    names = Counter(
        path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py")
    )
    assert [name for name, count in names.items() if count > 1] == []
