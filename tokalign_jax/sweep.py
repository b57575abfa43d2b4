"""Former entry point of `tokalign sweep`: `python -m tokalign_jax.sweep`."""

if __name__ != "__main__":
    raise ImportError("tokalign_jax.sweep is a command only; import tokalign_jax.cli.sweep instead")

import sys

from tokalign_jax.cli.sweep import main

sys.exit(main(sys.argv[1:]))
