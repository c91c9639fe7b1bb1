"""Which tokens end a reply: the tokenizer's, the turn's, and those that a model's files list."""

from __future__ import annotations

import json

import pytest

from phi3_jax.data import stops, tokenizers
from phi3_jax.errors import UserError

BYTES = tokenizers.load("bytes")


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({}, None, (257,)),
        ({"eos_token_id": 5}, None, (5, 257)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6, 7, 257)),
        ({"eos_token_id": None}, {"eos_token_id": [0, 257, 7]}, (0, 7, 257)),
        ({"eos_token_id": 32000}, {"eos_token_id": [32000, 9]}, (9, 257)),  # another library's default
    ],
)
def test_the_union_of_all_that_say_so(tmp_path, config, generation, found) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stops.stop_ids(BYTES, tmp_path, 320) == found
    assert stops.stop_ids(None, tmp_path, 320) == tuple(
        i for i in found if i != 257 or generation == {"eos_token_id": [0, 257, 7]}
    )


@pytest.mark.parametrize("name", ("config.json", "generation_config.json"))
@pytest.mark.parametrize("value", ("</s>", -1, [3, "x"], 2.5, True, {"a": 1}, [[1]], [None]))
def test_what_is_no_id_is_refused_with_its_file(tmp_path, name, value) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=rf"/{name}: eos_token_id=.* must be a token id") as error:
        stops.stop_ids(BYTES, tmp_path, 320)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_json_is_named(tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        stops.stop_ids(BYTES, tmp_path)
