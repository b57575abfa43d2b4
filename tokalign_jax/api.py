"""Python API: the steps of an adaptation as functions of arrays, without a workdir.

They also work in a notebook on a laptop. For runs that can be resumed, use `run` or the command
line.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo
from tokalign_jax.alignment import methods, vectors
from tokalign_jax.alignment.alignment import Alignment, Rule
from tokalign_jax.config import (
    AlignmentConfig,
    ComputeConfig,
    Config,
    InitializationConfig,
    StageConfig,
    TextConfig,
    config_from_dict,
    learns_from_source,
)
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import bits_per_byte, samples
from tokalign_jax.initialization.initialization import Side
from tokalign_jax.initialization.start import Draw, make_start
from tokalign_jax.models import hub, huggingface, lora
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import resolve
from tokalign_jax.planning.machine import Machine
from tokalign_jax.text import canonical, corpus, tokenizing
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.editing import within_rows
from tokalign_jax.training import loop
from tokalign_jax.training.step import NEXT_TOKEN, Objective
from tokalign_jax.utils import paths
from tokalign_jax.utils.progress import Log

Texts = Sequence[str] | Mapping[str, Sequence[str]]
"""Documents; or documents by language."""


@dataclass(frozen=True)
class Model:
    """A language model: its architecture, weights and tokenizer.

    Attributes:
      config: the architecture; `config.vocab_size` is the number of rows.
      params: nested dict of arrays; the rows are `params["embed_tokens"]["embedding"]` and, unless
        the head is tied, `params["lm_head"]["kernel"]`, both [rows, hidden size].
      tokenizer: a fast tokenizer of transformers.
      folder: the Hugging Face folder of the source model, whose config.json `save` starts from.
      losses: loss in nats per token of each training step since the model was loaded.
    """

    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    losses: tuple[float, ...] = ()


def _silent(line: str) -> None:
    del line


def load_model(name: str, dtype: str | None = None) -> Model:
    """Load a model and its tokenizer.

    Args:
      name: a folder in Hugging Face format, a hub name (`name@revision` pins one), or `embedded`
        for the demo's.
      dtype: dtype of the weights, such as `float32`; None: as stored.

    Raises:
      UserError: the model is missing, broken or of an unsupported family.
    """
    folder = hub.resolve(demo.source_model(name), what="model")
    config, _ = hub.load_config(folder)
    huggingface.check_weights(folder, config)
    tokenizer = within_rows(hub.load_tokenizer(folder), config.vocab_size, f"model '{name}'")
    params = huggingface.load_params(folder, config, dtype and jnp.dtype(dtype))
    return Model(config, params, tokenizer, folder)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
      name: a folder, a hub name, or `embedded` for the demo's multilingual one.

    Raises:
      UserError: the tokenizer is missing or of an unsupported kind.
    """
    folder = hub.resolve(demo.target_tokenizer(name), what="tokenizer", weights=False)
    tokenizer = hub.load_tokenizer(folder)
    tokenizing.check(tokenizer)
    return tokenizer


def load_texts(
    name: str = "embedded", *, language_field: str = "", budget_bytes: int = 5_000_000_000
) -> dict[str, list[str]]:
    """Read documents, by language.

    Args:
      name: files, a folder, a glob, a hub dataset, or `embedded` for the demo's.
      language_field: field of a record with its language; "": all documents are in one group,
        `all`.
      budget_bytes: maximum UTF-8 bytes to read, shared among files by their size.

    Raises:
      UserError: the text is missing or cannot be read.
    """
    if name == "embedded":
        language_field = language_field or "language"
    text = TextConfig(language_field=language_field, budget_bytes=budget_bytes)
    config = Config(corpus=name, text=text)
    corpus.check(config)
    texts: dict[str, list[str]] = {}
    for document in corpus.read_within_budget(config):
        texts.setdefault(document.language, []).append(document.text)
    return texts


