"""`python -m tokalign_jax`: the command line."""

import sys

from tokalign_jax.cli.app import main

sys.exit(main())
