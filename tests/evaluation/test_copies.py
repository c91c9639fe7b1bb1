"""A model on several devices answers as on one: scores, greedy replies and drawn ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from phi3_jax import proxy
from phi3_jax.data.tokenizers import load
from phi3_jax.errors import UserError
from phi3_jax.evaluation.copies import Copies, engine_of
from phi3_jax.inference.engine import Engine
from phi3_jax.inference.sampling import Sampling
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params

CFG = proxy("mini", "femto", "clean", vocab=320, context=128)
PAIRS = [([65 + i, 66, 67], [68 + i, 69]) for i in range(5)]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(init_params(CFG, 0), CFG, load("bytes"), jnp.float32)


def test_copies_answer_as_one(model: Model) -> None:
    alone, both = engine_of(model, 4), engine_of(model, 4, 2)
    assert isinstance(alone, Engine) and isinstance(both, Copies)
    where = [next(iter(jax.tree.leaves(engine._params)[0].devices())) for engine in both._engines]
    assert where == jax.local_devices()[:2], "control: two devices hold it"
    ours, theirs = both.score(PAIRS), alone.score(PAIRS)
    assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in theirs], abs=1e-5)
    prompts = [context for context, _ in PAIRS]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        said = [reply.ids for reply in both.generate(prompts, 4, sampling)]
        assert said == [reply.ids for reply in alone.generate(prompts, 4, sampling)]
    both.batch = 2
    assert [engine.batch for engine in both._engines] == [2, 2] and both.score(PAIRS[:1])[0].tokens == 2


def test_more_devices_than_there_are(model: Model) -> None:
    with pytest.raises(UserError, match="99 copies of the model are more than the 8 devices here"):
        engine_of(model, 4, 99)
