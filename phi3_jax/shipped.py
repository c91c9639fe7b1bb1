"""Files that come along with the package: experiments and published tables, from a clone or from an installed wheel.

In a clone they lie beside the package, as `experiments/` and `analysis/`; `setup.py` copies them into a wheel, into the
folder `shipped` of the package. Both are named by their paths in a clone, from wherever a command is typed.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "shipped"
FOLDERS = ("experiments", "analysis/published", "analysis/results")  # what a wheel carries


def root() -> Path:
    """The folder that holds `FOLDERS`: of the wheel, or the clone."""
    return INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def find(name: str) -> Path:
    """A file as it is named from here; where there is none, and only then, the one of that name that comes along."""
    path, ours = Path(name), root() / name
    return ours if not path.exists() and name.startswith(FOLDERS) and ours.is_file() else path


def names(folder: str, pattern: str) -> list[str]:
    """The names of the files in one of `FOLDERS`."""
    return sorted(f"{folder}/{path.name}" for path in (root() / folder).glob(pattern))


def script(name: str) -> list[str]:
    """The words after `python` that type a command: `launch/NAME.py` in a clone, else `-m phi3_jax NAME`."""
    return [f"launch/{name}.py"] if (PACKAGE.parent / "launch" / f"{name}.py").is_file() else ["-m", "phi3_jax", name]
