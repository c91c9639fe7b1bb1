"""A study sent to a scheduler: GKE, TPU VMs, Slurm or this machine.

`jobs.py` makes the list of jobs, a `Backend` turns each into a file and commands, `command.py` prints or sends them.
A job's command is `python launch/run.py ... --run NAMES`, so that nothing is trained here that could not be typed.
"""
