"""Trains a study and writes its report: `python launch/run.py --config experiments/scaling.py:medium`.

--config FILE[:WORDS]    the experiment; its words are documented in FILE
--config.a.b=VALUE       overrides one field of it
--workdir DIR            the study's folder (default runs/<name>)
--resume auto|never      auto (default) goes on where an interrupted study stopped
"""

from __future__ import annotations

import sys

from phi3_jax.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
