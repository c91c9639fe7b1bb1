"""TensorFlow data sets by name, which download where TFDS does."""

from __future__ import annotations

from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Request, Source


def recipe(request: Request) -> Recipe:
    """One source, "text", of the data set's text feature."""
    from phi3_jax.data import tasks  # the only way to TensorFlow

    how = documents.Packing.of(request)
    task = tasks.tfds_task(request.rest, how.tokenizer, request.options["text_field"])
    named = [documents.Named("text", 1.0, tasks.documents(task))]
    return documents.recipe(how, named, Inputs(), request.spec, seed=request.options["seed"])


SOURCE = Source(
    "tfds:NAME",
    "a TensorFlow data set with a text feature, NAME[/CONFIG][:VERSION][:SPLIT]; downloads where TFDS does",
    recipe,
    documents.OPTIONS | documents.SEED,
)
