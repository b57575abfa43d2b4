"""Former entry point of `tokalign compare`: `python -m tokalign_jax.compare`."""

if __name__ != "__main__":
    raise ImportError(
        "tokalign_jax.compare is a command only; import tokalign_jax.cli.compare instead"
    )

import sys

from tokalign_jax.cli.compare import main

sys.exit(main(sys.argv[1:]))
