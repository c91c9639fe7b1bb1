"""Says what a full-size run takes, before it runs.

    python launch/plan.py --config experiments/scaling.py:medium,topology=v5p:4x4x8

Memory a device, what the devices send one another, the least time of a step and what bounds it, chip-hours; and the best
strategy, mesh, remat and microbatch for these devices. Needs no accelerator and takes seconds.

--config FILE[:WORDS]    the experiment; its words are documented in FILE. topology= says on what: v5p:4x4x8,
                         2xv5p:4x4x4 (two slices), h200:8, h100:4x8 (nodes x GPUs), cpu:8
--config.a.b=VALUE       overrides one field of it
--json                   one JSON object instead of the page
--compile                also compiles the training step for the topology (TPU; extra [tpu]; minutes) and prints what the
                         compiler says beside the plan
"""

from __future__ import annotations

import sys

from phi3_jax.planning.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
