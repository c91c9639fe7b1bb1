"""The command `launch/export.py`: a model as one GGUF file that llama.cpp runs, whole or not at all.

The published tensors (`huggingface.tensors_of`) are the source, a layer at a time. Norm gains and LongRoPE's factors are
float32, every matrix is in the file's format: embedding and output too, so phi-3-mini in q4_0 takes 2.15 GB (llama.cpp's
own quantize would give the output 6 bits, q6_K, which Python cannot write). llama.cpp ignores phi-3's sliding window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.data import stops, tokenizers
from phi3_jax.errors import UserError, nearest
from phi3_jax.interop import convert, huggingface, loading, quantized, safetensors
from phi3_jax.models.quantized import FORMATS
from phi3_jax.models.rotary import attention_factor
from phi3_jax.records import files, targets
from phi3_jax.records.folder import KEPT

# Largest magnitude that a format holds: float16's, times the integers a float16 scale multiplies.
LIMITS = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}
FILES = ("f16", "q8_0", "q4_0")
BLOCK = 32  # weights of a row that share a scale in q8_0 and q4_0
# llama.cpp strips blanks after the control tokens of a model whose name says phi-3, and then needs these to exist.
_PHI3, _PHI3_TOKENS = re.compile("phi-?3", re.IGNORECASE), {"<s>", "</s>", "<unk>", "<|endoftext|>"}


def command(flags: Mapping[str, Any]) -> None:
    """The command: a GGUF file, or safetensors."""
    start, model, (kind, _, target) = time.perf_counter(), flags["model"], flags["to"].partition(":")
    if kind not in ("gguf", "hf") or not target:
        raise UserError(f"--to {flags['to']}: write gguf:FILE or hf:FOLDER")
    if kind == "hf":
        if lost := [f"--{f}" for f in ("format", "name") if flags[f]]:
            raise UserError(f"{' and '.join(lost)} has no meaning for --to hf:FOLDER, which keeps the stored dtype")
        if model.startswith("hf:") and not flags["adapter"]:
            raise UserError(f"--model {model} is a Hugging Face folder already; write --to gguf:FILE")
        if loading.is_quantised(model):
            raise UserError(f"{model} is quantised; export the run it was made from, or write --to gguf:FILE")
        cfg, size = convert.export_run(model, Path(target), flags["adapter"])
        print(f"{cfg.label}: {cfg.name}, {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s, {flags['to']}")
        return
    cfg, form, size, notice = export_gguf(model, Path(target), flags["format"], flags["name"], flags["adapter"])
    weights = sum(math.prod(shape) for shape in huggingface.published_tensors(cfg).values())
    if notice:
        print(notice)
    print(f"{cfg.label}: {form}, {size / 1e9:.2f} GB, {target}, {8 * size / weights:.2f} bits per weight")


def export_gguf(
    model: str, target: Path, form: str | None = None, name: str | None = None, adapter: str | None = None
) -> tuple[ModelConfig, str, int, str]:
    """Writes a model as one GGUF file; memory holds a few layers at a time.

    Args:
      model: a run, one of its checkpoints, "hf:FOLDER", or a quantised run, whose blocks are written as they are.
      target: the file; must not exist.
      form: one of FILES; default: what the file's name says.
      name: general.name; default: the model's.
      adapter: a run whose adapters are merged into the weights.

    Returns:
      The model, the format, the file's bytes, and a line for the user ("" where there is nothing to say).

    Raises:
      UserError: the target then is as it was.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF export needs the package gguf: pip install 'phi3_jax[gguf]'") from None
    form = _format(target, form)
    source = _source(model, adapter)
    cfg = source.cfg
    factors = _check(cfg, form)
    if source.blocks and source.blocks.format != form:
        has = source.blocks.format
        raise UserError(f"{model} is quantised in {has}, not {form}; export it as {has}, or the run it was made from")
    vocabulary, notice = _vocabulary(source.kept, loading.tokenizer_of(source.kept, source.run), cfg.vocab)
    writer = gguf.GGUFWriter(None, "phi3")
    _add_model(writer, cfg, form, _name(cfg, name, vocabulary))
    if vocabulary:
        vocabulary.write(writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    slots, total = plan(cfg, form)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, cfg.layers)
    for tensor, slot in slots.items():
        kind = gguf.GGMLQuantizationType[slot.kind]
        found = names.get_name(tensor, (".weight",)) or tensor
        writer.add_tensor_info(found, slot.shape, np.dtype(np.float32), slot.size, kind)
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(targets.whole(target, total, file=True))
        writer.write_header_to_file(partial)
        stack.callback(writer.close)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        start = writer.ggml_pad(partial.stat().st_size, writer.data_alignment)
        file = writer.fout[0]  # type: ignore[index]  # open since its header was written
        os.posix_fallocate(file.fileno(), 0, start + total)  # a full disk is found out now
        with safetensors.Files([partial], write=True) as written:
            _write(written, partial, start, slots, cfg, form, source.read, factors)
    return cfg, form, start + total, notice


