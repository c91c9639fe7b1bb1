"""Speed of pictures, beside torch's: `python benchmarks/vision.py [--runs N]`.

1. What pictures cost in training: batches/s that the loader makes of the seeing study's data (records, tiles and index of
   18 drawn pictures) and steps/s of its smallest proxy, the fastest consumer.
2. A picture from its JPEG to tiles, 16 crops: pictures/s here and of Pillow's and torch's steps, as Microsoft's processor
   takes them, whose pixels are first shown to be the same.
3. One picture of 2 x 2 tiles through tower, projector and language model, full width cut to a few layers, float32, logits
   of all 773 tokens: seconds here and of transformers' CLIPVisionModel and Phi3ForCausalLM (eager attention, inputs_embeds)
   with the same weights, whose logits are first shown to be the same.

Both sides of a table take turns in one process, on as many threads; medians, with the median of the ratios. Needs torch and
transformers (extra `peer`).
"""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag

LAYERS, TOWER, TIME = 2, 4, 773  # of the language model; of the tower, one of which never runs


def turns(runs: tuple[Callable[[], object], Callable[[], object]], count: int) -> tuple[float, float, float]:
    """Median seconds of two runs, in turns after one that is not counted, and the median of second / first."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(count + 1):
        for of, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            of.extend([time.perf_counter() - start] * bool(turn))
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    return statistics.median(seconds[0]), statistics.median(seconds[1]), ratio


def published(cfg: Any, params: Any) -> dict[str, Any]:
    """The parameters under their published names, as torch's."""
    import torch

    from phi3_jax.interop import huggingface
    from phi3_jax.models.spec import named

    values, found = {k: np.asarray(v) for k, v in named(params).items()}, {}
    for layer, leaf, spec in huggingface.parts_of(cfg):
        part = values[leaf] if layer is None else values[leaf][layer]
        for tensor in huggingface.tensors_of(leaf, spec, cfg, part, layer):
            whole = np.concatenate([view.reshape(-1) for view in tensor.views]).reshape(tensor.shape)
            found[tensor.name] = torch.from_numpy(whole)
    return found


