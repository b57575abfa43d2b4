"""Explain a topic.

tokalign help                     # lists the topics
tokalign help run                 # flags of a command
tokalign help config              # config fields and groups
tokalign help config.stage2       # fields of a group, or a single field
tokalign help methods             # methods that initialise the new rows
tokalign help files               # contents of a workdir
tokalign help exit-codes
"""

import difflib
import importlib
import textwrap
from collections.abc import Sequence

from tokalign_jax import config_reference
from tokalign_jax.errors import UserError

COMMANDS = ("run", "plan", "evaluate", "inspect", "compare", "sweep")
WIDTH = 96

METHODS = """\
--config.alignment.method= selects how rows of target tokens are computed from source tokens:

  distilled   mean of the pieces, then trained with the source model as teacher (the default)
  composed    pieces corrected by co-occurrence and frequency, and tuned on the corpus: fits
              the corpus better, retains less of the model's knowledge
  tokalign    one source token each, as published (TokAlign, Li et al. 2025)
  lexicon     one source token each, by a self-learned orthogonal map (Artetxe et al. 2018)
  topk        weighted mixtures of several source tokens
  focus       mixtures of shared tokens (FOCUS, Dobler and de Melo 2023)
  omp         orthogonal matching pursuit in a donor model (as mergekit-tokensurgeon)
  token_distillation
              mean of the pieces, then input rows fitted to the source's hidden states
              (Token Distillation, Dobler et al. 2025)
  pieces      mean of the pieces (FVT, Gee et al. 2022); needs no training
  exact       shared tokens, else random source tokens
  random      random source tokens

--config.target_tokenizer=extend keeps the tokenizer and adds tokens mined from the corpus,
--config.target_tokenizer=prune removes tokens that the corpus does not need."""

FILES = """\
A workdir holds a folder for each stage, and stages.json with the record of each:

  corpus/    de-duplicated documents, split into training and held-out
  tokens/    the corpus, tokenised with both tokenizers
  align/     alignment.npz, align_matrix.json, token vectors
  init/      the model with its new rows, as a Hugging Face folder
  stage1/    checkpoints, metrics.jsonl and TensorBoard events; also stage2/, stage3/
  evaluate/  scores.json of each state of the model
  export/    the adapted model, as a Hugging Face folder
  report/    report.html, report.md, report.json, report.png
  outdated/  results of earlier settings; reused if these settings are used again"""

EXIT_CODES = """\
  0    success
  1    a bug, with its traceback
  2    bad input, with a message that says what to do
  75   stopped by SIGTERM or Ctrl-C; progress is saved, and the same command resumes
  134  another process of the run was lost; the same command resumes"""

TEXTS = {"methods": METHODS, "files": FILES, "exit-codes": EXIT_CODES}


def main(argv: Sequence[str]) -> None:
    """Print the help on a topic.

    Raises:
      UserError: there is no such topic.
    """
    topic = argv[0].removeprefix("--") if argv else ""
    if topic in COMMANDS:
        importlib.import_module(f"tokalign_jax.cli.{topic}").main(["--help"])
    elif topic in TEXTS:
        print(TEXTS[topic])
    elif topic == "config" or topic.startswith("config."):
        print("\n".join(describe(topic.removeprefix("config").removeprefix("."))))
    elif topic in ("", "help", "-h"):
        print(__doc__, f"Topics: {', '.join((*COMMANDS, 'config', *TEXTS))}", sep="\n")
    else:
        topics = (*COMMANDS, "config", *TEXTS)
        nearest = difflib.get_close_matches(topic, topics, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no topic '{topic}'; the nearest is '{nearest}'")


def describe(name: str) -> list[str]:
    """Return lines on a config field, or on all fields of a group.

    Args:
      name: dotted name of the field or group; "" for the top level.

    Raises:
      UserError: there is no such field.
    """
    fields = {field.name: field for field in config_reference.fields()}
    if name and name not in fields:
        nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown config key '{name}'; the nearest is '{nearest}'")
    if name and not fields[name].is_group:
        return _entry(fields[name])
    prefix = f"{name}." if name else ""
    members = [
        field
        for path, field in fields.items()
        if path.startswith(prefix) and "." not in path[len(prefix) :] and path != name
    ]
    lines = textwrap.wrap(fields[name].description, WIDTH) if name else []
    for field in members:
        lines += ["", *_entry(field)]
    return lines if name else lines[1:]


def _entry(field: config_reference.Field) -> list[str]:
    if field.is_group:
        first = field.description.split("\n")[0]
        return [f"config.{field.name}.*", *_indented(first)]
    bounds = "" if field.bounds is None else f", {field.bounds[0]:g} to {field.bounds[1]:g}"
    head = f"config.{field.name} = {field.default!r}  ({field.type}{bounds})"
    return [head, *_indented(field.description)]


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - 4)]