def align(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    texts: Texts = (),
    method: str = "pieces",
    *,
    seed: int = 0,
    log: Log = _silent,
    **settings: Any,
) -> Alignment:
    """Align target tokens to source tokens.

    Args:
      texts: documents in which frequencies and co-occurrences are counted; `pieces`, `exact` and
        `random` need none.
      method: see `tokalign help methods`. `distilled` aligns as `pieces` does; `initialize` with
        texts then distils the source model.
      settings: further fields of `AlignmentConfig`.

    Returns:
      Mixtures of source rows, a rule and a score for every target token, as arrays.

    Raises:
      UserError: an unknown method or field, or a method that needs texts has none.
    """
    config = config_from_dict({"method": method, **settings}, AlignmentConfig, "alignment.")
    documents = _documents(texts)
    if method == "omp":
        raise UserError("method 'omp' needs a donor model: use it with `tokalign run`")
    if method in methods.NEED_VECTORS and not documents and not config.target_vectors:
        raise UserError(f"method '{method}' needs text: use align(..., texts=...)")
    old, new = (tokenizing.tokenize(tokenizer, documents) for tokenizer in (source, target))
    inputs = methods.Inputs(config, source, target, old.counts, new.counts, seed, log)
    if method in methods.NEED_VECTORS:
        if method == "tokalign":
            config = dataclasses.replace(config, vectors="glove")
        shared = methods.pairs(inputs.spelled.exact)
        source_vectors, target_vectors, _ = vectors.make(config, old, new, seed, log, shared)
        inputs = dataclasses.replace(inputs, source=source_vectors, target=target_vectors)
    alignment, _ = methods.make(inputs)
    return alignment


def explain(
    alignment: Alignment,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    token: int | str,
) -> dict[str, Any]:
    """Explain the rows of a target token.

    Args:
      token: its id, or a text that is a single token.

    Returns:
      `token`, `rule`, `score`, and the weights of its `embedding` and `head` rows by source token.

    Raises:
      UserError: the text is not a single token, or the alignment is of other tokenizers.
    """
    _check_tokenizers(alignment, source, target)
    ids = (
        [token] if isinstance(token, int) else target(token, add_special_tokens=False)["input_ids"]
    )
    if len(ids) != 1 or not 0 <= ids[0] < alignment.target_size:
        raise UserError(f"{token!r} is not a single token of the target tokenizer")

    def weights(mixture: Any) -> dict[str, float]:
        row = slice(*mixture.indptr[ids[0] : ids[0] + 2])
        entries = zip(mixture.ids[row].tolist(), mixture.weights[row].tolist())
        return {_text(source, i): round(w, 4) for i, w in entries if i < alignment.source_size}

    return {
        "token": target.decode(ids),
        "rule": Rule(alignment.rules[ids[0]]).name.lower(),
        "score": float(alignment.scores[ids[0]]),
        "embedding": weights(alignment.embedding),
        "head": weights(alignment.head),
    }


def initialize(
    source: Model,
    tokenizer: PreTrainedTokenizerBase,
    alignment: Alignment,
    texts: Texts = (),
    *,
    seed: int = 0,
    log: Log = _silent,
    **settings: Any,
) -> Model:
    """Initialise the rows of a model for a new vocabulary.

    Without texts, rows are the alignment's mixtures and all other weights are unchanged. With
    texts, the model is then distilled from the source model, on these and on text that the source
    model writes itself (method `distilled`).

    Args:
      tokenizer: the target tokenizer.
      alignment: of `tokenizer` to `source.tokenizer`.
      settings: further fields of `InitializationConfig`, such as `distillation_tokens`.

    Raises:
      UserError: an unknown field, a value out of bounds, or an alignment of other tokenizers.
    """
    _check_tokenizers(alignment, source.tokenizer, tokenizer)
    documents = _documents(texts)
    initialization = config_from_dict(settings, InitializationConfig, "initialization.")
    config = Config(
        seed=seed,
        alignment=AlignmentConfig(method="distilled" if documents else "pieces"),
        initialization=initialization,
        compute=ComputeConfig(dtype=_compute_dtype()),
    )
    mesh = sharding.make_mesh()
    shards = [tokenizing.tokenize(side, documents) for side in (source.tokenizer, tokenizer)]
    draw = _drawing(documents, source.tokenizer, seed)
    side = Side(source.config, source.params, source.tokenizer, shards[0])
    start = make_start(config, side, tokenizer, shards[1], alignment, draw, mesh, log)
    params = _without_padding(start.config, start.params)
    return Model(start.config, params, tokenizer, source.folder)


