"""Give a model a new vocabulary.

    tokalign run --config configs/ultra_quick_demo.py --workdir runs/demo
    tokalign run --config configs/best.py --workdir runs/mine --config.source_model=/models/mine
    tokalign run --config configs/best.py --workdir runs/mine --stages=align,init,export

Repeating the command skips finished stages, resumes training from the newest checkpoint, and
redoes the stages that a changed field affects. `tokalign help config` lists the fields,
`tokalign help files` the contents of the workdir.
"""

import argparse
from collections.abc import Callable, Sequence

from tokalign_jax.cli import arguments
from tokalign_jax.config import config_from_dict
from tokalign_jax.errors import prepared
from tokalign_jax.utils.progress import Log


def main(argv: Sequence[str]) -> int:
    """Run the pipeline; return the exit code."""
    work, code = prepared(lambda: _work(argv))
    if work is None:
        return code
    # JAX is imported after the flags are parsed, so that a mistyped flag fails at once.
    from tokalign_jax.cli.session import session

    return session(*work)


def _work(argv: Sequence[str]) -> tuple[argparse.Namespace, Callable[[Log], None]]:
    flags = arguments.parser("run", __doc__)
    arguments.add_run(flags)
    flags.add_argument(
        "--stages",
        type=arguments.names,
        help="run only these stages (separated by commas), and unfinished ones that they need",
    )
    arguments.add_processes(flags)
    args, values = arguments.parse_run(flags, argv)
    config, workdir = config_from_dict(values), arguments.workdir_of(args)

    def work(log: Log) -> None:
        from tokalign_jax import pipeline

        pipeline.run(config, workdir, args.stages, log)

    return args, work
