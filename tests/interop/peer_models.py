"""Random Phi-3 folders written and run by transformers: `python peer_models.py FOLDER SEED COUNT`.

A process of its own, for torch and jax do not share threads well. Folder i gets `peer.npz`: the ids of five documents
(a to d, and the prompt of a reply), the float32 logits of a to d each alone, and a greedy reply with the margin of each of
its tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TIME, REPLY = 24, 5


def fields(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config of one random model, how it is stored)."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    kv, group, head_dim = pick(1, 2, 3), pick(1, 1, 2, 3), pick(4, 8, 16)
    heads = kv * group
    config = dict(
        num_attention_heads=heads, num_key_value_heads=kv, hidden_size=heads * head_dim, num_hidden_layers=pick(1, 2),
        intermediate_size=pick(12, 20, 33), vocab_size=pick(31, 48, 64), tie_word_embeddings=pick(False, False, True),
        sliding_window=pick(None, None, None, 1, 3, TIME - 1, TIME, 999), initializer_range=0.4, pad_token_id=0,
        max_position_embeddings=pick(TIME + REPLY, 64, 128), rms_norm_eps=pick(1e-5, 1e-6), bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": pick(1e4, 1e4, 5e5, 37.5)}
    if rng.random() < 0.5:
        half = head_dim // 2
        rope["rope_type"] = "longrope"
        rope["short_factor"] = [round(float(x), 6) for x in 1 + rng.random(half)]
        rope["long_factor"] = [round(float(x), 6) for x in 1 + 8 * rng.random(half)]
        rope |= pick({}, {}, {"attention_factor": 1.25}, {"factor": pick(0.5, 2.0, 7.0)})
        borders = (4, 9, TIME - 8, TIME - 1, TIME, TIME + 1, TIME + REPLY, 500)
        config["original_max_position_embeddings"] = pick(*borders)
    elif rng.random() < 0.4:
        config["head_dim"] = pick(4, 12, 16)
    if rng.random() < 0.3:
        config |= pick({"hidden_act": "swish"}, {"attention_bias": True})
    stored = dict(
        dtype=pick("float32", "float32", "bfloat16", "float16"), shards=pick("10GB", "10GB", "6KB"),
        spelling=pick("rope_parameters", "rope_scaling", "su"),
    )  # fmt: skip
    return config | {"rope_parameters": rope}, stored


def respell(path: Path, spelling: str) -> None:
    """config.json as the code of 2024 wrote it: `rope_scaling`, and its base at the top."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type")
    if kind == "longrope" and spelling == "su":
        kind = "su"  # today's transformers wants the original context inside as well
    else:
        rope.pop("original_max_position_embeddings", None)
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    path.write_text(json.dumps(config))


def write(folder: Path, rng: np.random.Generator) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    config, stored = fields(rng)
    torch.manual_seed(int(rng.integers(2**31)))
    model = Phi3ForCausalLM(Phi3Config(**config)).to(getattr(torch, stored["dtype"]))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.add_(torch.randn(x.shape).to(x.dtype) * 0.2)
    model.save_pretrained(folder, max_shard_size=stored["shards"])
    if stored["spelling"] != "rope_parameters":
        respell(folder / "config.json", stored["spelling"])
    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()

    original = config.get("original_max_position_embeddings", 0)
    cut = int(np.clip(original + rng.integers(-1, 2), 1, TIME - 1)) if original else int(rng.integers(1, TIME))
    lengths = {"a": TIME, "b": int(rng.integers(1, TIME)), "c": cut, "d": TIME - cut}
    found = {k: rng.integers(0, config["vocab_size"], n) for k, n in lengths.items()}
    found |= {f"logits_{k}": logits(found[k]) for k in lengths}
    # A reply reads one list from its first token on here; transformers changes lists inside, so it stays on one side.
    room = original - REPLY
    start = int(rng.integers(1, min(room, TIME) + 1)) if room >= 1 else min(original + 1, TIME)
    reply, margins = list(rng.integers(0, config["vocab_size"], start)), []
    for _ in range(REPLY):
        last = logits(np.array(reply))[-1]
        best = np.sort(last)[-2:]
        margins.append((best[1] - best[0]) / np.abs(last).max())
        reply.append(int(last.argmax()))
    found |= {"prompt": np.array(reply[:start]), "reply": np.array(reply[start:]), "margins": np.array(margins)}
    np.savez(folder / "peer.npz", **found)


if __name__ == "__main__":
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for number in range(int(sys.argv[3])):
        write(Path(sys.argv[1]) / f"{number:02d}", np.random.default_rng([int(sys.argv[2]), number]))
