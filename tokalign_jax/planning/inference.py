"""Memory of the stages that read or write the model without training it: init, evaluate, export.

Upper estimates, on each device and in host memory: every kind at its largest at the same time.
What is only mapped from files does not count, since the system can take it back.

m vocabulary matrices (2, or 1 where they are tied), V and S rows of the target and of the source.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from tokalign_jax.config import (
    EXTEND,
    Config,
    StageConfig,
    distillation_budget,
    distills,
    distills_tokens,
    reads_source,
    training_stages,
)
from tokalign_jax.initialization import (
    calibration,
    composition,
    contexts,
    row_features,
    self_distillation,
    self_text,
    tuning,
)
from tokalign_jax.models import sampling
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import disk, memory
from tokalign_jax.planning.machine import Machine, MeshSizes
from tokalign_jax.planning.memory import FLOAT, Setup, elements
from tokalign_jax.text import pairs
from tokalign_jax.training import cross_tokenizer, states
from tokalign_jax.utils import paths

BLOCK = 64 << 20
"""Bytes of a large matrix that are read or written at once."""
PLACE = 80
"""Bytes of host memory for each token that the source model reads in `init`."""
TEMPLATE = 64
"""Tokens of a chat template around a question, about."""
RULES = 5
"""Matrices [F, F] of the regression on the device at once."""
MERGING = 4
"""float32 matrices of one layer on the device while its adapters are merged."""


class Source(NamedTuple):
    """The source model's rows, and the parameters in its folder."""

    rows: int
    itemsize: int
    """Bytes of a parameter."""
    dtype: str = ""
    """Type of the parameters; empty if unknown, which is not taken for the compute type."""

    @classmethod
    def of(cls, model: ModelConfig, raw: Mapping[str, Any]) -> "Source":
        """Describe the source model from its config.json (`raw`)."""
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "")
        return cls(model.vocab_size, disk.stored_bytes(raw), dtype)


class Needs(NamedTuple):
    """Bytes by kind."""

    device: Mapping[str, int]
    """On each device."""
    host: Mapping[str, int]

    def on_host(self, machine: Machine) -> int:
        """Host memory in all; the arrays of CPU devices are in it too."""
        devices = machine.devices if machine.on_cpu else 0
        return sum(self.host.values()) + devices * sum(self.device.values())


@dataclass(frozen=True)
class Run:
    """A run, its models and the devices that it runs on."""

    config: Config
    source: Source
    model: ModelConfig
    """With the target vocabulary's rows."""
    mesh: MeshSizes
    machine: Machine

    @property
    def source_model(self) -> ModelConfig:
        """The model with the source vocabulary's rows."""
        return dataclasses.replace(self.model, vocab_size=self.source.rows)

    @property
    def matrices(self) -> int:
        """Number of vocabulary matrices: embedding and head, or one if they are tied."""
        return 1 if self.model.tie_word_embeddings else 2

    @property
    def row(self) -> int:
        """Bytes of a float32 row."""
        return FLOAT * self.model.hidden_size


def needs(run: Run) -> dict[str, Needs]:
    """Memory of each stage by name; `evaluate` stands for the evaluation that takes most."""
    return {
        "init": Needs(_init_on_device(run), _init_on_host(run)),
        "evaluate": Needs(_evaluation_on_device(run), _evaluation_on_host(run)),
        "export": Needs(_export_on_device(run), _export_on_host(run)),
    }


def mesh_sizes(
    config: Config,
    source: Source,
    model: ModelConfig,
    machine: Machine,
    teachers: Mapping[str, ModelConfig],
) -> MeshSizes:
    """Choose the mesh of a run: on which training fits, and a distilled start if one is possible.

    A start is short, so that it only splits parameters further where it would not fit otherwise.

    Args:
      model: with the target vocabulary's rows.
      teachers: of the training stages that have one (`memory.teachers`).

    Raises:
      UserError: `config.mesh` does not fit the devices.
    """
    state = memory.state_bytes(config, model, teachers)
    share = functools.partial(memory.share, model)
    sizes = sharding.axis_sizes(config.mesh, machine.devices, state, machine.memory, share)
    if config.mesh.data or config.mesh.fsdp or not distills(config):
        return sizes
    for parts in (n for n in range(1, sizes[0] + 1) if sizes[0] % n == 0):
        split = sizes[0] // parts, sizes[1] * parts, sizes[2]
        run = Run(config, source, model, split, machine)
        if sum(_init_on_device(run).values()) <= machine.memory:
            return split
    return sizes


