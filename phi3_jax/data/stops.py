"""Which tokens end a reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.records import files

TURN_ENDS = ("<|end|>", "<|endoftext|>", "</s>")


def stop_ids(tokenizer: Tokenizer | None, folder: Path | None = None, vocab: int | None = None) -> tuple[int, ...]:
    """The union of the tokenizer's end, the ends of a turn, and what a model's files list as `eos_token_id`.

    Args:
      tokenizer: or None.
      folder: with config.json and generation_config.json, or without.
      vocab: of the model; ids beyond it, which small models of other libraries name by default, are never drawn and left
        out.

    Raises:
      UserError: an `eos_token_id` that is neither an id nor a list of ids.
    """
    found = set()
    if tokenizer is not None:
        special = tokenizer.special_tokens
        found = {tokenizer.eos_id, *(special[s] for s in TURN_ENDS if s in special)}
    for path in (folder / "config.json", folder / "generation_config.json") if folder else ():
        if path.is_file():
            found |= set(_listed(files.read_json(path).get("eos_token_id"), path))
    return tuple(sorted(i for i in found if vocab is None or i < vocab))


def _listed(value: Any, path: Path) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise UserError(
                f"{path}: eos_token_id={value!r:.60} must be a token id (0 or more), a list of them, or null"
            )
    return ids
