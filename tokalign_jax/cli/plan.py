"""Predict the memory, disk and time of a run.

    tokalign plan --config configs/best.py --config.source_model=/models/pythia-1b
    tokalign plan --config configs/best.py --devices=8 --device-memory=80GB

The plan is for the devices of this machine, or for --devices of another. It is computed from
configs, shapes and tokenizers: no weights and no text are read.
"""

from collections.abc import Sequence

from tokalign_jax.cli import arguments
from tokalign_jax.config import config_from_dict
from tokalign_jax.errors import exit_code


def main(argv: Sequence[str], prefix: str = "") -> int:
    """Print the plan; return the exit code.

    Args:
      prefix: prefix of its flags, whose words are then separated by `_`: the style of
        `python -m tokalign_jax.main --plan_devices`.
    """
    return exit_code(lambda: _plan(argv, prefix))


def _plan(argv: Sequence[str], prefix: str) -> None:
    flags = arguments.parser("plan", __doc__)
    arguments.add_run(flags)

    def add(name: str, **options) -> None:
        flag = (prefix + name).replace("-", "_") if prefix else name
        flags.add_argument(f"--{flag}", dest=name.replace("-", "_"), **options)

    count, rate = arguments.at_least(0), arguments.between(0, float("inf"))
    add("devices", type=count, default=0, help="number of devices (default: those of this machine)")
    add("device-memory", default="", metavar="SIZE", help="memory per device: 80GB")
    add("host-memory", default="", metavar="SIZE", help="memory of the host: 256GB")
    add("tokens-per-second", type=rate, default=0.0, help="throughput of all devices together")
    add(
        "throughput",
        default="",
        metavar="FILE",
        help="JSON file written by benchmarks/train_throughput.py",
    )
    mfu = arguments.between(0.001, 1)
    add(
        "mfu",
        type=mfu,
        default=0.4,
        help="model FLOPs utilisation to assume if no throughput is given (0.4)",
    )
    add(
        "peak",
        default="",
        metavar="FLOPS",
        help="peak of a device: 989TFLOPS (default: known for common devices)",
    )
    if prefix:  # flags of the run, which have no effect on its plan
        flags.add_argument("--stages")
        arguments.add_processes(flags)
    args, values = arguments.parse_run(flags, argv)
    config = config_from_dict(values)

    from tokalign_jax.planning.machine import Machine, Speed
    from tokalign_jax.planning.report import plan_run
    from tokalign_jax.utils import compiling

    if not args.devices:
        compiling.prepare()  # so that the plan sees as much device memory as the run
    machine = Machine.of(args.devices, args.device_memory, args.host_memory)
    speed = Speed.of(args.tokens_per_second, args.throughput, args.mfu, args.peak)
    print(plan_run(config, args.workdir, machine, speed).table())
