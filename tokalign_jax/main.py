"""Former entry point of `tokalign run` and `tokalign plan`: `python -m tokalign_jax.main`.

    python -m tokalign_jax.main --config configs/optimal.py --workdir runs/mine
    python -m tokalign_jax.main --config configs/optimal.py --plan --plan_devices=8

`--plan_devices`, `--plan_device_memory` ... are the flags `--devices`, `--device-memory` ... of
`tokalign plan`.
"""

import re
import sys
from collections.abc import Sequence

from tokalign_jax.cli import plan, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline, or print the plan of a run; return the exit code.

    Args:
      argv: program name and arguments; None: those of this process.
    """
    arguments = [
        re.sub(r"^-(?=[a-z]{2})", "--", a) for a in (sys.argv if argv is None else argv)[1:]
    ]
    planned = [a for a in arguments if a in ("--plan", "--plan=true", "--plan=True")]
    if planned:
        return plan.main([a for a in arguments if a not in planned], prefix="plan_")
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