def _write(
    written: safetensors.Files,
    path: Path,
    start: int,
    slots: Mapping[str, Slot],
    cfg: ModelConfig,
    form: str,
    read: Read,
    factors: Mapping[str, float],
) -> None:
    """Writes every tensor into its slot of the data that begins at byte `start`, a few layers at a time."""

    def put(tensor: str, at: int, rows: np.ndarray) -> int:
        data = rows if rows.dtype == np.uint8 else encode(rows, slots[tensor].kind, tensor)
        written.write_at(path, start + slots[tensor].offset + at, data)
        return data.nbytes

    def one(item: tuple[int | None, str, Any]) -> None:
        layer, leaf, spec = item
        part = read(leaf, layer)
        if factors and part.dtype == np.uint8:
            part = _scaled_blocks(leaf, part, cfg, factors, form)
        elif factors:
            part = huggingface.scaled(leaf, part.astype(np.float32), cfg, factors)
        for tensor in huggingface.tensors_of(leaf, spec, cfg, part, layer):
            at = 0
            for _, view in huggingface.blocks_of(tensor):
                block = np.empty(view.shape, view.dtype)
                huggingface.copy_into(block, view)
                at += put(tensor.name, at, block.reshape(-1, tensor.shape[-1]))

    for tensor, values in _rope_factors(cfg).items():
        put(tensor, 0, values)
    with ThreadPoolExecutor(huggingface.THREADS) as pool:
        for _ in pool.map(one, list(huggingface.parts_of(cfg))):
            pass


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file's data: first byte, bytes, shape, ggml's name of its format."""

    offset: int
    size: int
    shape: tuple[int, ...]
    kind: str


def plan(cfg: ModelConfig, form: str) -> tuple[dict[str, Slot], int]:
    """{published name: its slot} and the bytes of them all: LongRoPE's factors, embedding, layer by layer, the rest."""
    import gguf

    shapes = {k: v.shape for k, v in _rope_factors(cfg).items()} | huggingface.published_tensors(cfg)
    slots: dict[str, Slot] = {}
    total = 0
    for name, shape in shapes.items():
        kind = form.upper() if len(shape) == 2 else "F32"
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        slots[name] = Slot(total, math.prod(shape) // block * block_bytes, shape, kind)
        total += gguf.GGUFWriter.ggml_pad(slots[name].size, gguf.GGUF_DEFAULT_ALIGNMENT)
    return slots, total


def encode(rows: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Rows (n, columns) of any float dtype in a GGUF format ("F32", "F16", "Q8_0", "Q4_0"): an array of its bytes.

    Raises:
      UserError: a value the format cannot hold; names the tensor.
    """
    import gguf

    rows = rows.astype(np.float32, copy=False)
    peak = float(max(rows.max(), -rows.min()))
    if not peak <= LIMITS[kind]:
        raise UserError(
            f"{name} holds {peak:g}, and {kind.lower()} ends at {LIMITS[kind]:g}; export it with --to hf:FOLDER"
        )
    return np.ascontiguousarray(gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]))


# ------------------------------------------------------------------------------------------------ what is asked


def _format(target: Path, form: str | None) -> str:
    said = {f for f in FILES if f".{f}." in target.name.lower()}
    if form is None:
        if len(said) != 1:
            names = " or ".join(f"{target.name.removesuffix('.gguf')}.{f.upper()}.gguf" for f in FILES)
            raise UserError(f"{target.name} names no format; call it {names}, or give --format {'|'.join(FILES)}")
        return said.pop()
    if form.lower() not in FILES:
        raise UserError(f"unknown format {form!r}{nearest(form, FILES)}")
    if said - {form.lower()}:
        raise UserError(f"{target.name} says {said.pop()} and --format says {form}; drop one of them")
    return form.lower()


def _check(cfg: ModelConfig, form: str) -> Mapping[str, float]:
    """The factors to fold into the weights (`huggingface.folding`); UserError for what llama.cpp's phi3 cannot run."""
    odd = {
        "eyes": cfg.vision, f"the layout {cfg.layout}": cfg.layout not in ("phi3", "phi3_v"),
        "experts": cfg.experts, "LayerNorm": cfg.norm != "rms",
        "biases": cfg.bias,
        f"heads x head_dim = {cfg.inner} unlike its width of {cfg.embed}": cfg.inner != cfg.embed,
        "block-sparse attention": cfg.blocksparse, "masked tokens": cfg.dummy_tokens,
        "its own multipliers": (cfg.attention_divisor, cfg.attention_multiplier) != ("sqrt", 1.0)
        or (cfg.mup is None and (cfg.embed_multiplier, cfg.logit_divisor) != (1.0, 1.0)),
    }  # fmt: skip
    if has := [what for what, present in odd.items() if present]:
        raise UserError(
            f"{cfg.label} has {', '.join(has)}: llama.cpp's phi3 runs mini and medium only; it can be exported as "
            "safetensors: --to hf:FOLDER"
        )
    rope = cfg.longrope
    if rope and (rope.short is None or rope.long is None):
        raise UserError(f"{cfg.name} lacks a LongRoPE list; take both from the checkpoint's config.json")
    if rope and len({attention_factor(rope, cfg.context, long) for long in (False, True)}) > 1:
        raise UserError(
            f"{cfg.name} has different attention factors for short and long inputs, and GGUF has one; it can be exported "
            "as safetensors: --to hf:FOLDER"
        )
    factors = huggingface.folding(cfg)
    if cfg.tied and {"embedding", "unembedding"} & set(factors):
        raise UserError(f"{cfg.name} ties its embeddings, which cannot take muP's two factors; train it untied")
    for name, shape in huggingface.published_tensors(cfg).items():
        if form != "f16" and len(shape) == 2 and shape[-1] % BLOCK:
            raise UserError(
                f"{name} has rows of {shape[-1]}, which {form} cannot cut into blocks of {BLOCK}; use --format f16"
            )
    return factors


Read = Callable[[str, int | None], np.ndarray]  # (leaf, layer or None) -> that part of the parameters


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is exported: the model, the folder with its tokenizer, its run (None for a Hugging Face folder), what reads it.

    `blocks` is set for a quantised run.
    """

    cfg: ModelConfig
    kept: Path
    run: Path | None
    read: Read
    blocks: quantized.Reader | None = None


def _source(model: str, adapter: str | None = None) -> _Source:
    if loading.is_quantised(model) and not adapter:
        run, cfg = Path(model), loading.run_config(Path(model))
        blocks = quantized.Reader(run, cfg)
        read = functools.partial(_blocks_of, blocks, huggingface.leaves_of(cfg))
        return _Source(cfg, run / KEPT, run, read, blocks)
    weights = loading.open_weights(model, adapter=adapter)
    return _Source(weights.config, weights.kept, weights.run, weights.part)


def _blocks_of(reader: quantized.Reader, specs: Mapping[str, Any], leaf: str, layer: int | None) -> np.ndarray:
    """A part of a quantised run, in the shape of the leaf's with the bytes of a row where its inputs were."""
    part = reader.read(leaf, layer)
    if part.dtype != np.uint8 or leaf == "embedding":
        return part
    shape, inputs = specs[leaf].shape[layer is not None :], quantized.inputs_of(leaf, specs[leaf])
    return part.T.reshape(part.shape[1], *[1] * (inputs - 1), *shape[inputs:])


def _scaled_blocks(
    leaf: str, part: np.ndarray, cfg: ModelConfig, factors: Mapping[str, float], form: str
) -> np.ndarray:
    """`huggingface.scaled` of blocks, whose float16 scales it multiplies; `part` as of `_blocks_of`."""
    axis = -1 if leaf == "embedding" else 0
    rows = np.moveaxis(part, axis, -1)
    blocks = np.ascontiguousarray(rows).reshape(*rows.shape[:-1], -1, FORMATS[form].group_bytes)
    scales = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    whole = np.moveaxis(scales.reshape(*rows.shape[:-1], -1), -1, axis)
    whole = np.moveaxis(huggingface.scaled(leaf, np.ascontiguousarray(whole), cfg, factors), axis, -1)
    blocks[..., :2] = np.ascontiguousarray(whole[..., None].astype(np.float16)).view(np.uint8)
    return np.moveaxis(blocks.reshape(rows.shape), -1, axis)


# ------------------------------------------------------------------------------------------------ keys


def _add_model(writer: Any, cfg: ModelConfig, form: str, name: str) -> None:
    """The keys that llama.cpp's phi3 reads, as its own converter writes them (`conversion/phi.py`)."""
    import gguf

    rope = cfg.longrope
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(cfg.label)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(cfg.vocab)
    writer.add_context_length(cfg.context)
    writer.add_rope_scaling_orig_ctx_len(rope.original_context if rope else cfg.context)
    writer.add_embedding_length(cfg.embed)
    writer.add_feed_forward_length(cfg.mlp)
    writer.add_block_count(cfg.layers)
    writer.add_head_count(cfg.heads)
    writer.add_head_count_kv(cfg.kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_sliding_window(cfg.sliding_window or 0)
    if rope:
        writer.add_rope_scaling_attn_factors(attention_factor(rope, cfg.context, long=True))


def _rope_factors(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """LongRoPE's lists, float32 (head_dim/2,), once for all layers; none without LongRoPE."""
    lists = {"long": cfg.longrope.long, "short": cfg.longrope.short} if cfg.longrope else {}
    return {f"rope_factors_{which}.weight": np.asarray(values, np.float32) for which, values in lists.items()}


@dataclasses.dataclass
class Vocabulary:
    """A sentencepiece vocabulary as llama.cpp reads it; lists by token id, filled up to the model's size.

    Attributes:
      texts, scores, types: of each token; of two neighbours that could be joined, the higher score goes first.
      known: gguf.SpecialVocab: special ids, whether to put begin and end tokens, the chat template.
      prefix: a blank is put before the text.
      stripping: control tokens swallow the blanks after them.
    """

    texts: list[str]
    scores: list[float]
    types: list[int]
    known: Any
    prefix: bool = False
    stripping: bool = False

    def put(self, i: int, text: str, score: float, kind: str) -> None:
        import gguf

        if i >= len(self.texts):
            raise UserError(
                f"token {text!r} has id {i}, and the model has {len(self.texts)} embeddings; give it its own tokenizer"
            )
        self.texts[i], self.scores[i], self.types[i] = text, score, int(gguf.TokenType[kind])

    def write(self, writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.texts)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        writer.add_add_space_prefix(self.prefix)
        self.known.add_to_gguf(writer, quiet=True)


def _name(cfg: ModelConfig, name: str | None, vocabulary: Vocabulary | None) -> str:
    """general.name: says phi-3 exactly where the control tokens swallow blanks, for llama.cpp goes by it."""
    lost = _PHI3_TOKENS - set(vocabulary.texts) if vocabulary else set()
    if name is not None:
        if lost and _PHI3.search(name):
            raise UserError(
                f"--name {name}: llama.cpp wants {', '.join(sorted(lost))} in the vocabulary of a model called phi-3; "
                "choose a name without phi-3"
            )
        return name
    if vocabulary is None:
        return cfg.name
    if lost or not vocabulary.stripping:
        return _PHI3.sub("phi_3", cfg.name)
    return cfg.name if _PHI3.search(cfg.name) else f"phi-3 {cfg.name}"


def _vocabulary(kept: Path, tokenizer: tokenizers.Tokenizer | None, size: int) -> tuple[Vocabulary | None, str]:
    """The tokens of a model, or None and a line for the user."""
    import gguf

    if tokenizer is None:
        return None, "notice: the model came without a tokenizer; the file holds no vocabulary, so give token ids"
    empty = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size, [int(gguf.TokenType.UNUSED)] * size
    vocabulary = Vocabulary(*empty, gguf.SpecialVocab(kept, n_vocab=size), stripping=bool(tokenizer.stripping))
    for which in ("bos", "eos"):
        vocabulary.known.add_special_token.setdefault(which, False)
    if tokenizer.kind == "bytes":
        _fill_bytes(vocabulary, size)
    elif tokenizer.kind != "huggingface" or not _fill_bpe(vocabulary, kept, tokenizer):
        return None, (
            f"notice: llama.cpp would cut text otherwise than this {tokenizer.kind} tokenizer; the file holds no "
            "vocabulary, so give token ids"
        )
    special, known = tokenizer.special_tokens, vocabulary.known.special_token_ids
    listed = set(stops.stop_ids(tokenizer, kept, size)) - {known.get("eos")}
    # llama.cpp finds the usual ends by their text; of others it takes two.
    others = sorted(listed - {special[s] for s in stops.TURN_ENDS if s in special})
    known |= dict(zip(("eot", "eom"), others, strict=False))
    if lost := others[2:]:
        return vocabulary, (
            f"notice: a GGUF file names an end, an end of turn and an end of message; {', '.join(map(str, lost))} of "
            "eos_token_id will end no reply in llama.cpp, give it as a stop there"
        )
    return vocabulary, ""


def _fill_bytes(vocabulary: Vocabulary, size: int) -> None:
    """Bytes 0..255, <s>, </s>, <pad>, and <unk> where the table has a spare entry (nothing is unknown).

    llama.cpp writes a blank as "▁" before it looks it up, so byte 32 is that, a normal token.
    """
    for i in range(256):
        vocabulary.put(i, f"<0x{i:02X}>" if i != 32 else "▁", 0.0, "BYTE" if i != 32 else "NORMAL")
    for i, text in enumerate(("<s>", "</s>", "<pad>"), 256):
        vocabulary.put(i, text, -1000.0, "CONTROL")
    if size > 259:
        vocabulary.put(259, "<unk>", 0.0, "UNKNOWN")
    vocabulary.known.special_token_ids |= {"bos": 256, "eos": 257, "pad": 258, "unk": min(259, size - 1)}


def _fill_bpe(vocabulary: Vocabulary, kept: Path, tokenizer: tokenizers.Tokenizer) -> bool:
    """A BPE with byte fallback (tokenizer.json), which joins as sentencepiece does; False for any other.

    A token's score is -id, as in the sentencepiece models of the family; where the joins are not in the order of the
    ids, the joins' order.
    """
    spec = files.read_json(kept / "tokenizer.json")
    model = spec["model"]
    steps = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
    ids, byte_texts = model["vocab"], {f"<0x{i:02X}>" for i in range(256)}
    plain = set(re.findall(r'"type": "(\w+)"', steps)) <= {"Sequence", "Prepend", "Replace", "Metaspace"}
    joins_alike = model["type"] == "BPE" and model.get("byte_fallback") and byte_texts <= set(ids)
    if not (joins_alike and plain and "▁" in steps):
        return False
    joins: dict[int, int] = {}
    for rank, pair in enumerate(model["merges"]):
        joins.setdefault(ids["".join(pair.split(" ") if isinstance(pair, str) else pair)], rank)
    in_order = list(joins) == sorted(joins)
    for text, i in ids.items():
        vocabulary.put(i, text, float(-i if in_order else -joins.get(i, 0)), "BYTE" if text in byte_texts else "NORMAL")
    for token in spec.get("added_tokens") or ():
        kind = "CONTROL" if token["content"] in tokenizer.special_tokens else "USER_DEFINED"
        vocabulary.put(token["id"], token["content"], -1000.0, kind)
    vocabulary.known.special_token_ids.setdefault("eos", tokenizer.eos_id)
    if (unknown := model.get("unk_token")) in ids:
        vocabulary.put(ids[unknown], unknown, 0.0, "UNKNOWN")
        vocabulary.known.special_token_ids["unk"] = ids[unknown]
    vocabulary.prefix = re.search(r'"Prepend"|"prepend_scheme": "(always|first)"', steps) is not None
    return True
