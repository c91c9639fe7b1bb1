"""Study folders shared by the tests of this room: written once, reports drawn once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_study

from phi3_jax.reporting.page import write_report


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of studies by name, with their reports written."""
    root = tmp_path_factory.mktemp("runs")
    folders = {
        "whole": fake_study.write_study(root / "whole", seeds=3),
        "text": fake_study.write_study(root / "text", budgets=(4_000_000,), kind="text"),
        "single": fake_study.write_study(root / "single", ("medium",), (4_000_000,)),
        "broken": fake_study.write_study(root / "broken", budgets=(2_000_000, 4_000_000)),
    }
    fake_study.spoil(folders["broken"])
    for folder in folders.values():
        write_report(folder)
    return folders
