"""`phi3-jax VERB ...`, and `python -m phi3_jax VERB ...`: every command by its name; `phi3_jax.verbs` lists them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from phi3_jax import entry


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return entry.start(words[0], words[1:]) if words else entry.start("--help", [])


if __name__ == "__main__":
    sys.exit(main())
