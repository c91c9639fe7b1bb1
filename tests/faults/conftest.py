"""The table of faults, printed after the tests of this folder; the long test runs with `-m faults` only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

HEADER = ("fault", "injected", "recovered", "steps lost", "how it ends")


@pytest.fixture
def table(record_property):
    """Call with one row of the table."""
    return lambda *row: record_property("fault", [str(cell) for cell in row])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("faults") and "faults" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest tests/faults -m faults"))


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    rows = [value for report in passed for name, value in report.user_properties if name == "fault"]
    for row in [HEADER, ["---"] * len(HEADER), *rows] if rows else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")
