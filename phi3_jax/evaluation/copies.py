"""A model on several devices, a whole copy on each: every call is split, and the copies answer at the same time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from phi3_jax.errors import UserError
from phi3_jax.inference.engine import Completion, Engine, Ids, Score
from phi3_jax.inference.sampling import Sampling
from phi3_jax.interop.loading import Model
from phi3_jax.interop.templates import Template


def engine_of(model: Model, batch: int, devices: int = 1) -> Engine | Copies:
    """An engine on the device that holds the model, or copies on the first so many devices.

    Raises:
      UserError: more devices than there are.
    """
    if devices == 1:
        return Engine(model, batch=batch)
    here = jax.local_devices()
    if devices > len(here):
        raise UserError(
            f"{devices} copies of the model are more than the {len(here)} devices here; ask for up to {len(here)}"
        )
    return Copies([_on(model, device, batch) for device in here[:devices]])


def _on(model: Model, device: jax.Device, batch: int) -> Engine:
    return Engine(dataclasses.replace(model, params=jax.device_put(model.params, device)), batch=batch)


class Copies:
    """Engines with the same weights as one; what it gives is what one gives, but for the last digits.

    Args:
      engines: one a device.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = list(engines)
        first = self._engines[0]
        self.tokenizer, self.config, self.dtype = first.tokenizer, first.config, first.dtype

    @property
    def template(self) -> Template:
        """See `Engine.template`."""
        return self._engines[0].template

    @property
    def batch(self) -> int:
        """Rows at a time, on each device."""
        return self._engines[0].batch

    @batch.setter
    def batch(self, rows: int) -> None:
        for engine in self._engines:
            engine.batch = rows

    def encode(self, prompt: str | Ids) -> list[int]:
        """See `Engine.encode`."""
        return self._engines[0].encode(prompt)

    def score(self, pairs: Sequence[tuple[Ids, Ids]], shared: int = 0) -> list[Score]:
        """See `Engine.score`."""
        return self._split(len(pairs), lambda engine, a, b: engine.score(pairs[a:b], shared))

    def generate(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        stop: Sequence[str] = (),
        images: Sequence[Sequence[Any]] | None = None,
        shared: int = 0,
    ) -> list[Completion]:
        """See `Engine.generate`; what is drawn for a prompt is what one device draws."""
        return self._split(
            len(prompts),
            lambda engine, a, b: engine.generate(
                prompts[a:b],
                max_new_tokens,
                sampling,
                stop,
                images=images and images[a:b],
                draws=range(a, b),
                shared=shared,
            ),
        )

    def _split(self, count: int, ask: Callable[[Engine, int, int], list[Any]]) -> list[Any]:
        """The answers to `count` requests, of which each engine gets as many, one after another."""
        share = -(-count // len(self._engines))
        spans = [(e, i * share, min(count, (i + 1) * share)) for i, e in enumerate(self._engines) if i * share < count]
        with ThreadPoolExecutor(len(self._engines)) as pool:
            found = list(pool.map(lambda span: ask(*span), spans))
        return [answer for part in found for answer in part]
