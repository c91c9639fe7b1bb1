"""`python -m phi3_jax.scaling.report STUDY [--keep DIR]`: the name that users type for `phi3_jax.reporting.report`."""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the import below takes finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("report"))

from phi3_jax.reporting.report import command as command
