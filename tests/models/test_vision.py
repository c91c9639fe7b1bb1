"""Tower, projector and places of pictures: against the original's tensors, NumPy in float64, and each row alone."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SHARED, check, read_golden, write_folder

from phi3_jax import family
from phi3_jax.configs import LongRope, ModelConfig, Vision
from phi3_jax.data import chat, images, pictured
from phi3_jax.errors import UserError
from phi3_jax.interop import huggingface, loading
from phi3_jax.models import decoder, spec, vision
from phi3_jax.models.layout import ANYWHERE
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh

EYES = Vision(embed=24, layers=3, heads=3, mlp=40, tile=28, patch=14, crops=4)  # a token a tile
HALF = 8
CFG = dataclasses.replace(
    family.published("vision"), name="tiny", vocab=97, embed=48, layers=2, heads=3, kv_heads=3, head_dim=2 * HALF, mlp=64,
    context=512, vision=EYES, sliding_window=None,
    longrope=LongRope(32, tuple(1 + 0.02 * i for i in range(HALF)), tuple(2 + 1.5 * i for i in range(HALF))),
)  # fmt: skip
VISION35 = SHARED / "vision2" / "vision35"


def params(cfg: ModelConfig = CFG, seed: int = 0) -> Any:
    """Random weights, large enough that every part shows."""
    tree = spec.init_params(cfg, seed)
    key = jax.random.key(seed + 1)
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.fold_in(key, w.size), w.shape), tree)


def tiles(count: int, side: int = EYES.tile, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("member", ["vision", "vision-3.5"])
def test_the_released_models_have_their_parameters(member: str) -> None:
    cfg = family.published(member)
    specs = spec.named_specs(cfg)
    assert spec.count_params(cfg) == 4_146_621_440 == family.published_params(member)
    eyes = {name: s.size for name, s in specs.items() if name.startswith("vision.")}
    assert sum(eyes.values()) == 303_507_456 + 22_026_240 + 8_192
    assert sum(n for name, n in eyes.items() if name.startswith("vision.unused.")) == 12_598_272
    assert spec.count_params(dataclasses.replace(cfg, vision=None, layout="phi3")) == family.published_params("mini")
    shapes = huggingface.published_tensors(cfg)
    assert len(shapes) == 592 and sum(int(np.prod(s)) for s in shapes.values()) == 4_146_621_440
    eyes_of = "model.vision_embed_tokens.img_processor.vision_model"
    assert shapes[f"{eyes_of}.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["model.vision_embed_tokens.sub_GN"] == (1, 1, 1, 4096)
    assert {f"{eyes_of}.pre_layrnorm.bias", f"{eyes_of}.encoder.layers.23.self_attn.k_proj.weight"} <= set(shapes)


def test_a_text_model_and_its_programs_know_no_eyes() -> None:
    assert "vision" not in spec.param_specs(family.published("mini"))
    with pytest.raises(UserError, match="needs vision; it is phi3_v's"):
        dataclasses.replace(family.published("mini"), layout="phi3_v")
    with pytest.raises(UserError, match="has no vision"):
        dataclasses.replace(CFG, layout="phi3")
    with pytest.raises(UserError, match="vision.layers=1 must be 2 or more"):
        dataclasses.replace(EYES, layers=1)


# ------------------------------------------------------------------------------------------------ the original's tensors


@pytest.mark.shared("goldens")
def test_the_tower_is_clips() -> None:
    meta, t = read_golden("clip_tiny")
    eyes: Any = SimpleNamespace(
        embed=48, layers=4, heads=4, mlp=96, tile=70, patch=14, norm="layer", norm_eps=1e-5, patches=25, width=192
    )
    tree = spec._vision_specs(eyes, 8, 0.02)
    prefix, values = "model.vision_embed_tokens.img_processor.", {}
    for leaf, one in spec.named(tree, lambda x: isinstance(x, spec.ParamSpec)).items():
        values[leaf] = np.zeros(one.shape, np.float32)
        for layer in one.layers:
            part = values[leaf] if layer is None else values[leaf][layer]
            for tensor in huggingface.tensors_of(f"vision.{leaf}", one, CFG, part, layer):
                if (name := tensor.name.removeprefix(prefix)) in t:
                    (view,) = tensor.views
                    view[...] = t[name].reshape(view.shape)
    made = jax.tree.map(jnp.asarray, spec.shaped(tree, values))
    pixels = jnp.asarray(t["pixel_values"])
    check(vision.embedded(made, pixels, eyes, jnp.float32), t["hidden_0"], meta, "hidden_0")
    check(vision.tower(made, pixels, eyes), t["patch_features"], meta, "patch_features")


@pytest.mark.shared("goldens")
def test_phi_3_vision_is_the_original(tmp_path: Path) -> None:
    meta, t = read_golden("vision_model")
    model = loading.load(f"hf:{write_folder(tmp_path / 'm', meta['config'], t)}")
    eyes = model.config.vision
    pixels = (t["pixel_values_q"].astype(np.float32) / 32).repeat(2, -1).repeat(2, -2)[0]
    made = jnp.asarray(pixels[:3])  # without the tile of zeros that the original fills up with
    check(vision.tower(model.params["vision"], made[:2], eyes), t["patch_features_tiles"], meta, "patch_features_tiles")
    table = vision.rows(model.params["vision"], made, eyes)
    at = int((t["input_ids"][0] < 0).argmax())
    grid = images.Grid(False, (672, 336), 0, 1, 2)
    index = images.index_of([[images.Shown(grid, 0, at)]], t["input_ids"].shape, 3)
    np.testing.assert_array_equal(index >= 0, t["input_ids"] < 0)
    check(table[index[index >= 0]], t["image_embeds"], meta, "image_embeds")
    tokens = jnp.asarray(np.maximum(t["input_ids"], 0))
    logits = decoder.forward(model.params, tokens, model.config, pictures=(table, jnp.asarray(index)))
    check(logits, t["logits"], meta, "logits")
    blind = decoder.forward(model.params, tokens, model.config)
    assert float(jnp.abs(blind - logits).max()) > 0.1


@pytest.fixture(scope="module")
def golden35() -> tuple[dict[str, Any], dict[str, np.ndarray], loading.Model]:
    meta, t = read_golden("vision2/vision35")
    return meta, t, loading.load(f"hf:{VISION35}", dtype=jnp.float32)


def talk(case: dict[str, Any]) -> list[dict[str, str]]:
    text = case["prompt"].removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    return case.get("messages") or [{"role": "user", "content": text}]


@pytest.mark.shared("goldens/vision2")
@pytest.mark.parametrize("case", ["text", "one", "two", "turns", "swapped"])
def test_phi_3_5_vision_is_the_original(case: str, golden35) -> None:
    meta, t, model = golden35
    one, album = meta["cases"][case], pictured.Album(model.config)
    pictures = album.open([VISION35 / name for name in one["images"]])
    ids = chat.chat_ids(model.tokenizer, talk(one), "vision", pictures=album.counts(pictures))
    runs = one["input_ids_run_length"]
    assert ids == [i for run in runs for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]
    if pictures:
        values = np.zeros(one["pixel_values_shape"], np.float32)
        for picture, tiles in zip(values, (images.tiles_of(p, album.crops, album.eyes) for p in pictures), strict=True):
            picture[: len(tiles)] = tiles
        found = values[tuple(t[f"pixel_points_{case}"].T)]
        np.testing.assert_allclose(found, t[f"pixel_at_points_{case}"], rtol=0, atol=3e-6)
    logits = model.logits([ids], images=[pictures])[0][t[f"probe_positions_{case}"]]
    name = "logits_swapped_as_tagged" if case == "swapped" else f"logits_{case}"  # tag k shows picture k here
    check(logits, t[name], meta, name)
    if case == "swapped":
        assert float(jnp.abs(logits - t["logits_swapped"]).max()) > 1


@pytest.mark.shared("goldens/vision2")
def test_gradients_are_the_originals_and_none_reaches_the_unused_layer(golden35) -> None:
    meta, t, model = golden35
    rows, labels = t["train_input_ids"], t["train_labels"]
    album, ids = pictured.Album(model.config), []
    for row, mask, one in zip(rows, t["train_attention_mask"], meta["training"]["rows"], strict=True):
        pictures = album.open([VISION35 / name for name in one["images"]])
        ids.append(pictured.Prompt(row[: int(mask.sum())].tolist(), pictures))
    # In the original's training rows every picture of the batch has a number of its own row.
    seen, index = pictured.batch(ids, rows.shape, album)
    tokens, targets = jnp.asarray(np.maximum(rows, 0)), jnp.asarray(labels[:, 1:])

    def loss(tree: Any) -> jax.Array:
        table = vision.rows_of(tree, jnp.asarray(seen), model.config)
        logits = decoder.forward(tree, tokens, model.config, rope_regime="long", pictures=(table, jnp.asarray(index)))[
            :, :-1
        ]
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        nll = jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
        return nll.sum() / (targets >= 0).sum()

    wide = jax.tree.map(lambda w: w.astype(jnp.float32), model.params)
    value, gradients = jax.jit(jax.value_and_grad(loss))(wide)
    assert float(value) == pytest.approx(meta["training"]["loss_float64"], abs=2e-6)
    found, norms = spec.named(gradients), meta["training"]["gradient_norms"]
    compared = 0
    for layer, leaf, one in huggingface.parts_of(model.config):
        part = np.array(found[leaf] if layer is None else found[leaf][layer])
        for tensor in huggingface.tensors_of(leaf, one, model.config, part, layer):
            flat = np.concatenate([view.reshape(-1) for view in tensor.views])
            if norms[tensor.name] is None:
                assert leaf.startswith("vision.unused.") and not flat.any()
                continue
            if "k_proj.bias" in tensor.name:
                continue  # 0 in exact arithmetic
            if (key := f"grad:{tensor.name}") in t:
                want = t[key].reshape(-1)
            else:
                want, flat = t[f"grad_at:{tensor.name}"], flat[t[f"grad_index:{tensor.name}"]]
            if tensor.name == "model.embed_tokens.weight":  # <pad>'s row has none in the original
                keep = t[f"grad_index:{tensor.name}"] // model.config.embed != 380
                want, flat = want[keep], flat[keep]
            assert np.abs(flat - want).max() <= 2e-3 * np.abs(want).max(), tensor.name
            compared += 1
    assert compared > 50


# ------------------------------------------------------------------------------------------------ properties


def reference(tree: Any, pixels: np.ndarray, eyes: Vision) -> np.ndarray:
    """The table of `vision.rows` in NumPy's float64."""
    tree = jax.tree.map(lambda w: np.asarray(w, np.float64), tree)
    erf = np.vectorize(__import__("math").erf)

    def norm(x: np.ndarray, p: Any) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eyes.norm_eps) * p["scale"] + p["bias"]

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    n, side = eyes.tile // eyes.patch, eyes.side
    out = []
    for tile in pixels.astype(np.float64):
        cut = [
            tile[:, y * eyes.patch : (y + 1) * eyes.patch, x * eyes.patch : (x + 1) * eyes.patch].reshape(-1)
            for y in range(n)
            for x in range(n)
        ]
        x = np.concatenate([tree["class"][None], np.stack(cut) @ tree["patches"]]) + tree["positions"]
        x = norm(x, tree["norm"])
        for i in range(eyes.layers - 1):
            p = jax.tree.map(lambda w: w[i], tree["blocks"])  # noqa: B023
            q, k, v = (
                np.einsum("pd,dhjk->jphk", norm(x, p["attention_norm"]), p["qkv"]["weight"])
                + p["qkv"]["bias"].transpose(1, 0, 2)[:, None]
            )
            weights = softmax(np.einsum("phk,shk->hps", q, k) / np.sqrt(q.shape[-1]))
            mixed = np.einsum("hps,shk->phk", weights, v)
            x = x + np.einsum("phk,hkd->pd", mixed, p["out"]["weight"][:, 0]) + p["out"]["bias"]
            h = norm(x, p["mlp_norm"]) @ p["up"]["weight"] + p["up"]["bias"]
            x = x + (h / (1 + np.exp(-1.702 * h))) @ p["down"]["weight"] + p["down"]["bias"]
        grid = x[1:].reshape(n, n, -1)
        out += [grid[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1) for y in range(side) for x in range(side)]
    table = np.stack([*out, tree["row_end"], tree["whole_end"]])
    h = table @ tree["in"]["weight"] + tree["in"]["bias"]
    return (h * 0.5 * (1 + erf(h / np.sqrt(2)))) @ tree["out"]["weight"] + tree["out"]["bias"]


