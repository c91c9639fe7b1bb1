"""Quality against size in the Phi-3 family at matched token budgets.

    python launch/run.py --config experiments/scaling.py                      # the sweep: mini, small, medium
    python launch/run.py --config experiments/scaling.py:medium               # one member
    python launch/run.py --config experiments/scaling.py:sweep,seeds=3,budgets=1M,2M,4M

Words after the colon, separated by commas (a comma also continues a list):

    sweep | mini | small | medium     what to train (default sweep)
    scale=auto|full|femto|pico|nano|micro|milli|centi|deci   auto: full where the attached devices hold it, else pico, and
                                      says so; proxies of 28k to 1.7B non-embedding parameters
    tokens=matched|published|3.3T|4.8T|<n>   matched: 4.8T each; published: 3.3T/4.8T/4.8T. Budgets of 10B tokens or
                                      more are those of the released models; a proxy trains the same share of its own
                                      reference budget (4M tokens at pico stand for 4.8T)
    budgets=1M,2M,4M                  evaluate at these budgets, all from one trunk (WSD forks); default for the sweep:
                                      a quarter, a half, all of the budget. A finished study grows by more budgets, seeds
                                      or sizes: runs on the disk are kept, and new budgets leave their trunks where a state
                                      of the constant phase was kept (facts are made for the largest budget, which stays)
    ratio=20,160,640                  instead: at so many tokens per non-embedding parameter N of each size (Chinchilla's
                                      optimum is about 20; the released models stand at 344 to 864 per parameter)
    isoflop=1e12,4e12                 instead: at so many FLOPs of training, which are C / 6N tokens of each size
    seed=0  seeds=1                   first seed, number of seeds
    data=facts|pydocs|<path>|tfds:<name>|mixture:phi3_phase1|mixture:phi3_phase2|...
                                      as --data of `python -m phi3_jax.data.export --help`;
                                      curated:1:<folder>, curated:2:<folder>: a phase of a curated corpus with budgets
                                      <path>: a file or folder of .txt, .jsonl, .json (each also .gz, .zst, .bz2) or
                                      .parquet; a line "data: ..." says what was read, what was left out and why. Copied
                                      or moved data are the same data where the files' names and bytes are
    strategy=dp|fsdp|fsdp_tp|fsdp_cp|multislice   how a full run is split over devices; default fsdp, multislice on slices
    topology=v5p:4x4x8                hardware to plan for and to ask a scheduler for; or 2xv5p:4x4x4 (two slices),
                                      h200:8, h100:4x8 (nodes x GPUs)
    init=<run>|hf:<folder>            start from these weights, not from random ones: a run, one of its checkpoints, a study
                                      of one run, or a Hugging Face folder, of the shape and vocabulary that the other words
                                      say. Optimiser and schedule start anew
    name=<name>                       the study's folder is runs/<name>; default: made of the words
    ladder=clean|family               clean: one recipe for all sizes (default for the sweep); family: each proxy keeps its
                                      member's architecture (default for a single member)

Cost on 2 CPU cores: the default sweep takes about 7.5 minutes.

What the numbers come from. The report (arXiv:2404.14219) publishes no optimiser settings.
Proxies: Adam (0.9, 0.98), eps 1e-12, no decay, no clipping, peak 3e-3 under muP/CompleteP relative to width 48, depth 4,
2 % warm-up, linear decay to 0 over the last 30 %: tuned at phi-3-mini's pico proxy on the controlled corpora; without
weight decay because decay erases facts (Adam's eps small: arXiv:2407.05872).
Full size: AdamW (0.9, 0.95), eps 1e-8, decay 0.1, clipping at 1.0, 4M-token batches, peak 3e-4 (1.5e-4 under WSD, about
half of the cosine peak, arXiv:2405.18392), 2,000 steps of warm-up or 2 %: Llama 2 (arXiv:2307.09288, section 2.2), the
nearest published recipe of these shapes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.experiment import TABLE, apply, base_config, parse_arguments
from phi3_jax.family import LADDERS, MEMBERS, SCALES
from phi3_jax.sharding.rules import STRATEGIES

TARGETS = ("sweep", *MEMBERS)
WORDS = {
    "scale": ("auto", "full", *SCALES),
    "ladder": LADDERS,
    "tokens": str,
    "budgets": list,
    "ratio": TABLE["ratios"],
    "isoflop": TABLE["flops"],
    "seed": int,
    "seeds": int,
    "data": str,
    "topology": str,
    "strategy": STRATEGIES,
    "init": str,
    "name": str,
}


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    config = base_config()
    if target != "sweep":
        config.update(sizes=(target,), ladder="family")
    else:
        config.budget_shares = (0.25, 0.5, 1.0)
    places = {"data": "data.source", "strategy": "train.strategy", "init": "train.init"}
    return apply(config, words, places | {"ratio": "ratios", "isoflop": "flops"})
