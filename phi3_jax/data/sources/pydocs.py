"""The documentation of this Python installation, which is everywhere and needs no network."""

from __future__ import annotations

import platform

from phi3_jax.data.corpora import text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Source, Texts

NAME = "pydocs"


def texts(spec: str, text_field: str = "text", whole: bool = False) -> Texts:
    """Documentation and docstrings; the version of Python says which."""
    found = text.pydocs()
    return Texts((d.text for d in found), Inputs(versions=[NAME, platform.python_version()]), NAME)


SOURCE: Source = documents.source(NAME, "documentation and docstrings of this Python installation", texts)