@pytest.mark.parametrize(("tile", "many"), [(28, 256), (56, 256), (56, 1)])  # the last one by head
def test_rows_are_those_of_float64(tile: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "MANY", many)
    cfg = dataclasses.replace(CFG, vision=dataclasses.replace(EYES, tile=tile))
    tree, pixels = params(cfg)["vision"], tiles(3, tile)
    want = reference(tree, pixels, cfg.vision)
    np.testing.assert_allclose(vision.rows(tree, jnp.asarray(pixels), cfg.vision), want, atol=2e-5 * np.abs(want).max())


def test_many_tiles_go_through_the_tower_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Vision().at_once == 16
    monkeypatch.setattr(Vision, "at_once", 16)
    tree, pixels = params()["vision"], tiles(19)
    see = jax.jit(lambda tiles: vision.rows(tree, tiles, EYES))
    many, few = see(pixels), see(pixels[:3])
    most = 1e-5 * float(jnp.abs(few).max())
    np.testing.assert_allclose(many[:3], few[:3], atol=most)
    np.testing.assert_allclose(many[-2:], few[-2:], atol=most)


def book() -> tuple[list[list[int]], list[list[np.ndarray]]]:
    """Rows with 0, 1 and 2 pictures of different grids, the last one longer than LongRoPE's border of 32."""
    album = pictured.Album(CFG)
    draw = lambda w, h, s: np.random.default_rng(s).integers(0, 256, (h, w, 3), dtype=np.uint8)  # noqa: E731
    shown: list[list[np.ndarray]] = [[], [draw(30, 30, 1)], [draw(90, 20, 2), draw(20, 50, 3)]]
    rows = []
    for pictures, words in zip(shown, (9, 5, 14), strict=True):
        ids = [1, *range(2, 2 + words)]
        for k, count in enumerate(album.counts(album.open(pictures)), 1):
            ids += [-k] * count + [1, 40 + k, 41, 42]
        rows.append(ids)
    return rows, shown