# --- init ---------------------------------------------------------------------------------------


def _init_on_device(run: Run) -> dict[str, int]:
    source = run.source.itemsize * elements(abstract_params(run.source_model), run.mesh)
    kinds = {"source model as stored": source}
    if distills(run.config):
        return kinds | _distillation_on_device(run)
    if distills_tokens(run.config):
        return kinds | _token_distillation_on_device(run)
    if not reads_source(run.config):
        return kinds
    model, compute, width = run.model, run.config.compute, run.model.hidden_size
    size, (_, fsdp, tensor) = jnp.dtype(compute.dtype).itemsize, run.mesh
    new_rows = FLOAT * elements(_vocabulary(model), run.mesh)
    devices = math.prod(run.mesh)
    sums = (
        2
        * (run.source.rows + model.vocab_size)
        * run.row
        // (devices if width % devices == 0 else 1)
    )
    on_cpu = not run.machine.fused_attention
    tokens = contexts.BATCH_TOKENS["cpu"] if on_cpu else contexts.OTHER_BATCH_TOKENS
    # States of a batch, sorted, and the levels of the scan that adds them up.
    reading = _forward(run, run.source_model, tokens, contexts.WINDOW) + 5 * tokens * run.row
    features = 5 * width + 2
    calibrating = calibration.PLACES * width * (FLOAT + size)
    calibrating += 3 * FLOAT * calibration.CHUNK * model.vocab_size // (fsdp * tensor)
    work = {
        "mean states": sums + reading,
        "learned rows": RULES * FLOAT * features**2 + 2 * FLOAT * composition.BLOCK * features,
        "calibration": new_rows + calibrating,
    }
    if run.config.initialization.tuning:
        tokens = tuning.MICRO_BATCH_TOKENS["cpu"] if on_cpu else tuning.OTHER_MICRO_BATCH_TOKENS
        # The rows, as they were and moved, their gradients and the sum of these over micro-batches.
        work["tuning"] = 4 * new_rows + _features(run) // (fsdp * tensor) + _step(run, tokens)
    return kinds | _largest(work)


