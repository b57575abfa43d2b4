"""Retention of a model after several starts and trainings, measured in one process.

    python benchmarks/retention.py --source /models/smollm2 --target /tokenizers/qwen3 \\
        --corpus mix-train.jsonl.xz --text mix-valid.jsonl.xz --language_field lang \\
        --other_text other.jsonl --abilities abilities/ --chat_questions chat.jsonl \\
        --start 'pieces:alignment.method=pieces' \\
        --start 'distilled' --start 'distilled-1:seed=1' \\
        --start 'states-alone:Weights.emphasis=1' \\
        --train 'mixture-12M:steps=183,objective=mixture,learning_rate=3e-4' --out runs/retention

A start is a name and config fields in which it differs from the defaults; a field
`self_distillation.BODY_RATE`, `self_text.WORD_LENGTH` or `Weights.emphasis` is a constant of the
initial distillation, and a field `model` is the folder of a start that another program made. Each
training continues the start or training of its field `start` (the last start by default) and is a
stage with these fields, on the corpus and, at `--self_share` of its tokens, on text of the source
model; one with the field `average=NAME+NAME` is the mean of such models' weights instead. The
source model is loaded once, writes its text once a seed, and programs are compiled once, which a
run of its own does for every start.

Reported are abilities as the mean over suites, over all questions, and by how the tokenizers split
a question (shares of the questions that the source answers right, and the margin of the right
choice over the best wrong one in nats), bits per byte and the distance to the source's likelihoods
(`evaluation/fidelity.py`) on held-out text and on out-of-domain text. Writes `retention.jsonl`,
one line per model as soon as it is measured; `retention_figure.py` makes a table and a figure of
such files.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tokalign_jax import api
from tokalign_jax.alignment import methods
from tokalign_jax.config import (
    ComputeConfig,
    Config,
    config_from_dict,
    config_to_dict,
    learns_from_source,
)
from tokalign_jax.evaluation import abilities, chat_questions, measures
from tokalign_jax.initialization import self_corpus, self_distillation, self_text
from tokalign_jax.initialization.initialization import Side
from tokalign_jax.initialization.start import make_start
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical, chats, shared_boundaries, tokenizing
from tokalign_jax.text.corpus import Document
from tokalign_jax.training import cross_tokenizer, source_teacher
from tokalign_jax.training.batches import SourceText
from tokalign_jax.training.step import NEXT_TOKEN
from tokalign_jax.utils import compiling

STAGE = {"batch.size": 64, "batch.sequence_length": 1024, "method": "full", "start_offset": 0}
"""Fields of a training stage unless given."""
ALIGNED = 8_000
"""Documents from which methods that need token vectors learn them."""
COLUMNS = ("mean", "overall", "alike", "question", "composed", "recut", "text", "other", "gap")


class Item(NamedTuple):
    """A start or a training: its name and its fields."""

    name: str
    fields: dict[str, Any]


def main() -> None:
    arguments = parsed()
    began = time.perf_counter()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} {line}", flush=True)

    compiling.prepare()
    bench = Bench(arguments, log)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "retention.jsonl").open("a", encoding="utf-8") as file:

        def report(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            log(line_of(row))

        log(" | ".join(("model", *COLUMNS)))
        report(bench.measured("source", bench.source.config, bench.params, bench.source.tokenizer))
        for start in arguments.start:
            report(bench.start(start))
            names = {start.name}
            for training in arguments.train:
                if training.fields.get("start", arguments.start[-1].name) in names:
                    report(bench.train(training))
                    names.add(training.name)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("source", "target", "corpus", "text", "abilities"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("other_text", "chat_questions", "language_field"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--start", type=item, action="append", required=True)
    parser.add_argument("--train", type=item, action="append", default=[])
    parser.add_argument("--self_share", type=float, default=0.25, help="of a training's tokens")
    parser.add_argument("--corpus_bytes", type=int, default=24_000_000)
    parser.add_argument("--text_bytes", type=int, default=600_000)
    parser.add_argument("--questions", type=int, default=0, help="per suite; 0: all")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def item(text: str) -> Item:
    """Parse NAME or NAME:field=value,field=value."""
    name, _, rest = text.partition(":")
    fields = {}
    for part in filter(None, re.split(r",(?![^(]*\))", rest)):
        key, _, value = part.partition("=")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return Item(name, fields)


def line_of(row: Mapping[str, Any]) -> str:
    """Format the columns of a result."""
    values = [row.get(column) for column in COLUMNS]
    return " | ".join([row["name"], *("" if v is None else f"{v:.3f}" for v in values)])


class Bench:
    """The source model, texts and questions, the last start and its trainings."""

    def __init__(self, arguments: argparse.Namespace, log: Any):
        self.arguments, self.log, self.mesh = arguments, log, sharding.make_mesh()
        self.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.source = api.load_model(arguments.source)
        self.params = sharding.place(self.source.params, self.mesh)
        self.target = api.load_tokenizer(arguments.target)
        self.documents = self._documents(arguments.corpus, arguments.corpus_bytes)
        self.alignment = api.align(self.source.tokenizer, self.target)
        self.material = self._material()
        self.reference: measures.Measured | None = None
        self.right: np.ndarray | None = None
        self.models: dict[str, api.Model] = {}
        self.folder = tempfile.TemporaryDirectory()
        # Starts with the same seed and budget are distilled on the same text.
        self_text.Writer.write = _write_once(self_text.Writer.write)  # type: ignore[method-assign]

    def _documents(self, name: str, size: int) -> list[Document]:
        texts = self._texts(name, size)
        documents = [
            Document(text, language, len(text.encode()))
            for language, group in texts.items()
            for text in group
        ]
        return [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]

    def _texts(self, name: str, size: int) -> dict[str, list[str]]:
        field = self.arguments.language_field
        return api.load_texts(name, language_field=field, budget_bytes=size) if name else {}

    def _material(self) -> measures.Material:
        arguments = self.arguments
        return measures.Material(
            texts=self._texts(arguments.text, arguments.text_bytes),
            other_texts=self._texts(arguments.other_text, arguments.text_bytes),
            questions=abilities.read(arguments.abilities, arguments.questions),
            sequence_length=min(1024, self.source.config.max_positions),
            batch=16,
            compute=ComputeConfig(dtype=self.dtype),  # type: ignore[arg-type]
            seed=0,
            chat_questions=chat_questions.read(arguments.chat_questions)
            if arguments.chat_questions
            else (),
        )

    # --- Measuring ------------------------------------------------------------------------------

    def measured(self, name: str, model: Any, params: Any, tokenizer: Any, **facts: Any) -> dict:
        """Measure a model; the first one is the reference of all others."""
        material, log = self.material, self.log
        params = sharding.place(params, self.mesh)
        scores = abilities.score(
            model,
            params,
            tokenizer,
            material.questions,
            abilities.beginning_id(tokenizer),
            "float32",
            self.mesh,
        )
        result = measures.measure(
            name, model, params, tokenizer, material, self.mesh, log, with_questions=False
        )
        if material.chat_questions and not chats.template_problem(tokenizer):
            how = material.reply_tokens, self.dtype, self.mesh, log
            replies = chat_questions.ask(model, params, tokenizer, material.chat_questions, *how)
            chat = chat_questions.summary(material.chat_questions, replies, None, 0)
            result = dataclasses.replace(result, replies=replies, chat=chat)
        result = dataclasses.replace(result, right=abilities.is_right(scores))
        reference = self.reference.reference if self.reference else None
        content = measures.summary(result, reference, material)
        row = {"name": name, **facts, **self._columns(content, scores), "scores": content}
        if self.reference is None:
            self.reference = result
        return row

    def _columns(self, content: Mapping[str, Any], scores: np.ndarray) -> dict[str, Any]:
        right, names = abilities.is_right(scores), [q.suite for q in self.material.questions]
        suites = {s: right[[n == s for n in names]].mean() for s in names if s != abilities.SUMS}
        row: dict[str, Any] = {"mean": float(np.mean([*suites.values()]))}
        row["overall"] = float(right[[name in suites for name in names]].mean())
        row["text"] = content["pooled"]["bits_per_byte"]
        if "other_text" in content:
            row["other"] = content["other_text"]["pooled"]["bits_per_byte"]
        if self.reference is not None:
            row["gap"] = content["fidelity"]["pooled"]["gap"]["value"]
            kinds = np.array(
                abilities.segmentation_kinds(
                    self.reference.tokenizer, self.target, self.material.questions
                )
            )
            margins = scores[:, 0] - scores[:, 1:].max(axis=1)
            for kind in abilities.SEGMENTATION_KINDS:
                known = (kinds == kind) & self.reference.right
                if known.any():
                    row[kind] = float(right[known].mean())
                    row[f"{kind}_margin"] = float(margins[known].mean())
                    row[f"{kind}_questions"] = int(known.sum())
        return row

    # --- Starts ---------------------------------------------------------------------------------

    def start(self, start: Item) -> dict[str, Any]:
        """Make a start, or read it, and measure it."""
        began = time.perf_counter()
        if "model" in start.fields:
            model = api.load_model(start.fields["model"])
            model = dataclasses.replace(model, tokenizer=self.target)
            self.models = {start.name: model}
            return self.measured(start.name, model.config, model.params, self.target)
        constants = {k: v for k, v in start.fields.items() if k.split(".")[0] in CONSTANTS}
        config = self._config({k: v for k, v in start.fields.items() if k not in constants})
        shards = [
            tokenizing.tokenize(side, self.documents[:500])
            for side in (self.source.tokenizer, self.target)
        ]

        method, alignment = config.alignment.method, self.alignment
        if method in methods.NEED_VECTORS:
            texts = [document.text for document in self.documents[:ALIGNED]]
            sides = self.source.tokenizer, self.target
            alignment = api.align(*sides, texts, method, seed=config.seed, log=self.log)
        draw = api._drawing(self.documents, self.source.tokenizer, config.seed)
        side = Side(self.source.config, self.params, self.source.tokenizer, shards[0])
        with replaced(constants):
            made = make_start(
                config, side, self.target, shards[1], alignment, draw, self.mesh, self.log
            )
        params = jax.tree.map(np.asarray, api._without_padding(made.config, made.params))
        model = api.Model(made.config, params, self.target, self.source.folder)
        self.models = {start.name: model}
        facts = {"seconds": time.perf_counter() - began, **made.facts}
        return self.measured(start.name, made.config, params, self.target, **facts)

    def _config(self, fields: Mapping[str, Any]) -> Config:
        values = config_to_dict(Config())
        for key, value in {"compute.dtype": self.dtype, **fields}.items():
            *groups, name = key.split(".")
            functools.reduce(lambda part, group: part[group], groups, values)[name] = value
        return config_from_dict(values)

    # --- Training -------------------------------------------------------------------------------

    def train(self, training: Item) -> dict[str, Any]:
        """Train the last start, or what a training made of it, and measure the result."""
        if "average" in training.fields:
            return self._average(training)
        [first, *_] = self.models
        before = self.models[training.fields.get("start", first)]
        fields = {k: v for k, v in training.fields.items() if k not in ("start", "seed")}
        changes = {f"stage1.{key}": value for key, value in (STAGE | fields).items()}
        stage = self._config(changes).stage1
        objective = NEXT_TOKEN
        if learns_from_source(stage):
            objective = source_teacher.objective(stage, self.teacher, self.shards[2])
        began = time.perf_counter()
        seed = training.fields.get("seed", 0)
        trained = api._train(before, self.shards[1], stage, seed, self.log, objective)
        self.models[training.name] = trained
        facts = {
            "seconds": time.perf_counter() - began,
            "start": training.fields.get("start", first),
            "training": {k: v for k, v in training.fields.items() if k != "start"},
            "tokens": stage.steps * stage.batch.size * stage.batch.sequence_length,
        }
        return self.measured(training.name, trained.config, trained.params, self.target, **facts)

    def _average(self, item: Item) -> dict[str, Any]:
        """Average the weights of the models `a+b` named by the field `average`; measure that."""
        parts = [self.models[name] for name in item.fields["average"].split("+")]

        def mean(*weights: Any) -> np.ndarray:
            return np.mean([np.asarray(x, np.float32) for x in weights], axis=0)

        params = jax.tree.map(mean, *(part.params for part in parts))
        self.models[item.name] = dataclasses.replace(parts[0], params=params)
        config = parts[0].config
        return self.measured(item.name, config, params, self.target, average=item.fields["average"])

    @functools.cached_property
    def teacher(self) -> source_teacher.Teacher:
        params = jax.tree.map(lambda x: x.astype(self.dtype), self.params)
        return source_teacher.Teacher(self.source.config, params, "source")

    @functools.cached_property
    def shards(self) -> tuple[Any, Any, SourceText]:
        """The training text for both tokenizers, and their shared boundaries."""
        documents = [*self.documents, *self._self_documents()]
        documents = [documents[i] for i in np.random.default_rng(1).permutation(len(documents))]
        folder = Path(self.folder.name)
        sides = []
        for name, tokenizer in (("source", self.source.tokenizer), ("target", self.target)):
            writer = tokenizing.ShardWriter(folder / name, tokenizer, self.target)
            writer.add(documents)
            writer.close()
            sides.append(tokenizing.TokenShards.open(folder / name))
        groups = [documents[i : i + 256] for i in range(0, len(documents), 256)]
        pairs = zip((self.source.tokenizer, self.target), sides)
        shared_boundaries.run(groups, *pairs, folder / "shared", self.log)
        positions = shared_boundaries.open_positions(folder / "shared")
        return *sides, SourceText(sides[0], positions)

    def _self_documents(self) -> Iterator[Document]:
        size = sum(document.bytes for document in self.documents)
        share = self.arguments.self_share
        tokens = int(share / (1 - share) * size / 4)
        tokenizer, with_chats = self.source.tokenizer, not chats.template_problem(self.target)
        writer = self_text.Writer(
            self.source.config, self.params, tokenizer, self.dtype, self.mesh, seed=100
        )
        special = canonical.special_ids(tokenizer) if with_chats else set()
        passages = writer.write(tokens, self.log, frozenset(special))
        for record in self_corpus.records(passages, tokenizer):
            if "messages" in record:
                messages = chats.messages_of(record["messages"])
                text, chat = chats.plain_text(messages), json.dumps(messages, ensure_ascii=False)
                yield Document(text, "self", len(text.encode()), "self", chat)
            else:
                yield Document(record["text"], "self", len(record["text"].encode()), "self")


MODULES = {"self_distillation": self_distillation, "self_text": self_text}
CONSTANTS = (*MODULES, "Weights")
"""First parts of the names of constants."""


@contextlib.contextmanager
def replaced(constants: Mapping[str, Any]) -> Iterator[None]:
    """Replace constants of the initial distillation for a while."""
    if not constants:
        yield
        return
    defaults = cross_tokenizer.Weights()
    weights = {k.split(".")[1]: v for k, v in constants.items() if k.startswith("Weights.")}
    values = {
        (MODULES[group], name): value
        for (group, name), value in ((key.split("."), v) for key, v in constants.items())
        if group in MODULES
    }
    before = {(module, name): getattr(module, name) for module, name in values}
    jax.clear_caches()  # Constants are part of compiled programs.
    try:
        cross_tokenizer.Weights.__new__.__defaults__ = tuple(defaults._replace(**weights))
        for (module, name), value in values.items():
            setattr(module, name, value)
        yield
    finally:
        cross_tokenizer.Weights.__new__.__defaults__ = tuple(defaults)
        for (module, name), value in before.items():
            setattr(module, name, value)
        jax.clear_caches()


def _write_once(write: Any) -> Any:
    written: dict[Any, Any] = {}

    def cached(writer: Any, budget: int, log: Any, special: Any = ()) -> Any:
        constants = tuple(v for name, v in vars(self_text).items() if name.isupper())
        key = writer.seed, budget, frozenset(special), constants
        if key not in written:
            written[key] = write(writer, budget, log, special)
        return written[key]

    return cached


if __name__ == "__main__":
    main()