def test_a_batch_equals_each_row_alone_on_both_sides_of_the_border() -> None:
    model = loading.Model(params(), CFG, None, jnp.float32, ())
    rows, shown = book()
    border, time = CFG.longrope.original_context, max(map(len, rows))
    assert len(rows[0]) < border < time
    ids, segments = np.zeros((3, time), np.int32), np.zeros((3, time), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], segments[i, : len(row)] = row, 1
    together = model.logits(ids, segment_ids=segments, images=shown)
    for i, row in enumerate(rows):
        alone = model.logits([row], images=[shown[i]])[0]
        np.testing.assert_allclose(together[i, : len(row)], alone, atol=1e-5 * float(jnp.abs(alone).max()))
    packed = np.concatenate([np.array(rows[1]), np.where(np.array(rows[2]) < 0, np.array(rows[2]) - 1, rows[2])])
    numbers = np.repeat([1, 2], [len(rows[1]), len(rows[2])])
    one_row = model.logits([packed], segment_ids=[numbers], images=[shown[1] + shown[2]])[0]
    for part, i in ((one_row[: len(rows[1])], 1), (one_row[len(rows[1]) :], 2)):
        alone = model.logits([rows[i]], images=[shown[i]])[0]
        np.testing.assert_allclose(part, alone, atol=1e-5 * float(jnp.abs(alone).max()))


