"""Suites of benchmarks by name: each is a module with BENCHMARKS, build, summarise and items (see `phi3_report`)."""

from __future__ import annotations

import importlib
from types import ModuleType

from phi3_jax.errors import UserError, nearest

SUITES = ("phi3_report",)


def load(name: str) -> ModuleType:
    """The module of a suite.

    Raises:
      UserError: no such suite, naming the nearest.
    """
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}{nearest(name, SUITES)}")
    return importlib.import_module(f"{__name__}.{name}")
