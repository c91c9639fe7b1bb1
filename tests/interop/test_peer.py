"""Beside transformers, on random configurations: logits, packed and padded rows, replies, round trips.

60 models from the seed in PHI3_JAX_PEER_SEED (default 0; PHI3_JAX_PEER_COUNT: how many). Needs torch and transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import tensors_in
from peer_models import TIME

import phi3_jax
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import convert

pytestmark = pytest.mark.peer
SEED, COUNT = (int(os.environ.get(f"PHI3_JAX_PEER_{name}", n)) for name, n in (("SEED", 0), ("COUNT", 60)))
TOLERANCE = 3e-5  # of the largest logit; 1.4e-5 is the most that 314 models showed
REPLIES = 4  # every fourth model replies: each compiles programs of its own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    root = tmp_path_factory.mktemp("peer")
    script = Path(__file__).with_name("peer_models.py")
    done = subprocess.run([sys.executable, script, root, str(SEED), str(COUNT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(root.iterdir())


@pytest.fixture(scope="module")
def rows(folders: list[Path]) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{document: (our logits, theirs)} of each model: one call for a row of its own, a padded one and a packed one."""
    found = []
    for folder in folders:
        peer = dict(np.load(folder / "peer.npz"))
        ids, segments = np.zeros((3, TIME), int), np.zeros((3, TIME), int)
        places = {"a": (0, 0, 1), "b": (1, 0, 1), "c": (2, 0, 1), "d": (2, len(peer["c"]), 2)}
        for name, (row, start, segment) in places.items():
            part = slice(start, start + len(peer[name]))
            ids[row, part], segments[row, part] = peer[name], segment
        model = phi3_jax.load(f"hf:{folder}", dtype=jnp.float32)
        ours = np.asarray(model.logits(ids, segment_ids=segments))
        found.append(
            {
                name: (ours[row, start : start + len(peer[name])], peer[f"logits_{name}"])
                for name, (row, start, _) in places.items()
            }
        )
    return found


def compare(folders: list[Path], rows: list[dict], names: str) -> None:
    wrong, most = [], 0.0
    for folder, documents in zip(folders, rows, strict=True):
        for name in names:
            ours, theirs = documents[name]
            error = np.abs(ours - theirs).max() / np.abs(theirs).max()
            most = max(most, error)
            if not error <= TOLERANCE:
                wrong.append(f"{folder.name}{name} ({len(ours)} tokens): {error:.1e} {_summary(folder)}")
    print(f"seed {SEED}, documents {names}: at most {most:.1e} of the largest logit")
    assert not wrong, "\n".join(wrong)


def _summary(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return json.dumps({k: v for k, v in config.items() if v is not None and not k.startswith(("_", "arch"))})


def test_a_document_alone_gives_the_logits_of_transformers(folders, rows) -> None:
    compare(folders, rows, "a")


def test_padded_and_packed_documents_are_as_alone(folders, rows) -> None:
    """On both sides of the original context: a packed pair is cut one before it, at it, or one after it."""
    compare(folders, rows, "bcd")


def test_the_models_differ_enough(folders, rows) -> None:
    """Positive control: what is drawn covers the kinds, and wrong lists would show."""
    configs = [json.loads((f / "config.json").read_text()) for f in folders]
    if len(configs) < 30:
        pytest.skip("a few models need not cover all")
    assert {c["dtype"] for c in configs} == {"float32", "bfloat16", "float16"}
    assert {c["tie_word_embeddings"] for c in configs} == {True, False}
    assert {"rope_parameters" in c for c in configs} == {True, False} and any("head_dim" in c for c in configs)
    assert any((f / "model.safetensors.index.json").exists() for f in folders)
    flat = [np.abs(d["a"][1] - d["a"][1].mean(0)).max() / np.abs(d["a"][1]).max() for d in rows]
    assert min(flat) > 100 * TOLERANCE


def test_replies_are_those_of_transformers(folders) -> None:
    for folder in folders[::REPLIES]:
        peer = np.load(folder / "peer.npz")
        engine = Engine(phi3_jax.load(f"hf:{folder}", dtype=jnp.float32), batch=1)
        ids = engine.generate([peer["prompt"].tolist()], max_new_tokens=len(peer["reply"]), stop_ids=[])[0].ids
        clear = peer["margins"] > 2 * TOLERANCE
        sure = len(clear) if clear.all() else int(np.argmin(clear))
        assert list(ids)[:sure] == peer["reply"][:sure].tolist(), _summary(folder)


def test_round_trips_are_bitwise(folders, tmp_path: Path) -> None:
    for folder in folders:
        run, back = tmp_path / folder.name, tmp_path / f"{folder.name}-back"
        convert.import_folder(folder, run)
        convert.export_run(run, back)
        there, again = tensors_in(folder), tensors_in(back)
        assert there.keys() == again.keys()
        assert all((there[k].dtype, there[k].tobytes()) == (again[k].dtype, again[k].tobytes()) for k in there)
        assert (folder / "config.json").read_bytes() == (back / "config.json").read_bytes()
