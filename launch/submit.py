"""Sends a study to a scheduler: `python launch/submit.py --config FILE:sweep,scale=full --backend slurm --dry_run`.

--config FILE[:WORDS]    the experiment, as for launch/run.py; scale= must be given
--config.a.b=VALUE       overrides one field of it; the scheduler's are config.cluster.*
--workdir DIR            the study's folder as seen from here (default runs/<name>)
--backend NAME           gke (JobSets), tpu-vm (queued resources), slurm (sbatch) or local (this machine)
--dry_run                prints the files and commands that would be sent, and writes nothing
--status                 prints a table of the study's runs; with --backend, the scheduler is asked as well

Sending again skips runs that are finished, waiting or running, and starts the others where they stopped.
"""

from __future__ import annotations

import sys

from phi3_jax.submission.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
