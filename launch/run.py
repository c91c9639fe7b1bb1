"""Trains a study and writes its report: `python launch/run.py --config experiments/scaling.py:medium`.

--config FILE[:WORDS]    the experiment; its words are documented in FILE
--config.a.b=VALUE       overrides one field of it
--workdir DIR            the study's folder (default runs/<name>)
--resume auto|never      auto (default) goes on where an interrupted study stopped
--run NAME[,NAME...]     trains only these runs of the study, e.g. mini-s0-4M (size, seed, budget); the report is written
                         by whichever command finishes the study; exit status 75: stopped by a signal, saved, try again

The same line on every host or process of a job makes them one run: see phi3_jax/cluster.py.
"""

from __future__ import annotations

import sys

from phi3_jax.cluster import run

if __name__ == "__main__":
    sys.exit(run("phi3_jax.launcher", sys.argv[1:], __doc__))
