"""The keys of every experiment with their defaults; a file in `experiments/` changes some and adds what is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from phi3_jax.family import MEMBERS


def base_config() -> ConfigDict:
    """A new config of plain defaults."""
    unset = config_dict.placeholder  # None unless overridden: the recipe of the scale decides
    return ConfigDict(
        dict(
            name="",  # of the study's folder; default: made of its words
            sizes=MEMBERS,
            scale="auto",
            ladder="clean",
            mup=True,  # proxies are trained under muP; false: standard parametrisation
            tokens="matched",
            budgets=(),
            budget_shares=(1.0,),
            seed=0,
            seeds=1,
            topology="",  # planned for, for example v5p:4x4x8
            context="",  # of the full models: "" (4k/8k/4k) or "128k"
            data=dict(
                source="",
                tokenizer="bytes",
                window=unset(int),
                text_field="text",
                facts=unset(int),  # facts in the corpus; default 4,500 at pico
                universe=unset(int),  # facts the benchmark asks for; default 9,000 at pico
                frequency="uniform",
                value_bits=8,
                reading=unset(float),  # share of tokens that teach to answer from a sentence in context; default 0
                seed=0,
            ),
            optim=dict(
                peak_lr=unset(float),
                b1=unset(float),
                b2=unset(float),
                eps=unset(float),
                weight_decay=unset(float),
                clip=unset(float),
                schedule=unset(str),
                warmup=unset(float),
                decay=unset(float),
                final_lr=unset(float),
                z_loss=unset(float),
                spike_factor=unset(float),
            ),
            train=dict(
                batch_tokens=unset(int),
                accumulation=1,
                dtype=unset(str),
                remat=unset(str),
                strategy="auto",
                context=1,  # devices that share a window (fsdp_cp)
                tensor=1,  # devices that share a layer's heads and mlp (fsdp_tp)
                attention="auto",  # kernel: auto, chunked, blocksparse, splash, cudnn, reference
                slices=0,  # groups of devices joined by a slow network; 0: what the topology says
                log_every=20,
                eval_points=4,
                checkpoint_every=unset(int),
                keep_latest=2,
                keep_every=0,
                batch_timeout=600.0,  # seconds until a batch that does not come ends the run
                tensorboard=False,
                profile_start=0,
                profile_steps=0,
            ),
            cluster=dict(  # for launch/submit.py
                image="",  # container with this repository as its working directory (gke, tpu-vm)
                volume="",  # where studies are kept: a ReadWriteMany claim (gke), an NFS share HOST:/PATH (tpu-vm)
                project="",  # tpu-vm
                zone="",  # tpu-vm
                queue="",  # Slurm partition, or Kueue's local queue (xpk: multislice-queue)
                options="",  # more options of sbatch or of gcloud's create; node labels KEY=VALUE on gke
            ),
        )
    )


def apply(config: ConfigDict, words: Mapping[str, Any], places: Mapping[str, str]) -> ConfigDict:
    """Writes the words of a command line into their keys, `places` (word -> a.b) where the names differ."""
    for word, value in words.items():
        *path, last = places.get(word, word).split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config
