r"""Evaluate models side by side: bits per byte, retained abilities, speed, tasks.

    tokalign evaluate --models=/models/a,/models/b --text=heldout.jsonl --language-field=lang \
        --output=out
    tokalign evaluate --workdir=runs/demo --output=out     # a run's source model and its export
    tokalign evaluate --workdir=runs/demo --states=init,stage1,export --teacher=/models/large \
        --output=out
    tokalign evaluate --workdir=runs/demo --tasks=my_task --task-folder=/tasks --output=out

All other models are compared with the first one. `scores.json` and `scores.png` are written to the
output folder.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from tokalign_jax.cli import arguments, evaluate_inputs, evaluate_scores
from tokalign_jax.cli.evaluate_inputs import EXPORT, SOURCE
from tokalign_jax.errors import exit_code
from tokalign_jax.reporting import pages, side_by_side
from tokalign_jax.utils import compiling
from tokalign_jax.utils.progress import Log, duration

SCORES, PICTURE = "scores.json", "scores.png"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    args = parser().parse_args(argv)
    start = time.monotonic()
    # lm-eval and sentence encoders run in PyTorch, which needs a part of the same GPU's memory.
    compiling.prepare(alone=not (args.tasks or args.encoder))

    def log(line: str) -> None:
        print(f"[{duration(time.monotonic() - start):>6}] {line}", flush=True)

    return exit_code(lambda: run(args, log))


def run(args: argparse.Namespace, log: Log) -> dict[str, Any]:
    """Check the inputs, evaluate, write and print; return the content of `scores.json`.

    Raises:
      UserError: bad input, before any long work.
    """
    inputs = evaluate_inputs.check(args, log)
    content = evaluate_scores.measure(inputs, log)
    scores, picture = args.output / SCORES, args.output / PICTURE
    scores.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    side_by_side.picture(content, picture)
    lines = ["", *pages.terminal(side_by_side.sections(content))]
    print("\n".join([*lines, "", *side_by_side.warning_lines(content)]))
    print(f"written to {scores} and {picture}")
    return content


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    flags = arguments.parser("evaluate", __doc__)
    _add_models(flags)
    _add_text(flags)
    _add_questions(flags)
    _add_generation(flags)
    _add_alignment(flags)
    _add_tasks(flags)
    _add_computation(flags)
    flags.add_argument(
        "--output", type=arguments.path, required=True, help="folder for scores.json and scores.png"
    )
    arguments.add_overwrite(flags, "--output")
    return flags


def _add_models(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("models")
    group.add_argument(
        "--models",
        type=arguments.names,
        default=[],
        help="folders or hub names of models in Hugging Face format, separated by commas",
    )
    group.add_argument(
        "--workdir", type=arguments.path, help="workdir of a run, instead of --models"
    )
    group.add_argument(
        "--states",
        type=arguments.names,
        default=[SOURCE, EXPORT],
        help="states of that run: source, init, stage1, ..., export (default: source,export)",
    )


def _add_text(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group(
        "text", "files as in config.corpus; with --workdir the run's own are the default"
    )
    group.add_argument("--text", help="held-out text")
    group.add_argument("--other-text", help="out-of-domain text")
    group.add_argument(
        "--training-text", help="training text, to report how much held-out text occurs in it"
    )
    group.add_argument("--text-field", default="text", help="field that holds the text (text)")
    group.add_argument(
        "--language-field",
        default="",
        help="field that holds the language (default: none, all text is one group)",
    )
    group.add_argument(
        "--bytes-per-language",
        type=arguments.at_least(1),
        help="bytes of held-out text per language (200,000, or as in the run)",
    )
    group.add_argument(
        "--sequence-length",
        type=arguments.at_least(1),
        help="tokens per window (1,024, or as in the run)",
    )


def _add_questions(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group(
        "questions", "as in config.evaluation; with --workdir the run's own are the default"
    )
    group.add_argument("--abilities", help="multiple-choice questions")
    group.add_argument("--chat-questions", help="questions asked through the chat template")
    group.add_argument(
        "--max-questions",
        type=arguments.at_least(0),
        help="questions per suite (default: 0, all; or as in the run)",
    )
    group.add_argument(
        "--reply-tokens",
        type=arguments.at_least(1),
        help="maximum tokens of a reply to a chat question (64, or as in the run)",
    )


def _add_generation(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("generation speed and speculative decoding")
    number = arguments.at_least(1)
    group.add_argument(
        "--teacher",
        default="",
        help="folder or hub name of the model that the others draft tokens for",
    )
    group.add_argument("--gamma", type=number, default=4, help="tokens per draft (4)")
    group.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature of both models (1)"
    )
    group.add_argument(
        "--prompts", type=number, default=8, help="drafting prompts per language (8)"
    )
    group.add_argument("--prompt-tokens", type=number, default=64, help="tokens per prompt (64)")
    group.add_argument("--steps", type=number, default=64, help="tokens to generate (64)")
    group.add_argument(
        "--repeats", type=number, default=3, help="speed measurements per prompt (3)"
    )


def _add_alignment(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("alignment")
    group.add_argument(
        "--alignment",
        type=arguments.path,
        help="alignment (folder or file) of the second model's tokenizer to the first's",
    )
    group.add_argument(
        "--lines",
        type=arguments.at_least(1),
        default=1000,
        help="held-out lines to score the alignment on (1000)",
    )
    group.add_argument(
        "--encoder",
        default="",
        help="folder of a sentence encoder (default: mean hidden states of the first model)",
    )


def _add_tasks(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("downstream tasks, by lm-eval")
    group.add_argument("--tasks", type=arguments.names, default=[], help="names of the tasks")
    group.add_argument(
        "--task-folder", type=arguments.path, help="folder of your own tasks: YAML files and data"
    )
    group.add_argument(
        "--limit",
        type=arguments.at_least(0),
        default=0,
        help="examples per task (default: 0, all)",
    )


def _add_computation(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("computation")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="type of activations (float32 on a CPU, else bfloat16)",
    )
    group.add_argument(
        "--batch", type=arguments.at_least(1), default=8, help="windows per device at once (8)"
    )
    group.add_argument(
        "--seed",
        type=arguments.at_least(0),
        default=0,
        help="seed of the bootstrap and of the choice of lines (0)",
    )
