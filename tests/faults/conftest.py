"""The table of faults, printed after the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "interop")]  # harness, hf_folders

HEADER = ("fault", "injected", "recovered", "steps lost", "how it ends")


@pytest.fixture
def table(record_property):
    """Call with one row of the table."""
    return lambda *row: record_property("fault", [str(cell) for cell in row])


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    rows = [value for report in passed for name, value in report.user_properties if name == "fault"]
    for row in [HEADER, ["---"] * len(HEADER), *rows] if rows else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")