def _init_on_host(run: Run) -> dict[str, int]:
    rows, source_rows = run.model.vocab_size * run.row, run.source.rows * run.row
    stored = source_rows * run.source.itemsize // FLOAT
    new_rows = run.matrices * rows
    if distills(run.config):
        # Composed tokens, which have features, and tokens in the text are at most all of V.
        size, count = jnp.dtype(run.config.compute.dtype).itemsize, _features_of_composed(run)
        width = _unprojected(run)
        blocks = 2 * FLOAT * row_features.ROWS * width
        projection = 3 * FLOAT * width * row_features.MOST if count <= width else 0
        states = len(row_features.DEPTHS) * size * run.model.vocab_size * run.model.hidden_size
        work = {
            # A block and its squares, then all blocks of some tokens and their projection.
            "features": stored + source_rows + states + max(2 * rows, projection + blocks),
            "rows to place on devices": 2 * rows,
            "trained rows": new_rows + 3 * self_distillation.BLOCK * run.row,
        }
        return {
            "new rows (float32)": new_rows,
            f"features of tokens ({run.config.compute.dtype})": run.matrices
            * size
            * run.model.vocab_size
            * count,
        } | _largest(work)
    if distills_tokens(run.config):
        settings = run.config.initialization.token_distillation
        count = min(settings.most_snippets, settings.snippets * run.model.vocab_size)
        snippets = 3 * 4 * count * (settings.snippet_length + 1)
        return {
            "new rows (float32)": new_rows + 2 * rows,
            "source rows": stored + source_rows,
            "snippets": 2 * snippets,
        }
    if not reads_source(run.config):
        return {"new rows (float32)": new_rows, "source rows": stored + source_rows}
    # What threads have put together ahead of the device, and what they work with.
    count = min(3 * composition.THREADS, 1 + -(-run.model.vocab_size // composition.BLOCK))
    blocks = count * composition.BLOCK * 5 * run.row
    work = {
        "source rows": stored + source_rows,
        "mean states": PLACE * run.config.initialization.tokens + rows,
        "learned rows": new_rows + stored + source_rows + blocks,
    }
    if run.config.initialization.tuning:
        # The source's rows; features, once more while rows are added to them; the rows once moved.
        work["tuning"] = run.matrices * (stored + source_rows) + max(
            2 * _features(run) + blocks, new_rows
        )
    states_of_tokens = 2 * (rows + source_rows)
    return {
        "new rows (float32)": new_rows,
        "mean states of tokens (float32)": states_of_tokens,
    } | _largest(work)


def _features_of_composed(run: Run) -> int:
    """Features of a composed token (`row_features.features`)."""
    return min(_unprojected(run), row_features.MOST) + 1


def _unprojected(run: Run) -> int:
    """Features of a composed token before their projection."""
    return (4 + len(row_features.DEPTHS)) * run.model.hidden_size + 2


def _distillation_on_device(run: Run) -> dict[str, int]:
    """Bytes on a device beside the source model for a distilled start, by kind.

    The source model writes text and reads tokens' pieces before the start is trained.
    """
    training, pieces = _training_on_device(run), row_features.MOST_PIECES + 1
    on_cpu = not run.machine.fused_attention
    at_once = row_features.BATCH["cpu"] if on_cpu else row_features.OTHER_BATCH
    work = {
        "text that the source model writes": _writing(run),
        "states of tokens' pieces": _forward(run, run.source_model, at_once * pieces, pieces),
    }
    if adapters := _start_adapters(run):
        merged = FLOAT * elements(_kernels(run.model), run.mesh) + MERGING * _largest_matrix(run)
        work["merged body (float32)"] = merged + FLOAT * elements(adapters, run.mesh)
    return training if sum(training.values()) >= max(work.values()) else _largest(work)


def _writing(run: Run) -> int:
    """Bytes on a device of key-value caches and logits while the source model writes."""
    written, _ = distillation_budget(run.config, run.source.rows, run.model.vocab_size)
    data, fsdp, _ = run.mesh
    backend = "gpu" if run.machine.fused_attention else "cpu"
    chat = TEMPLATE + self_text.QUESTION_LENGTH + self_text.ANSWER_LENGTH
    kinds = {
        self_text.FREE_LENGTH: self_text.FREE_SHARE + self_text.CHAT_SHARE,
        self_text.WORD_LENGTH: self_text.WORD_SHARE,
        chat: self_text.CHAT_SHARE,
    }
    dtype, sizes = jnp.dtype(run.config.compute.dtype), [0]
    for length, share in kinds.items():
        count = -(-int(written * share) // length // (data * fsdp))
        batch = min(count, sampling.batch_size(run.source_model, length, dtype, backend))
        # The scan over the layers reads one cache and makes another; one layer's is also apart.
        cached = sampling.cache_bytes(run.source_model, batch, length, dtype)
        cached = 2 * cached + cached // run.model.num_layers
        # The logits, the noise that samples from them, and their sum.
        sizes.append(cached + 3 * FLOAT * batch * run.source.rows)
    return max(sizes)


def _training_on_device(run: Run) -> dict[str, int]:
    """Bytes on a device while a distilled start is trained, beside the source model."""
    compute, (_, fsdp, tensor) = run.config.compute, run.mesh
    size = jnp.dtype(compute.dtype).itemsize
    leaves = paths.flatten(abstract_params(run.model))
    rows = elements(_vocabulary(run.model), run.mesh)
    bodies = {path: leaf for path, leaf in leaves.items() if not sharding.is_vocabulary(path)}
    body = elements(bodies, run.mesh)
    trains_body, adapters = start_trains(run) == "all", _start_adapters(run)
    features = run.matrices * run.model.vocab_size * _features_of_composed(run)
    hidden = min(self_distillation.HIDDEN, 2 * run.model.hidden_size)
    tokens = self_distillation.OTHER_MICRO_BATCH_TOKENS if run.machine.fused_attention else 1024
    setup = _setup(
        run, run.model, min(self_distillation.LENGTH, run.model.max_positions)
    ).with_compute(remat="layer")
    trained = bodies if trains_body else adapters
    work = max(
        memory.layer_bytes(setup, tokens)
        + memory.gathered_bytes(run.model, trained, size, run.mesh),
        memory.logits_bytes(run.model, setup.compute, tokens, run.mesh),
    )
    inner = 2 * run.matrices * run.model.vocab_size * hidden // (fsdp * tensor)
    # The stored arrays themselves, if they have the compute type.
    read = 0 if run.source.dtype == compute.dtype else size
    return {
        "teacher": read * elements(abstract_params(run.source_model), run.mesh),
        # As they were, changes, two moments, changed rows and their gradients.
        "rows": 6 * FLOAT * rows,
        # Parameters, two moments, a micro-batch's gradients and their sum.
        "body": (5 * FLOAT if trains_body else read) * body,
        **({"adapters": 5 * FLOAT * elements(adapters, run.mesh)} if adapters else {}),
        "features of tokens": size * features // (fsdp * tensor),
        "activations and logits": memory.kept_bytes(run.model, setup.compute, tokens, run.mesh)
        + work
        + inner_states_bytes(run.model, size, tokens)
        + size * inner,
    }


def inner_states_bytes(model: ModelConfig, size: int, tokens: int) -> int:
    """Bytes of the inner states of both models for so many target tokens (`cross_tokenizer.loss`).

    Args:
      model: either model.
      size: bytes of an element.
      tokens: target tokens of a device.
    """
    layers = len(cross_tokenizer.inner_layers(model.num_layers))
    if not layers:
        return 0
    length = self_distillation.LENGTH
    both = tokens + tokens * pairs.source_length(length) // length
    # The loop over the layers has one more slot, for those after the last of them.
    return (size * (layers + 1) * both + FLOAT * tokens) * model.hidden_size


def start_trains(run: Run) -> str:
    """What a distilled start trains beside the rows; an extension keeps the body."""
    return "rows" if run.config.target_tokenizer == EXTEND else run.config.initialization.trains


def _start_adapters(run: Run) -> paths.Tree:
    """Shapes by path of the adapters that a distilled start trains."""
    if start_trains(run) != "lora":
        return {}
    leaves = paths.flatten(abstract_params(run.model, self_distillation.ADAPTERS))
    return {path: leaf for path, leaf in leaves.items() if "/lora_" in path}


def _token_distillation_on_device(run: Run) -> dict[str, int]:
    """Bytes on a device for Token Distillation: at most a table of both vocabularies' rows."""
    settings, compute = run.config.initialization.token_distillation, run.config.compute
    both = dataclasses.replace(run.model, vocab_size=run.source.rows + run.model.vocab_size)
    table = elements(
        {"embed_tokens/embedding": _vocabulary(both)["embed_tokens/embedding"]}, run.mesh
    )
    data, fsdp, _ = run.mesh
    tokens = -(-settings.batch_size // (data * fsdp)) * (settings.snippet_length + 1)
    setup = _setup(run, both, settings.snippet_length + 1).with_compute(remat="layer")
    size = jnp.dtype(compute.dtype).itemsize
    return {
        "source model": size * elements(abstract_params(run.source_model), run.mesh),
        # As it was, changes, two moments, changed rows and their gradients.
        "rows of both vocabularies": 6 * FLOAT * table,
        "activations": memory.kept_bytes(both, setup.compute, tokens, run.mesh)
        + memory.layer_bytes(setup, tokens),
    }


def _features(run: Run) -> int:
    """Bytes of the features of every token: components and one, for both kinds side by side."""
    return FLOAT * run.matrices * run.model.vocab_size * 2 * (tuning.COMPONENTS + 1)


def _step(run: Run, tokens: int) -> int:
    """Activations and working memory of a training step on the vocabulary's rows."""
    length = min(tuning.LENGTH, run.model.max_positions)
    setup = _setup(run, run.model, length).with_compute(remat="layer")
    work = max(
        memory.layer_bytes(setup, tokens),
        memory.logits_bytes(run.model, setup.compute, tokens, run.mesh),
    )
    return memory.kept_bytes(run.model, setup.compute, tokens, run.mesh) + work


# --- evaluate -----------------------------------------------------------------------------------


def _evaluation_on_device(run: Run) -> dict[str, int]:
    """The model in the compute type, and a batch of windows or what loading a state takes."""
    compute, settings = run.config.compute, run.config.evaluation
    size = jnp.dtype(compute.dtype).itemsize
    model = max((run.model, run.source_model), key=lambda model: model.vocab_size)
    weights = size * elements(abstract_params(model), run.mesh)
    tokens = settings.batch * settings.sequence_length
    work = {f"{settings.batch} windows": _forward(run, model, tokens, settings.sequence_length)}
    trained = list(training_stages(run.config).values())
    for count in range(1, len(trained) + 1):
        leaves, adapters = _changed(run, trained[:count])
        largest = max(
            (elements({path: leaf}, run.mesh) for path, leaf in leaves.items()), default=0
        )
        casting = FLOAT * elements({**leaves, **adapters}, run.mesh) + size * largest
        merging = FLOAT * elements(adapters, run.mesh) + (
            MERGING * _largest_matrix(run) if adapters else 0
        )
        kind = "loading what was trained"
        work[kind] = max(work.get(kind, 0), casting - weights, merging)
    return {f"model ({compute.dtype})": weights} | _largest(work)


def _evaluation_on_host(run: Run) -> dict[str, int]:
    if not run.config.evaluation.random_baseline:
        return {"one block": 2 * BLOCK}
    rows = run.model.vocab_size * run.row
    return {"random rows (float32)": (run.matrices + 2) * rows + run.source.rows * run.row}


# --- export -------------------------------------------------------------------------------------


def _export_on_device(run: Run) -> dict[str, int]:
    leaves, adapters = _changed(run, list(training_stages(run.config).values()))
    return {
        "what was trained (float32)": FLOAT * elements({**leaves, **adapters}, run.mesh),
        "one matrix with its adapter (float32)": MERGING * _largest_matrix(run) if adapters else 0,
    }


def _export_on_host(run: Run) -> dict[str, int]:
    return {"one tensor": max(MERGING * _largest_matrix(run), 3 * BLOCK)}


# --- Shared -------------------------------------------------------------------------------------


def _changed(run: Run, stages: Sequence[StageConfig]) -> tuple[paths.Tree, paths.Tree]:
    """Shapes by path of what these stages leave trained: parameters, and adapters."""
    leaves: paths.Tree = {}
    adapters: paths.Tree = {}
    for number, stage, trained in states.surviving(run.model, stages):
        shapes = paths.flatten(memory.shapes(run.model, stage)[0])
        leaves |= {path: shapes[path] for path in trained if "/lora_" not in path}
        # Each stage has adapters of its own; the path only decides how they are split.
        adapters |= {f"{number}/{path}": shapes[path] for path in trained if "/lora_" in path}
    return leaves, adapters


def _forward(run: Run, model: ModelConfig, tokens: int, length: int) -> int:
    """Working memory of a forward pass over so many tokens of a device, and of their logits."""
    setup = _setup(run, model, min(length, model.max_positions))
    size = jnp.dtype(setup.compute.dtype).itemsize
    gathered = memory.gathered_bytes(model, {}, size, run.mesh)
    layer = memory.layer_bytes(setup, tokens) // 2 + gathered + tokens * model.hidden_size * size
    return max(layer, memory.logits_bytes(model, setup.compute, tokens, run.mesh))


def _setup(run: Run, model: ModelConfig, length: int) -> Setup:
    stage = StageConfig(method="embedding").with_batch(sequence_length=length)
    return Setup("", stage, run.config.compute, model, run.mesh, run.machine)


def _vocabulary(model: ModelConfig) -> paths.Tree:
    leaves = paths.flatten(abstract_params(model))
    return {path: leaf for path, leaf in leaves.items() if sharding.is_vocabulary(path)}


def _largest_matrix(run: Run) -> int:
    """Bytes of the largest matrix of one layer (and expert) in float32."""
    return FLOAT * max(math.prod(leaf.shape[-2:]) for leaf in _kernels(run.model).values())


def _kernels(model: ModelConfig) -> paths.Tree:
    """Shapes by path of the kernels that adapters may change."""
    leaves = paths.flatten(abstract_params(model))
    return {path: leaf for path, leaf in leaves.items() if path.endswith("_proj/kernel")}


def _largest(work: Mapping[str, int]) -> dict[str, int]:
    """The largest of what is there one after the other."""
    most = max(work, key=work.__getitem__)
    return {f"largest work at once ({most})": work[most]}
