"""Small Hugging Face folders with random weights, shaped as the committed goldens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from phi3_jax import family
from phi3_jax.configs import LongRope, Vision
from phi3_jax.interop import hf_config, huggingface, safetensors
from phi3_jax.interop.templates import JINJA

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file with `tensors`."""
    names = safetensors.NAMES | {np.dtype(np.float64): "F64"}
    entries = safetensors.plan({k: (names[v.dtype], v.shape) for k, v in tensors.items()}, folder)
    with safetensors.Files({e.path for e in entries.values()}, write=True) as files:
        for name, entry in entries.items():
            files.write_at(entry.path, entry.offset, np.ascontiguousarray(tensors[name]))


def random_folder(folder: Path, kind: str, dtype: type, **fields: object) -> Path:
    """A folder with the config of golden `kind`, changed by `fields`, and random weights."""
    config = json.loads((GOLDENS / f"{kind}.json").read_text())["config"] | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(3)
    shapes = huggingface.published_tensors(hf_config.from_config(config, kind))
    write_tensors(folder, {k: (random.standard_normal(s) * 0.3).astype(dtype) for k, s in shapes.items()})
    return folder


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    entries = safetensors.find(folder)
    tensors = {k: np.empty(e.shape, safetensors.READ[e.dtype]) for k, e in entries.items()}
    with safetensors.Files({e.path for e in entries.values()}) as files:
        for name, entry in entries.items():
            files.read_into(entry.path, entry.offset, tensors[name])
    return tensors


EYES = Vision(embed=24, layers=3, heads=3, mlp=40, tile=48, patch=2, crops=4)  # 144 tokens a tile, of few pixels


def vision_folder(folder: Path, seed: int = 3) -> Path:
    """A tiny phi-3-vision with random float32 weights and a tokenizer of its own."""
    import tokenizers

    half = 8
    cfg = dataclasses.replace(
        family.published("vision"), name="tiny", vocab=320, embed=64, layers=2, heads=4, kv_heads=4, head_dim=2 * half,
        mlp=96, context=4096, vision=EYES,
        longrope=LongRope(512, tuple(1 + 0.02 * i for i in range(half)), tuple(2 + 1.5 * i for i in range(half))),
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config.to_config(cfg, "float32")))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": EYES.crops}))
    random = np.random.default_rng(seed)
    shapes = huggingface.published_tensors(cfg)
    write_tensors(folder, {k: (random.standard_normal(s) * 0.2).astype(np.float32) for k, s in shapes.items()})
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
    )  # fmt: skip
    made.train_from_iterator(["what is in this picture? a dog and a chart."] * 3, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA["vision"]}))
    return folder