def peer(
    cfg: Any, weights: dict[str, Any], tokens: np.ndarray, index: np.ndarray, tiles: np.ndarray
) -> Callable[[], Any]:
    """transformers' tower and language model around the projector, as a call that gives the logits."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

    eyes, prefix = cfg.vision, "model.vision_embed_tokens."
    clip = CLIPVisionModel._from_config(
        CLIPVisionConfig(
            hidden_size=eyes.embed, intermediate_size=eyes.mlp, num_hidden_layers=eyes.layers - 1,
            num_attention_heads=eyes.heads, image_size=eyes.tile, patch_size=eyes.patch, hidden_act="quick_gelu",
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    text = Phi3ForCausalLM._from_config(
        Phi3Config(
            vocab_size=cfg.vocab, hidden_size=cfg.embed, intermediate_size=cfg.mlp, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=cfg.context,
            sliding_window=None, pad_token_id=0,
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    seen = f"{prefix}img_processor."
    mine = {k.removeprefix(seen): v for k, v in weights.items() if k.startswith(seen)}
    if not any(k.startswith("vision_model.") for k in clip.state_dict()):
        mine = {k.removeprefix("vision_model."): v for k, v in mine.items()}
    clip.load_state_dict({k: v for k, v in mine.items() if k in clip.state_dict()})
    text.load_state_dict({k: v for k, v in weights.items() if not k.startswith(prefix)})
    first, second = ([weights[f"{prefix}img_projection.{i}.{kind}"] for kind in ("weight", "bias")] for i in (0, 2))
    ends = torch.stack([weights[f"{prefix}sub_GN"].reshape(-1), weights[f"{prefix}glb_GN"].reshape(-1)])
    ids, places, pixels = torch.from_numpy(tokens).long(), torch.from_numpy(index).long(), torch.from_numpy(tiles)
    side, linear = eyes.side, torch.nn.functional.linear

    def run() -> Any:
        with torch.inference_mode():
            x = clip(pixels).last_hidden_state[:, 1:].reshape(len(pixels), side, 2, side, 2, -1)
            x = torch.cat([x.permute(0, 1, 3, 2, 4, 5).reshape(-1, eyes.width), ends])
            table = linear(torch.nn.functional.gelu(linear(x, *first)), *second)
            embeds = text.get_input_embeddings()(ids)
            embeds = torch.where((places >= 0)[..., None], table[places.clamp(min=0)], embeds)
            return text(inputs_embeds=embeds, use_cache=False).logits

    return run


def model_table(count: int) -> None:
    import jax
    import jax.numpy as jnp

    from phi3_jax import family
    from phi3_jax.data import pictured
    from phi3_jax.models import decoder, vision
    from phi3_jax.models.spec import init_params

    full = family.published("vision-3.5")
    cfg = dataclasses.replace(
        full, layers=LAYERS, longrope=None, context=4096, sliding_window=None,
        vision=dataclasses.replace(full.vision, layers=TOWER),
    )  # fmt: skip
    params = jax.jit(lambda: init_params(cfg, 0))()
    album, random = pictured.Album(cfg), np.random.default_rng(0)
    pictures = album.open([random.integers(0, 256, (400, 400, 3), dtype=np.uint8)])
    places = [-1] * album.counts(pictures)[0]
    ids = [1, *places, *random.integers(3, 32000, TIME - 1 - len(places)).tolist()]
    prompt = pictured.Prompt(ids, pictures)
    tiles, index = pictured.batch([prompt], (1, TIME), album)
    tokens = pictured.tokens_of(ids)[None]

    @jax.jit
    def forward(params: Any, tokens: jax.Array, tiles: jax.Array, index: jax.Array) -> jax.Array:
        return decoder.forward(params, tokens, cfg, pictures=(vision.rows_of(params, tiles, cfg), index))

    real, a_tile = 5, cfg.vision.side**2
    ends_there = np.where(index >= real * a_tile, index - (len(tiles) - real) * a_tile, index)
    theirs = peer(cfg, published(cfg, params), tokens, ends_there, tiles[:real])  # no tile of padding
    given = [jnp.asarray(x) for x in (tokens, tiles, index)]
    ours = lambda: forward(params, *given).block_until_ready()  # noqa: E731
    logits = theirs().numpy()
    apart = float(np.abs(np.asarray(ours()) - logits).max() / np.abs(logits).max())
    assert apart < 1e-4, f"the two models differ by {apart:g} of the largest logit"
    here, there, ratio = turns((ours, theirs), count)
    print(f"tower of {TOWER - 1} layers, {LAYERS} layers, {TIME} tokens; logits differ by {apart:.1e} of the largest")
    print("| here, s | transformers, s | ratio |\n| --- | --- | --- |")
    print(f"| {here:.2f} | {there:.2f} | {ratio:.2f}x |", flush=True)


def steps(data: bytes, crops: int) -> Any:
    """Microsoft's processor's steps in Pillow and torch: the global view and the tiles."""
    import torch
    from PIL import Image

    from phi3_jax.data import images

    image = Image.open(io.BytesIO(data)).convert("RGB")
    grid = images.grid_of(*image.size, crops)  # wider than high here
    resized = image.resize(grid.resized, Image.Resampling.BILINEAR)
    whole = Image.new("RGB", (grid.columns * 336, grid.rows * 336), (255, 255, 255))
    whole.paste(resized, (0, grid.above))
    x = torch.from_numpy(np.array(whole)).permute(2, 0, 1).contiguous().float().div(255)
    x = x.sub_(torch.tensor(images.MEAN)[:, None, None]).div_(torch.tensor(images.STD)[:, None, None])
    view = torch.nn.functional.interpolate(x[None], size=(336, 336), mode="bicubic")
    cut = x.reshape(3, grid.rows, 336, grid.columns, 336).permute(1, 3, 0, 2, 4).reshape(-1, 3, 336, 336)
    return torch.cat([view, cut])


def processor_table(count: int) -> None:
    from PIL import Image

    from phi3_jax.configs import Vision
    from phi3_jax.data import images

    random, held = np.random.default_rng(0), io.BytesIO()
    small = random.integers(0, 256, (68, 120, 3), dtype=np.uint8)
    Image.fromarray(small).resize((1920, 1080), Image.Resampling.BICUBIC).save(held, "JPEG", quality=90)
    data = held.getvalue()
    ours = lambda: images.tiles_of(images.Picture(Image.open(io.BytesIO(data))), 16, Vision())  # noqa: E731
    theirs = lambda: steps(data, 16)  # noqa: E731
    apart = float(np.abs(ours() - theirs().numpy()).max())
    assert apart < 3e-6, f"pixels differ by {apart:g}"
    here, there, ratio = turns((ours, theirs), 3 * count)
    print(f"\n1,920 x 1,080 from JPEG to {len(ours())} tiles; pixels differ by {apart:.1e}")
    print("| here, pictures/s | Pillow and torch, pictures/s | ratio |\n| --- | --- | --- |")
    print(f"| {1 / here:.2f} | {1 / there:.2f} | {ratio:.2f}x |", flush=True)


def loader_table(count: int) -> None:
    import itertools
    import tempfile
    from pathlib import Path

    import jax

    from phi3_jax import experiment
    from phi3_jax.data import loader
    from phi3_jax.sharding.mesh import mesh_of
    from phi3_jax.study import data, runs
    from phi3_jax.training import step, train

    root, steps = Path(__file__).resolve().parents[1], 40
    config = experiment.load_config(f"{root}/experiments/vision.py:quick,tokens=190k")
    config.data.source, config.sizes, config.seeds = "drawn:picture", ("mini",), 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = data.export_data(data.data_arguments(config, "pico", 190_000), folder)
        (run,) = runs.plan_runs(config, "pico", manifest, folder, 1)
        ds, mesh, numbers = loader.open_dataset(folder), mesh_of(run), itertools.count()
        with jax.set_mesh(mesh):
            loss = train.loss_of(ds, run, mesh)
            get = train.batches(ds, run, mesh, loss, folder)
            state, train_step = step.init_state(run, mesh), step.compile_steps(run, loss)[0]
            batch = get(next(numbers))

            def load() -> None:
                for _ in range(steps):
                    jax.block_until_ready(get(next(numbers) % run.steps))

            def consume() -> None:
                nonlocal state
                for _ in range(steps):
                    state, _ = train_step(state, batch, np.float32(1e-3))
                jax.block_until_ready(state)

            here, there, ratio = turns((load, consume), count)
    print(f"\n{run.batch_windows} pictures a batch, {run.model.name}")
    print("| loader, batches/s | the proxy, steps/s | ratio |\n| --- | --- | --- |")
    print(f"| {steps / here:.1f} | {steps / there:.1f} | {ratio:.1f}x |", flush=True)


def main(flags: Mapping[str, Any]) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    loader_table(flags["runs"])
    processor_table(flags["runs"])
    model_table(flags["runs"])


COMMAND = Command(
    "benchmarks/vision.py",
    __doc__,
    main,
    {"runs": Flag(keys.whole("turns of each side", 5, 1))},
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
