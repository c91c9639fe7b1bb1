"""A member of your own: another shape beside those that were released.

    phi3-jax run --config examples/new_member.py --workdir runs/example-member      # a minute on two cores
    phi3-jax plan --config examples/new_member.py:topology=v5p:4x4x8                # what the full model takes

A member is an entry in `family.MEMBERS`, and its proxies one in `family.SIZES`. An experiment file may add both, and every
process of its study reads the file. For all studies, they are added in phi3_jax/family.py.
"""

import dataclasses

from ml_collections import ConfigDict

from phi3_jax.experiment import apply, base_config, parse_arguments
from phi3_jax.family import MEMBERS, SIZES

# phi-3-mini, with one head of keys and values for every four heads of queries: what does the smaller cache cost?
MINI = MEMBERS["mini"]
MEMBERS["grouped"] = dataclasses.replace(
    MINI,
    shape={**MINI.shape, "kv_heads": 8},
    name="phi-3-grouped-{context}",
    params=None,  # nobody published it
)
SIZES["grouped"] = SIZES["mini"]


def get_config(argument: str = "") -> ConfigDict:
    """Proxies of both, each with the architecture of its member; words as in experiments/scaling.py."""
    _, words = parse_arguments(argument, ("both",), {"budgets": list, "seeds": int, "topology": str})
    config = base_config()
    config.update(sizes=("mini", "grouped"), ladder="family", budgets=(100_000,))
    return apply(config, words, {})