def test_tags_out_of_order_show_their_own_pictures_and_text_alone_is_as_before() -> None:
    model = loading.Model(params(), CFG, None, jnp.float32, ())
    rows, shown = book()
    swapped = [{-1: -2, -2: -1}.get(i, i) for i in rows[2]]
    there = model.logits([rows[2]], images=[shown[2]])
    np.testing.assert_allclose(model.logits([swapped], images=[shown[2][::-1]]), there, atol=1e-4)
    blank = [[np.full_like(p, 255) for p in shown[2]]]
    assert float(jnp.abs(model.logits([rows[2]], images=blank) - there).max()) > 1e-2
    np.testing.assert_array_equal(model.logits([rows[0]], images=[[]]), model.logits([rows[0]]))


@pytest.mark.parametrize("many", [256, 1])
def test_rows_and_their_tiles_lie_on_one_device_of_a_mesh(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device has a table of its own rows' tiles; what is whole on every device gets the sum of their gradients."""
    monkeypatch.setattr(vision, "MANY", many)
    cfg = dataclasses.replace(CFG, layers=1, embed=64, heads=4, kv_heads=4, vision=dataclasses.replace(EYES, layers=2))
    tree, rows, each = params(cfg), 4, 3
    tree["vision"] = jax.tree.map(lambda w: 0.1 * w, tree["vision"])
    pixels, grid = jnp.asarray(tiles(rows * each)), images.Grid(False, (56, 28), 0, 1, 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (rows, 16)))
    local = jnp.concatenate([images.index_of([[images.Shown(grid, 0, i)]], (1, 16), each, 1) for i in range(rows)])

    def loss(tree: Any, tokens: jax.Array, pixels: jax.Array, index: jax.Array, layout: Any = ANYWHERE) -> jax.Array:
        table = vision.rows_of(tree, pixels, cfg, layout=layout)
        hidden = decoder.hidden_states(tree, tokens, cfg, pictures=(table, index), layout=layout)
        return jnp.sum(hidden * jnp.arange(16)[:, None])

    alone = jax.jit(jax.value_and_grad(loss))
    parts = [alone(tree, tokens[i : i + 1], pixels[each * i : each * (i + 1)], local[i : i + 1]) for i in range(rows)]
    mesh = make_mesh(jax.devices()[:rows], "fsdp")
    with jax.set_mesh(mesh):
        sharding = rules.batch_sharding("fsdp", mesh)
        placed = jax.device_put(tree, rules.param_shardings(spec.param_specs(cfg), "fsdp", mesh))
        whole = [jax.device_put(x, sharding) for x in (tokens, pixels, local)]
        program = functools.partial(loss, layout=rules.layout_of("fsdp"))
        found, slopes = jax.jit(jax.value_and_grad(program))(placed, *whole)
    assert float(found) == pytest.approx(sum(float(value) for value, _ in parts), rel=1e-4)
    summed = jax.tree.map(lambda *g: functools.reduce(jnp.add, g), *(slope for _, slope in parts))
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(float(jnp.abs(b).max()), 1.0))
    assert not any(map(np.any, jax.tree.leaves(slopes["vision"]["unused"])))
    assert all(map(np.any, jax.tree.leaves(slopes["vision"]["out"])))
