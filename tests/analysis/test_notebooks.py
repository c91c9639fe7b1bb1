"""Every notebook runs from a clone as it stands, and shows what it kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
NOTEBOOKS = sorted((HERE / "analysis").glob("*.ipynb"))
nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -e '.[test]'")


def test_there_are_notebooks() -> None:
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_prints_what_it_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    monkeypatch.setenv(
        "PYTHONPATH", f"{HERE / 'analysis'}{os.pathsep}{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    for name in ("published", "results"):
        shutil.copytree(HERE / "analysis" / name, tmp_path / "analysis" / name)
    shutil.copytree(HERE / "experiments", tmp_path / "experiments")
    kept, fresh = nbformat.read(path, 4), nbformat.read(path, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(tmp_path / "analysis")}})
    client.execute()
    _same("\n".join(_texts(fresh)), "\n".join(_texts(kept)))
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    figures = sorted(re.findall(r'show\(.*?"(\d\d_\w+)"\)', "\n".join(cell.source for cell in code)))
    made = sorted(p.stem for p in (tmp_path / "analysis" / "figures").glob("*.svg"))
    assert made and set(made) <= set(figures)
    assert all((HERE / "analysis" / "figures" / f"{name}.svg").exists() for name in made)


def _same(fresh: str, kept: str) -> None:
    """The same words, and numbers that agree: of a hundred three may differ, where a search ends at a bound elsewhere."""
    number = re.compile(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?")
    assert number.sub("#", fresh) == number.sub("#", kept), "run the notebook again and keep its outputs"
    pairs = [
        tuple(float(x.replace(",", "")) for x in pair)
        for pair in zip(number.findall(fresh), number.findall(kept), strict=True)
    ]
    apart = [(a, b) for a, b in pairs if abs(a - b) > 0.011 + 0.01 * abs(b)]
    assert len(apart) <= 0.03 * len(pairs), f"run the notebook again and keep its outputs: {apart[:10]}"


def test_a_changed_table_is_seen() -> None:
    _same("gain 5.31 of 1,024", "gain 5.32 of 1,024")
    with pytest.raises(AssertionError):
        _same("gain 5.31", "loss 5.31")
    with pytest.raises(AssertionError):
        _same("1.0 2.0 3.0", "1.0 2.0 4.0")


def _texts(notebook: object) -> list[str]:
    """Tables and printed text of a notebook, without pictures."""
    out = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found = output.get("text") or data.get("text/html") or data.get("text/markdown")
            out += [found] if found and "image/png" not in data else []
    return out