def train(
    model: Model,
    texts: Texts,
    *,
    method: Literal["embedding", "lora", "full"] = "full",
    steps: int = 100,
    learning_rate: float = 5e-4,
    batch_size: int = 8,
    sequence_length: int = 256,
    seed: int = 0,
    log: Log = _silent,
    **settings: Any,
) -> Model:
    """Train a model on text with the next-token loss.

    Args:
      method: trainable parameters: `embedding` (the rows alone: Stage 1 of TokAlign), `lora`, whose
        adapters are merged at the end, or `full`.
      batch_size: sequences per step.
      settings: further fields of `StageConfig`.

    Returns:
      The trained model with the loss of each step; trained parameters are float32.

    Raises:
      UserError: the text is shorter than a sequence, or a setting is invalid.
    """
    values = {
        "method": method,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch": {"size": batch_size, "sequence_length": sequence_length},
        "start_offset": 0,
        **settings,
    }
    stage = config_from_dict(values, StageConfig, "stage1.")
    if learns_from_source(stage):
        raise UserError(f"objective '{stage.objective}' needs the source model: use `tokalign run`")
    if stage.validation_every:
        raise UserError(
            "validation_every needs the held-out text of a run: leave it out and use `evaluate`, "
            "or use `tokalign run`"
        )
    shards = tokenizing.tokenize(model.tokenizer, _documents(texts))
    return _train(model, shards, stage, seed, log)


def _drawing(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seed: int) -> Draw:
    """Return a function that draws documents with about a number of tokens, always the same."""

    def draw(tokens: int) -> Iterator[Document]:
        order = np.random.default_rng(seed).permutation(len(documents))
        remaining = tokens
        for i in order.tolist():
            if remaining <= 0:
                return
            yield documents[i]
            encoding = tokenizer(documents[i].text, add_special_tokens=False)
            remaining -= len(encoding["input_ids"])

    return draw


def _train(
    model: Model,
    shards: tokenizing.TokenShards,
    stage: StageConfig,
    seed: int,
    log: Log,
    objective: Objective = NEXT_TOKEN,
) -> Model:
    """Run a stage with a temporary folder for its checkpoints."""
    skipped = dataclasses.replace(stage, steps=0)
    compute = ComputeConfig(dtype=_compute_dtype())
    config = Config(seed=seed, stage1=stage, stage2=skipped, compute=compute)
    mesh = sharding.make_mesh()
    setups = resolve.resolved_stages(config, model.config, mesh.devices.shape, Machine.of(), {})
    setup = setups["stage1"]
    config = dataclasses.replace(config, compute=setup.compute)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    with TemporaryDirectory() as folder:
        result = loop.run_stage(
            "stage1",
            setup.stage,
            config,
            model.config,
            model.params,
            shards,
            Path(folder),
            0,
            log,
            mesh,
            objective,
        )
    params = _without_padding(model.config, _merged(result.params, setup.stage))
    losses = tuple(float(record["loss"]) for record in result.history)
    return dataclasses.replace(model, params=params, losses=(*model.losses, *losses))


def evaluate(model: Model, texts: Texts, *, sequence_length: int = 256) -> dict[str, float]:
    """Measure bits per byte of text, by language and over `all`; lower is better.

    Bits per byte are comparable across vocabularies, since every one spells the same bytes.

    Raises:
      UserError: a language has no text.
    """
    groups = _by_language(texts)
    empty = [language for language, group in groups.items() if not any(group)]
    if empty or not groups:
        which = f" of {empty[0]!r}" if empty else ""
        raise UserError(f"there is no text to measure{which}: give at least one document")
    length = min(sequence_length, model.config.max_positions)
    costs = bits_per_byte.evaluate_documents(
        model.config,
        model.params,
        model.tokenizer,
        groups,
        sequence_length=length,
        batch=8,
        compute=ComputeConfig(dtype=_compute_dtype()),
    )
    result = {language: entry.total.bits_per_byte for language, entry in costs.items()}
    if len(result) > 1:
        result["all"] = bits_per_byte.summary([*costs.values()], 0)["bits_per_byte"]
    return result


