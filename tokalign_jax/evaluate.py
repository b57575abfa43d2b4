"""Former entry point of `tokalign evaluate`: `python -m tokalign_jax.evaluate`."""

if __name__ != "__main__":
    raise ImportError(
        "tokalign_jax.evaluate is a command only; import tokalign_jax.cli.evaluate instead"
    )

import sys

from tokalign_jax.cli.evaluate import main

sys.exit(main(sys.argv[1:]))
