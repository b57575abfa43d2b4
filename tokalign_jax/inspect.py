"""Former entry point of `tokalign inspect`: `python -m tokalign_jax.inspect`."""

if __name__ != "__main__":
    raise ImportError(
        "tokalign_jax.inspect is a command only; import tokalign_jax.cli.inspect instead"
    )

import sys

from tokalign_jax.cli.inspect import main

sys.exit(main(sys.argv[1:]))
