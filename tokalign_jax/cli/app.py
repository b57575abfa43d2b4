"""The command line: `tokalign COMMAND ...`, also as `python -m tokalign_jax`.

    tokalign run --config configs/best.py --workdir runs/mine
    tokalign help config.stage2

Exit codes:
    0   success
    1   a bug, with its traceback
    2   bad input, with a message that says what to do
    75  stopped by SIGTERM or Ctrl-C; progress is saved, and the same command resumes
    134 another process of the run was lost; the same command resumes
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from tokalign_jax import __version__
from tokalign_jax.cli import topics
from tokalign_jax.errors import exit_code

COMMANDS = {
    "run": "give a model a new vocabulary: align, initialise, train, evaluate, export, report",
    "plan": "print the memory, disk and time that a run would take",
    "evaluate": "evaluate models side by side on held-out text",
    "inspect": "explain how the rows of tokens were made",
    "compare": "compare finished runs",
    "sweep": "run many configs, sharing their common stages, and compare them",
    "help": "explain a topic: a command, a config field, methods, files or exit codes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    Args:
      argv: name of the command and its arguments; None: the arguments of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        chosen = _parser().parse_args(argv[:1])
        if chosen.command == "help":
            return exit_code(lambda: topics.main(argv[1:]))
        command = importlib.import_module(f"tokalign_jax.cli.{chosen.command}")
        return command.main(argv[1:])
    except SystemExit as ended:  # argparse: --help, --version or a bad flag
        return int(ended.code or 0)


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tokalign",
        usage="tokalign [--version] [--help] COMMAND ...",
        description="Give a pre-trained language model a new vocabulary.",
        epilog=f"commands:\n{commands}\n\n`tokalign COMMAND --help` lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tokalign_jax {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    return parser
