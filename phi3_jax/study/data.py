"""The data sets of a study, exported in a process of their own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.configs import ModelConfig
from phi3_jax.data import sources, tokenizers
from phi3_jax.data.corpora import facts
from phi3_jax.errors import Stopped, UserError
from phi3_jax.experiment import SOURCE
from phi3_jax.interop import templates
from phi3_jax.records.files import read_json
from phi3_jax.study.arms import K_FACTS

# tokens of a window of text, where nothing else is said
WINDOWS = {"femto": 256, "pico": 256, "nano": 256, "micro": 1024, "milli": 1024, "centi": 2048, "deci": 2048}


def data_arguments(config: Any, scale: str, largest: int) -> dict[str, Any]:
    """Arguments of `data.export` for the study's data: the keys of `config.data` that its source takes.

    What is not set and goes with the scale is decided here: the window of text; tokens, and the counts of facts.
    """
    data = config.data
    name = data.source or SOURCE
    takes = sources.find(name).options
    given = {key: data[key] for key in takes if data.get(key) is not None}
    if "window" in takes and takes["window"].default is not None:
        given["window"] = data.window or WINDOWS.get(scale) or full_window(config)
    if "tokens" in takes:
        given["tokens"] = largest
    if "template" in takes:  # the ids and turns are those of the model that is trained
        from phi3_jax.interop import loading  # brings orbax, which a plan does without

        own = loading.kept_folder(config.train.init) if config.train.init else None
        given["tokenizer"] = str(own) if own and data.tokenizer == "bytes" else data.tokenizer
        if config.train.init and scale == family.GIVEN:
            given |= _sight(config, loading.config_of(config.train.init))
        given["template"] = data.template or templates.named_by(tokenizers.place(given["tokenizer"])) or ""
    if "universe" in takes:
        universe = data.universe or 9000 * K_FACTS.get(scale, 32)
        # Names are pairs of ids: 65,536 persons fit a pool of 256; older studies of more have 1,024.
        pools = (256, 512) if data.frequency == "inverse_rank" else (256,)
        pool = next((pool for pool in pools if universe <= pool**2), facts.MAX_POOL)
        given |= dict(universe=universe, facts=universe // 2 if data.facts is None else data.facts, pool=pool)
    return dict(data=name, **given)


def _sight(config: Any, model: ModelConfig) -> dict[str, Any]:
    """How a model sees: options of rows with pictures.

    Raises:
      UserError: pictures for a model that reads none.
    """
    images, crops = config.data.images, config.data.crops
    if model.vision is None:
        if images or crops:
            raise UserError(f"{model.label} reads no pictures; start from a phi-3-vision, or leave images= out")
        return {}
    return {"crops": crops or model.vision.crops, "eyes": f"{model.vision.tile}/{model.vision.patch}"}


def vocabulary_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest will say of the tokenizer (fingerprint, vocab_size) of the data that `data_arguments` describe."""
    if "pool" in arguments:  # of ids, in the place of a tokenizer
        return facts.closed(arguments["pool"])
    if closed := sources.find(arguments["data"]).closed:
        return closed()
    return tokenizers.load(arguments["tokenizer"]).describe()


def full_window(config: Any) -> int:
    """Tokens in a window of a full-size run: data.window, or the shortest context of the study's members."""
    if config.scale == family.GIVEN:
        from phi3_jax.interop import loading

        return config.data.window or loading.open_weights(config.train.init).config.context
    contexts = [family.published(size, config.context or None).context for size in config.sizes]
    return config.data.window or min(contexts)


def export_data(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes (or finds) the dataset in a process of its own, so that TensorFlow never enters this one."""
    command = [sys.executable, "-m", "phi3_jax.data.export", "--out", str(folder)]
    for key, value in arguments.items():
        if not isinstance(value, bool):
            command += [f"--{key}", str(value)]
        elif value:
            command.append(f"--{key}")
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line in done.stderr.splitlines():
        if line.startswith(("warning: ", "data: ")):
            print(line, file=sys.stderr if line.startswith("warning: ") else sys.stdout, flush=True)
    if done.returncode in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT):
        raise Stopped
    if done.returncode:
        known = [line.removeprefix("error: ") for line in errors]
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(known[-1] if known else f"exporting the data failed: {last}")
    return read_json(folder / "manifest.json")


def called(source: str, folder: Path, fingerprint: str) -> str:
    """What the study of a data set calls it: data that were moved, or whose path is typed otherwise, are the same data."""
    for study in (folder.parent, folder.parent.parent):  # STUDY/data, STUDY/data/ARM
        if (study / "study.json").is_file():
            with contextlib.suppress(UserError, KeyError, TypeError):
                runs = read_json(study / "study.json")["runs"]
                return next((r["data"]["source"] for r in runs if r["data"]["fingerprint"] == fingerprint), source)
    return source
