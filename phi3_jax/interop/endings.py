"""What an exported folder needs besides weights to read text and to stop: tokenizer, end ids, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.configs import ModelConfig
from phi3_jax.data import chat, stops
from phi3_jax.data.tokenizers import ByteTokenizer, Tokenizer
from phi3_jax.interop.templates import JINJA
from phi3_jax.records import files


def special_ids(tokenizer: Tokenizer | None, vocab: int) -> dict[str, Any]:
    """bos_token_id, eos_token_id (one, or a list) and pad_token_id; None where there is no tokenizer to say them."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ends = stops.stop_ids(tokenizer, vocab=vocab)
    bos = getattr(tokenizer, "bos_id", tokenizer.special_tokens.get("<s>"))
    pad = getattr(tokenizer, "pad_id", tokenizer.eos_id)
    return {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else list(ends), "pad_token_id": pad}


def write(folder: Path, cfg: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Adds what the folder has not: files of the byte tokenizer, generation_config.json, the member's chat template."""
    if tokenizer is None:
        return
    if isinstance(tokenizer, ByteTokenizer) and not (folder / "tokenizer.json").exists():
        _write_bytes(folder, cfg, tokenizer)
    if not (folder / "generation_config.json").exists():
        files.write_json(folder / "generation_config.json", special_ids(tokenizer, cfg.vocab))
    member = cfg.member if cfg.is_proxy else family.member_of(cfg)
    needed = {"<|user|>", "<|assistant|>", "<|end|>", chat.END}
    if tokenizer.kind == "huggingface" and member in family.RELEASED and needed <= set(tokenizer.special_tokens):
        path = folder / "tokenizer_config.json"
        record = files.read_json(path) if path.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
        if not record.get("chat_template") and not (folder / "chat_template.jinja").exists():
            files.write_json(path, record | {"chat_template": JINJA[family.RELEASED[member].template]})


def _write_bytes(folder: Path, cfg: ModelConfig, tokenizer: ByteTokenizer) -> None:
    """The byte tokenizer as a tokenizer.json: the same ids of every text, the same text of all ids but its three own."""
    import tokenizers as hf

    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", tokenizer.pad_id: "<pad>"}
    model = hf.Tokenizer(hf.models.BPE({letter: byte for byte, letter in _letters().items()}, []))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens([hf.AddedToken(names[i], special=True, normalized=False) for i in sorted(names)])
    files.write_text(folder / "tokenizer.json", json.dumps(json.loads(model.to_str()), indent=1, ensure_ascii=False))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.context,
    }
    files.write_json(folder / "tokenizer_config.json", about)


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it is printable Latin-1, else one from
    U+0100 on (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
