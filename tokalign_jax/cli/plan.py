"""Print the memory, disk and time that a run would take, from configs, shapes and tokenizers alone.

    tokalign plan --config configs/best.py --config.source_model=/models/pythia-1b
    tokalign plan --config configs/best.py --devices=8 --device-memory=80GB

It plans for the devices here, or for those that --devices names. No weights and no text are read.
"""

from collections.abc import Sequence

from tokalign_jax.cli import arguments
from tokalign_jax.config import config_from_dict
from tokalign_jax.errors import exit_code


def main(argv: Sequence[str], prefix: str = "") -> int:
    """Print the plan; return the exit code.

    Args:
      prefix: of its flags, whose words `_` then separates; they had one where the plan was a flag
        of the run.
    """
    return exit_code(lambda: _plan(argv, prefix))


def _plan(argv: Sequence[str], prefix: str) -> None:
    flags = arguments.parser("plan", __doc__)
    arguments.add_run(flags)

    def add(name: str, **how) -> None:
        written = (prefix + name).replace("-", "_") if prefix else name
        flags.add_argument(f"--{written}", dest=name.replace("-", "_"), **how)

    count, rate = arguments.at_least(0), arguments.between(0, float("inf"))
    add("devices", type=count, default=0, help="so many devices, not those here")
    add("device-memory", default="", metavar="SIZE", help="devices with so much memory: 80GB")
    add("host-memory", default="", metavar="SIZE", help="a host with so much memory: 256GB")
    add("tokens-per-second", type=rate, default=0.0, help="speed of all devices together")
    add("throughput", default="", metavar="FILE", help="JSON of benchmarks/train_throughput.py")
    mfu = arguments.between(0.001, 1)
    add("mfu", type=mfu, default=0.4, help="share of the peak (0.4), where no speed is known")
    add("peak", default="", metavar="FLOPS", help="of a device: 989TFLOPS (that of its name)")
    if prefix:  # taken by the run that it is the plan of, and without effect here
        flags.add_argument("--stages")
        arguments.add_processes(flags)
    args, values = arguments.parse_run(flags, argv)
    config = config_from_dict(values)

    from tokalign_jax.planning.machine import Machine, Speed
    from tokalign_jax.planning.report import plan_run
    from tokalign_jax.utils import compiling

    if not args.devices:
        compiling.prepare()  # of the devices here the run gets as much memory
    machine = Machine.of(args.devices, args.device_memory, args.host_memory)
    speed = Speed.of(args.tokens_per_second, args.throughput, args.mfu, args.peak)
    print(plan_run(config, args.workdir, machine, speed).table())
