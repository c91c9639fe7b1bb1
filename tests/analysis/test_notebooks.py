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
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_prints_what_it_kept(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in ("published", "results"):
        shutil.copytree(HERE / "analysis" / name, tmp_path / "analysis" / name)
    shutil.copytree(HERE / "experiments", tmp_path / "experiments")
    kept, fresh = nbformat.read(path, 4), nbformat.read(path, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(tmp_path / "analysis")}})
    client.execute()
    assert _texts(fresh) == _texts(kept), "run the notebook again and keep its outputs"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    figures = sorted(re.findall(r'show\(.*?"(\d\d_\w+)"\)', "\n".join(cell.source for cell in code)))
    made = sorted(p.stem for p in (tmp_path / "analysis" / "figures").glob("*.svg"))
    assert made and set(made) <= set(figures)
    assert all((HERE / "analysis" / "figures" / f"{name}.svg").exists() for name in made)


def _texts(notebook: object) -> list[str]:
    """Tables and printed text of a notebook, without pictures."""
    out = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found = output.get("text") or data.get("text/html") or data.get("text/markdown")
            out += [found] if found and "image/png" not in data else []
    return out