def generate(model: Model, prompt: str, tokens: int = 32) -> str:
    """Continue a text greedily; return the continuation."""
    (sample,) = samples.continuations(
        model.config, model.params, model.tokenizer, [prompt], tokens, _compute_dtype()
    )
    return sample["continuation"]


def save(model: Model, folder: str | Path, dtype: str = "source") -> Path:
    """Write a folder that transformers opens with `AutoModelForCausalLM` and `AutoTokenizer`.

    Args:
      folder: a new or empty folder.
      dtype: dtype of the weights; `source`: that of each weight of the source model.

    Raises:
      UserError: the folder is not empty.
    """
    _, raw = hub.load_config(model.folder)
    huggingface.save_checkpoint(
        folder,
        model.params,
        model.config,
        raw,
        model.tokenizer,
        dtypes=dtype,
        source_folder=model.folder,
    )
    return Path(folder)


def run(
    config: Config | Mapping[str, Any],
    workdir: str | Path,
    stages: Sequence[str] | None = None,
    log: Log = print,
) -> Path:
    """Run the pipeline in a workdir, like `tokalign run`, or resume it.

    Args:
      config: a config, or a dict of its fields such as `{"stage2": {"steps": 100}}`.
      stages: run only these stages, and unfinished ones that they need.

    Returns:
      The workdir; `export` in it is the adapted model.

    Raises:
      UserError: bad input, before any long work.
    """
    from tokalign_jax import pipeline
    from tokalign_jax.utils import compiling

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    compiling.prepare()
    run_config = config if isinstance(config, Config) else config_from_dict(config)
    return pipeline.run(run_config, Path(workdir), stages, log)


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text, or its spelling if it is not whole characters."""
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else str(text)


def _check_tokenizers(
    alignment: Alignment, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> None:
    """Check that an alignment was made with these tokenizers; one may have changed since."""
    for side, tokenizer, fingerprint in (
        ("source", source, alignment.source_fingerprint),
        ("target", target, alignment.target_fingerprint),
    ):
        if canonical.fingerprint(tokenizer) != fingerprint:
            raise UserError(
                f"the alignment was made with another {side} tokenizer: align these two first"
            )


def _by_language(texts: Texts) -> dict[str, list[str]]:
    groups = texts if isinstance(texts, Mapping) else {"all": texts}
    if any(isinstance(group, str) for group in groups.values()):
        raise UserError("texts is a single string: give a list of documents, or a dict of lists")
    return {language: [_document(text) for text in group] for language, group in groups.items()}


def _document(text: Any) -> str:
    """Return a document without unpaired surrogates, which UTF-8 cannot encode."""
    if not isinstance(text, str):
        raise UserError(f"texts has a document that is not a string: {text!r:.80}")
    return text.encode("utf-8", errors="replace").decode()


def _documents(texts: Texts) -> list[Document]:
    return [
        Document(text, language, len(text.encode()))
        for language, group in _by_language(texts).items()
        for text in group
    ]


def _compute_dtype() -> Literal["float32", "bfloat16"]:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _merged(params: Params, stage: StageConfig) -> Params:
    """Merge adapters into their kernels."""
    spec, leaves = loop.lora_spec(stage), paths.flatten(params)
    if spec is None:
        return params
    for name in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        adapter = lora.Adapter(spec, leaves.pop(f"{name}/lora_a"), leaves.pop(f"{name}/lora_b"))
        kernel = jnp.array(leaves[f"{name}/kernel"])  # a copy: the caller owns the original
        leaves[f"{name}/kernel"] = lora.merge_into(kernel, [adapter])
    return paths.unflatten(leaves)


def _without_padding(config: ModelConfig, params: Params) -> Params:
    """Remove the padding rows of embedding and head."""
    trim: Callable[[Any], Any] = lambda rows: rows[: config.vocab_size]  # noqa: E731
    new = {**params, "embed_tokens": jax.tree.map(trim, params["embed_tokens"])}
    if "lm_head" in params:
        new["lm_head"] = {**params["lm_head"], "kernel": trim(params["lm_head"]["kernel"])}
    return new
