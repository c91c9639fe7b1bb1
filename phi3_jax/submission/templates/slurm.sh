#!/bin/bash
# One run of a study; its options (name, nodes, dependency, ...) are on the sbatch command line.
cd -- @root@ || exit 2
# Two minutes before the time is up (--signal) Slurm sends SIGTERM to the steps: the run saves and ends with status 75.
srun --kill-on-bad-exit=1 -- @command@
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" # ends this script; the job goes on from its checkpoint when it starts again
fi
exit "$status"
