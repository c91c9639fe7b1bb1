"""Text files of one's own: a file or a folder (phi3_jax.data.corpora.files says which are read)."""

from __future__ import annotations

from phi3_jax.data.corpora import files, text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Source, Texts


def texts(spec: str, text_field: str = "text", whole: bool = False) -> Texts:
    """Documents of the files; what is wrong with the path is an error at once."""
    report = text.ReadReport()
    found = text.documents(spec, text_field=text_field, report=report, whole=whole)
    assert report.account is not None
    name = files.local(spec).resolve().name
    return Texts((d.text for d in found), Inputs([report.account]), name, report.warning)


SOURCE: Source = documents.source("PATH", f"a file or folder of {files.WHAT}; links are followed", texts)
