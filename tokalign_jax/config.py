"""Configuration of a run as frozen dataclasses; every field is documented where it is declared.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict` with the same names. It is
converted to `Config` here, after which no field is looked up by a string. A file sets the fields of
its recipe; all others have the defaults below.
"""

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ml_collections.config_dict import ConfigDict, placeholder

from tokalign_jax.errors import UserError

EMBEDDED = "embedded"
"""Name of the source model, target tokenizer, corpus or questions that the package contains
(`tokalign_jax/demo`)."""

SELF = "self"
"""Name, as (a part of) the corpus, of text that the source model writes itself."""

EXTEND = "extend"
"""As the target tokenizer: the source model's with added tokens (`ExtendConfig`)."""

PRUNE = "prune"
"""As the target tokenizer: the source model's without tokens that the corpus does not need
(`PruneConfig`)."""

DERIVED = (EXTEND, PRUNE)
"""Target tokenizers that a run derives from the source's, in a stage of the same name."""

AFTER_PREVIOUS = "after_previous"
"""A start offset: the sequence after the last one of the previous training stage."""

AUTO = "auto"
"""A per-device batch, remat policy or loss chunk that is chosen by the available memory
(`planning.resolve`)."""


def within(low: float, high: float, default: Any, effect: bool = True) -> Any:
    """Declare a numeric field with bounds.

    Args:
      effect: whether it changes results by more than rounding; if not, no fingerprint includes it.
    """
    return field(default=default, metadata={"within": (low, high), "effect": effect})


def added(default: Any) -> Any:
    """Declare a field that no fingerprint includes at its default.

    Results of versions without the field remain valid.
    """
    return field(default=default, metadata={"added": True})


class Bookkeeping:
    """Base class of groups of settings that do not affect results."""


@dataclass(frozen=True)
class TextConfig:
    """Reading, de-duplication and split of documents."""

    text_field: str = "text"
    """Field (column) with the text of a document."""
    self_tokens: int = within(1000, 10**12, 4_000_000)
    """Tokens that the source model generates for `self` in the corpus, prompts included."""
    messages_field: str = "messages"
    """Field with the messages of a chat (objects with `role` and `content`). A record with this
    field is a chat: it is formatted by the chat template, and the loss is taken on the assistant's
    turns alone."""
    language_field: str = ""
    """Field with the language or domain of a document, for results by language. Empty: all
    documents are one group, `all`."""
    group_by: Literal["language", "source"] = "language"
    """Groups of results: the language field, or the entry of `corpus` that a document is from."""
    hub_config: str = ""
    """Config name of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset, or of a folder that `datasets` saved several splits in."""
    budget_bytes: int = within(1, 10**15, 5_000_000_000)
    """Maximum UTF-8 bytes of text, held-out documents included; of a larger corpus, each file is
    read in proportion to its size."""
    max_broken_share: float = within(0, 1, 0.001)
    """Maximum share of broken records (lines of JSON, rows, plain-text documents): not JSON, not
    UTF-8, without the text field, or with no string in it. They are skipped and counted; 10 more
    than this share are tolerated in any corpus, beyond that they are an error. 0: none is
    tolerated."""
    held_out_fraction: float = within(0, 0.5, 0.005)
    """Share of documents, chosen by their SHA-256, that are held out from alignment and training
    for evaluation."""


@dataclass(frozen=True)
class ExtendConfig:
    """Tokens mined from the corpus, added to the source tokenizer (target tokenizer `extend`)."""

    new_tokens: int = within(1, 10**7, 8000)
    """Maximum number of tokens to add; fewer if no more tokens have `min_count`."""
    min_count: int = within(1, 10**12, 10)
    """Minimum count of a new token in the text that is read."""
    budget_bytes: int = within(1, 10**15, 50_000_000)
    """UTF-8 bytes of training documents that are read for it, drawn at random from all of them;
    they are held in memory."""


@dataclass(frozen=True)
class PruneConfig:
    """Tokens removed from the source tokenizer (target tokenizer `prune`)."""

    min_count: int = within(1, 10**12, 1)
    """Tokens with a lower count in the text are removed; 1: those that do not occur in it."""
    most_tokens: int = within(0, 10**7, 0)
    """Maximum number of tokens to keep, the most frequent ones. Bytes, special tokens and the
    tokens of the chat template are always kept; 0: no limit."""
    budget_bytes: int = within(1, 10**15, 1_000_000_000)
    """UTF-8 bytes of training documents that are read for it, drawn at random from all of them;
    they are held in memory."""


@dataclass(frozen=True)
class GloveConfig:
    """GloVe (Pennington et al. 2014), for `alignment.vectors=glove` and method `tokalign`."""

    iterations: int = within(1, 10**5, 15)
    """Passes over the co-occurrences."""
    learning_rate: float = within(0, 10, 0.05)
    """Learning rate of AdaGrad."""
    x_max: float = within(1e-3, 1e12, 10.0)
    """Count at and above which co-occurrences have full weight."""
    alpha: float = within(0, 10, 0.75)
    """Exponent of the weighting below `x_max`."""


@dataclass(frozen=True)
class AlignmentConfig:
    """Token vectors, and the method that maps target tokens to source tokens."""

    method: Literal[
        "distilled",
        "composed",
        "tokalign",
        "lexicon",
        "topk",
        "focus",
        "omp",
        "token_distillation",
        "pieces",
        "exact",
        "random",
    ] = "distilled"
    """`distilled` (mean of the pieces, then distilled from the source model on text that it writes
    itself and on the corpus, see `InitializationConfig`), `composed` (mean of the pieces, corrected
    by co-occurrence and frequency, by a regression on the source model's hidden states, and by a
    linear map tuned on text; fits the corpus better and retains less, see `InitializationConfig`),
    `tokalign` (exactly as published), `lexicon` (one source token each, by a self-learned
    orthogonal map), `topk` (weighted mixtures of several source tokens), `focus` (FOCUS: mixtures
    of shared tokens, by cosines of target token vectors), `omp` (orthogonal matching pursuit over
    shared tokens in a donor model, as in mergekit-tokensurgeon), `token_distillation` (Token
    Distillation: the mean of the pieces, then input rows fitted to the source's hidden states, see
    `TokenDistillationConfig`); and the baselines `pieces` (FVT: mean of the pieces), `exact`
    (shared tokens, else random source tokens), `random`."""
    vectors: Literal["ppmi", "glove"] = "ppmi"
    """Token vectors: a truncated factorisation of positive pointwise mutual information with the
    shared tokens, or GloVe of each side by itself. Method `tokalign` always uses GloVe."""
    source_vectors: str = ""
    """File of source token vectors to use instead of computing them: an `.npz` with `ids` [n] and
    `vectors` [n, d], or GloVe's text format with token ids as words. Needs `target_vectors`."""
    target_vectors: str = ""
    """File of target token vectors; method `focus` needs only these."""
    top_k: int = within(1, 10**6, 8)
    """Method `topk`: source tokens per mixture."""
    donor: str = ""
    """Method `omp`: a model with the target tokenizer, a folder or a hub name."""
    atoms: int = within(1, 10**6, 64)
    """Method `omp`: shared tokens per combination."""
    file: str = ""
    """File of a finished alignment to use instead of computing one: `align_matrix.json`
    ({"target_id": source_id}) or `alignment.npz`."""
    window: int = within(1, 20, 15)
    """Co-occurrence window, tokens to either side; a pair at distance d counts 1/d. Beyond 20, the
    integers that represent these weights exactly would overflow."""
    min_count: int = within(1, 10**12, 5)
    """Minimum count of a token that gets a vector."""
    vector_size: int = within(1, 10**5, 300)
    """Dimensions of the token vectors."""
    glove: GloveConfig = field(default_factory=GloveConfig)
    pivots: int = within(1, 10**8, 300)
    """Method `tokalign`: number of shared tokens in relative representations; other methods use all
    of them."""
    neighbours: int = within(1, 10**6, 10)
    """Neighbours for the hubness correction (CSLS)."""
    similarity_threshold: float = within(0, 1, 0.3)
    """Methods `composed` and `topk`: calibrated similarity (0: chance level, 1: the same token)
    below which a target token falls back to the pieces of its text."""


@dataclass(frozen=True)
class TokenDistillationConfig:
    """Method `token_distillation` (Dobler et al. 2025); the defaults are the paper's."""

    snippets: int = within(1, 10**6, 25)
    """Maximum snippets of text per new token."""
    snippet_length: int = within(2, 2**20, 50)
    """Source tokens per snippet."""
    most_snippets: int = within(1, 10**9, 4_000_000)
    """Maximum snippets of all new tokens together; every token gets one before any gets a second.
    """
    tokens: int = within(1, 10**15, 100_000_000)
    """Maximum source tokens of the corpus to search for snippets."""
    layers: int = within(0, 10**4, 0)
    """Number of layers after which hidden states are compared (with the final norm); 0: all."""
    learning_rate: float = within(0, 10, 1e-4)
    """Peak learning rate of Adam, which rises over the first half of the steps and falls to 0 over
    the rest."""
    batch_size: int = within(1, 2**20, 16)
    """Snippets per training step."""


@dataclass(frozen=True)
class InitializationConfig:
    """Initialisation of the new vocabulary's rows.

    Method `distilled` trains the initialised model with the source model as teacher; method
    `composed` fits rows to the source model's hidden states and tunes them.
    """

    rows_multiple_of: int = within(1, 2**20, 1)
    """Embedding and head are padded to a multiple of this many rows (64 or 128 suits tensor cores
    of serving engines); rows without a token are the mean of all others."""
    distillation_tokens: int = within(0, 10**15, 5_200_000)
    """Method `distilled`: maximum target tokens of the distillation, and at most 104 per token of
    the target vocabulary; 0: none, rows are the mean of the pieces."""
    generated_tokens: int = within(0, 10**15, 1_800_000)
    """Method `distilled`: maximum tokens that the source model writes for it, and at most 40 per
    token of its vocabulary; 0: none, it is trained on the corpus alone."""
    corpus_share: float = within(0, 1, 0.35)
    """Method `distilled`: share of the text that is from the corpus; the rest is the source model's
    own. Lists of words that are split differently are read beside both. A higher share fits the
    corpus better and retains less of the source model."""
    trains: Literal["all", "lora", "rows"] = "all"
    """Method `distilled`: train the whole model (`all`), rows and low-rank adapters on the body's
    projections that are merged at the end (`lora`, rank 64: less memory), or the new rows alone
    (`rows`: least memory). `rows` retains less: words that are split differently into shared tokens
    can only be learned by the body."""
    tokens: int = within(0, 10**15, 20_000_000)
    """Method `composed`: source tokens of the corpus that the source model reads; 0: rows are the
    alignment's mixtures."""
    learned: float = within(0, 1, 0.5)
    """Method `composed`: weight of the predicted row in a composed row; the rest is the alignment's
    mixture."""
    calibration: float = within(0, 1, 0.5)
    """Method `composed`: calibration of head rows to the tokens' frequencies in the text; 0: none,
    1: full."""
    tuning: int = within(0, 10**15, 4_000_000)
    """Method `composed`: target tokens of the corpus on which the rows are tuned by a linear map
    that they share; 0: no tuning."""
    token_distillation: TokenDistillationConfig = field(default_factory=TokenDistillationConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on every projection: y = x W + (alpha / rank) dropout(x) A B."""

    rank: int = within(1, 2**16, 64)
    """Inner dimension of A and B."""
    alpha: float = within(0, 1e6, 16.0)
    """Scale: the product A B is multiplied by alpha / rank."""
    dropout: float = within(0, 0.999, 0.1)
    """Dropout rate of the adapters' inputs."""
    frozen: Literal["dtype", "int8", "nf4"] = added("dtype")
    """Type in which training holds the frozen projections: `compute.dtype`, or 8 or 4 bits with a
    scale for every 64 weights (docs/running.md). Adapters are always merged into the
    original weights, so no export or evaluation is quantized."""


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the loss terms of the objectives `distillation` and `mixture`."""

    next_token: float = within(0, 1e6, 1.0)
    """Next-token loss; `mixture` alone."""
    likelihood: float = within(0, 1e6, 0.5)
    """Binary divergence between both models' likelihoods of the text between shared boundaries."""
    states: float = within(0, 1e6, 2.0)
    """Squared distance between both models' final hidden states at shared boundaries, divided by
    their variance."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping; the learning rates are fields of the stage."""

    weight_decay: float = within(0, 10, 0.01)
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    beta1: float = within(0, 0.99999, 0.9)
    """Decay of the first moment."""
    beta2: float = within(0, 0.99999, 0.95)
    """Decay of the second moment."""
    epsilon: float = within(1e-15, 1, 1e-8)
    """Added to the root of the second moment."""
    row_damping: float = within(0, 1e3, 0.3)
    """Embedding and head only: adds `row_damping * sqrt(mean(v))` to Adam's denominator, so that
    rows of rare tokens, which have few gradients, move less (docs/results/recipe.md); 0: AdamW."""
    clip_norm: float = within(1e-12, 1e12, 1.0)
    """Global norm to which gradients are clipped."""
    moment_dtype: Literal["float32", "bfloat16"] = added("float32")
    """Type of the first moments of embedding and head. `bfloat16` takes 2 bytes per parameter
    instead of 4 and is rounded stochastically, so that the moments are right in expectation."""
    row_second_moment: bool = added(False)
    """One second moment for each row of embedding and head, the running mean of its squared
    gradients, instead of one for each parameter; the loss falls more slowly (docs/running.md)."""
    body_moment_dtype: Literal["float32", "bfloat16"] = added("float32")
    """Type of the first moments of all other trainable parameters, as `moment_dtype`."""
    body_row_second_moment: bool = added(False)
    """One second moment for each output of a projection (or of its adapters' factors), instead of
    one for each weight; norms and biases keep one for each parameter."""
    accumulate_in_place: bool = field(default=False, metadata={"effect": False})
    """Add gradients of embedding and head to their float32 sum over micro-batches in place, without
    an array of a micro-batch's own; next-token loss only. Results differ by rounding. Where a mesh
    splits the rows (`fsdp`, `tensor`), the head's gradient alone."""


@dataclass(frozen=True)
class CheckpointConfig(Bookkeeping):
    """Checkpoints of a training stage."""

    every: int = within(1, 10**9, 250)
    """Steps between checkpoints: the most that a killed run loses."""
    keep: int = within(1, 10**6, 2)
    """Number of newest checkpoints to keep."""


@dataclass(frozen=True)
class BatchConfig:
    """Sequences of a training step."""

    size: int = within(1, 2**24, 1024)
    """Sequences per step over all devices; results do not depend on the number of devices."""
    sequence_length: int = within(1, 2**24, 2048)
    """Tokens per sequence."""
    per_device: int | str = within(1, 2**24, AUTO, effect=False)
    """Maximum sequences per device and micro-batch; gradients are accumulated over as many
    micro-batches as the batch needs. `auto`: as many as fit in memory and make a step faster
    (`planning.resolve`)."""


@dataclass(frozen=True)
class StageConfig:
    """A training stage."""

    method: Literal["embedding", "lora", "full"] = "embedding"
    """Trainable parameters: `embedding` (input embedding and head), `lora` (those, and adapters on
    every projection), `full` (all)."""
    objective: Literal["next_token", "distillation", "mixture"] = "next_token"
    """Loss of Stages 1 and 2: `next_token`; `distillation` from the source model, which reads the
    same text with its own tokenizer (`training/source_teacher.py`); or a `mixture` of both."""
    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    steps: int = within(0, 10**9, 2500)
    """Optimizer steps; 0 skips the stage."""
    learning_rate: float = within(0, 10, 6.4e-4)
    """Peak learning rate; with `lora`, that of the adapters."""
    embedding_learning_rate: float | None = within(0, 10, None)
    """Peak learning rate of embedding and head in `lora` and `full` stages; None: `learning_rate`.
    """
    warmup_fraction: float = within(0, 1, 0.03)
    """Share of the steps with linear warm-up from 0; a cosine decays the rate to 0 afterwards."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    start_offset: int | float | str = AFTER_PREVIOUS
    """First sequence to read in the shuffled stream: a number of sequences (int), a fraction of one
    pass over the corpus (float below 1), or `after_previous`. After a stage with another length of
    sequences, the number of tokens that it read is rounded up to whole sequences; each length has
    its own order, so some text may be read again."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = within(1, 10**9, 10, effect=False)
    """Steps between log lines (the metrics file has every step)."""
    max_skipped_in_a_row: int = within(1, 10**9, 5, effect=False)
    """Number of consecutive non-finite steps that stop the run."""
    profile_steps: tuple[int, ...] = within(1, 10**9, (), effect=False)
    """First and last step, such as (20, 22), of which a JAX trace is written to
    `WORKDIR/STAGE/profile`; empty: none."""
    validation_every: int = within(0, 10**9, 0, effect=False)
    """Steps between measurements of the next-token loss on held-out text (the last step is measured
    too); 0: never. The checkpoint with the lowest loss is kept."""
    validation_sequences: int = within(1, 2**20, 64, effect=False)
    """Maximum held-out sequences of `batch.sequence_length` tokens per validation."""
    result: Literal["last", "best"] = field(default="last", metadata={"effect": False})
    """Checkpoint that later stages, evaluation and export use: the `last`, or the `best` by
    validation loss. No effect on the training itself."""

    def with_batch(self, **fields: Any) -> Self:
        """Return a copy with fields of `batch` replaced."""
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, **fields))


@dataclass(frozen=True)
class DistillationConfig(StageConfig):
    """A training stage with a teacher that has the target tokenizer.

    The student learns the teacher's distribution over the tokens at each position
    (`training/distillation.py`).
    """

    teacher: str = ""
    """Local folder or hub name (`name@revision` pins one) of a model with the tokens of the target
    tokenizer; empty: no such stage."""
    divergence: Literal["forward", "reverse", "mixed"] = "forward"
    """`forward`: KL(teacher || student), which covers the teacher's whole distribution; `reverse`:
    KL(student || teacher), which seeks its modes; `mixed`: both."""
    mixture: float = within(0, 1, 0.5)
    """Weight of the reverse divergence if `divergence` is `mixed`."""
    temperature: float = within(1e-3, 1e3, 1.0)
    """Divisor of both models' logits; above 1, less likely tokens have more weight."""
    weight: float = within(0, 1, 1.0)
    """Weight of the divergence in the loss; the rest is the next-token loss. 0: the teacher is not
    run."""


@dataclass(frozen=True)
class DataConfig:
    """The stream of training sequences."""

    epochs: int = within(0, 10**6, 0)
    """Passes over the corpus in the stream, each in another order; a start offset past its end is
    an error. 0: as many as the steps need; an offset must lie within the first pass."""


@dataclass(frozen=True)
class ComputeConfig:
    """Precision and memory."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and frozen weights; trainable weights have float32 masters. With
    `float32`, matrix products are in full float32 on every device, not in the faster
    TensorFloat-32 or bfloat16 passes that GPUs and TPUs use by default."""
    remat: Literal["auto", "dots", "attention", "layer"] = "auto"
    """Rematerialisation: what a layer saves for its backward pass. `dots`: results of all matrix
    products; `attention`: those around attention; `layer`: its input alone; `auto`: the most that
    fits in memory."""
    loss_chunk: int | str = within(1, 2**24, AUTO)
    """Tokens whose logits exist at once in the cross-entropy. `auto`: 4,096 where that fits in
    memory, fewer in training stages where that allows more sequences at once or less
    recomputation (`planning.resolve`)."""
    unroll: int = within(0, 10**4, 0)
    """Layers per iteration of the compiled loop over layers: more are faster on GPUs, but take
    longer to compile. 0: on GPUs all of them up to 48, and of deeper models groups of equal size
    with at most 48, which the log says; 1 elsewhere and if `remat` is `layer`, where more do not
    help."""
    matmul: Literal["dtype", "float8"] = added("dtype")
    """How training stages compute the projections of the layers: in `dtype`, or with operands in
    float8 (docs/running.md): e4m3 in the forward product, e5m2 for the output gradients, with one
    scale for each operand of each product. Adapters, embedding, head, loss, norms, attention and
    experts stay as they are, as does everything outside of training stages."""


def products_of(compute: ComputeConfig) -> dict[str, Any]:
    """Return the settings of `compute` that the result of a training stage depends on."""
    matmul = {} if compute.matmul == "dtype" else {"matmul": compute.matmul}
    return {"dtype": compute.dtype, **matmul}


LOSS_CHUNK = 4096
"""`ComputeConfig.loss_chunk` where `auto` is not resolved by memory."""


def loss_chunk_of(compute: ComputeConfig) -> int:
    """Return the tokens whose logits exist at once."""
    return LOSS_CHUNK if isinstance(compute.loss_chunk, str) else compute.loss_chunk


def remat_of(compute: ComputeConfig) -> Literal["dots", "attention", "layer"]:
    """Return the rematerialisation policy: `dots` where `auto` is not resolved by memory."""
    return "dots" if compute.remat == "auto" else compute.remat


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, whose product is the number of devices; 0: chosen so that it fits."""

    data: int = within(0, 10**6, 0)
    """Data-parallel replicas of the parameters; the batch is split over them."""
    fsdp: int = within(0, 10**6, 0)
    """Parts of parameters and optimizer state; the batch is split over them, too."""
    tensor: int = within(0, 10**6, 0)
    """Tensor-parallel parts of matrices, heads and vocabulary, for the same sequences; at most the
    devices of a process. 0: 1."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements on held-out documents."""

    bytes_per_language: int = within(1, 10**12, 200_000)
    """UTF-8 bytes of held-out text per language: whole documents, of which the last is cut. They
    are the first ones, or drawn by their hash if the text comes from several files."""
    sequence_length: int = within(1, 2**24, 1024)
    """Tokens per window; longer documents are split into several windows."""
    batch: int = within(1, 2**20, 8)
    """Windows per device at once."""
    random_baseline: bool = True
    """Also measure the model with random rows for the new vocabulary."""
    prompts: tuple[str, ...] = ()
    """Texts that the source and the adapted model continue greedily; empty: passages of held-out
    documents."""
    sample_tokens: int = within(1, 10**6, 48)
    """Tokens per continuation."""
    abilities: str = ""
    """Multiple-choice questions for every state: a file of JSON lines, a folder of such files or a
    glob (several separated by commas), or `embedded`; a suite of sums is added. Empty: none."""
    max_questions: int = within(0, 10**9, 0)
    """Number of questions per suite, the first ones; 0: all."""
    chat_questions: str = ""
    """Questions for the source and the adapted model, asked through their chat templates and
    answered greedily: a file of JSON lines with `question` and `answers`, each of which is right.
    Empty: none."""
    reply_tokens: int = within(1, 10**6, 64)
    """Maximum tokens of a reply to a chat question."""
    other_text: str | tuple[str, ...] = ""
    """Out-of-domain text, in the same formats and with the same fields as the corpus; it is
    evaluated, never trained on. Empty: none."""


@dataclass(frozen=True)
class ExportConfig:
    """Hugging Face folder of the adapted model."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Type of the exported weights; `source`: each weight has the type of the source's."""
    adapters: Literal["merged", "apart"] = "merged"
    """LoRA adapters: `merged` into the weights, or `apart` in a PEFT folder `adapter` inside the
    export, whose weights are then the base weights of the adapters, with the new rows."""
    push_to_hub: str = ""
    """Hub repository (`owner/name`) to upload the folder to; a new one is private. Empty: none."""


@dataclass(frozen=True)
class Config:
    """Config of a run."""

    source_model: str = EMBEDDED
    """Local folder or hub name (`name@revision` pins one) of the source model, or `embedded`."""
    target_tokenizer: str = EMBEDDED
    """Local folder or hub name of the target tokenizer, or `embedded`; `extend`: the source's with
    added tokens, whose rows alone are initialised; `prune`: the source's without tokens that the
    corpus does not need, with unchanged rows (a folder of that name is `./extend`)."""
    end_of_text: str = ""
    """Token of the target tokenizer that separates documents; added if it is missing. Empty: chosen
    among its special tokens, `<|endoftext|>` and the like before end-of-turn tokens."""
    chat: Literal["target", "source"] = "target"
    """Chat template and special tokens of the new model: `target`: the target tokenizer's (the
    source's template if it has none but all special tokens of the source's); `source`: the
    source's, with special tokens that the target lacks added with the source's rows."""
    corpus: str | tuple[str, ...] = EMBEDDED
    """Local files (path or glob, several separated by commas), a hub dataset, `embedded`, or
    `self`: text that the source model writes (`text.self_tokens`; a folder of that name is
    `./self`). Several entries may have weights, their shares of the bytes: `/data/a=0.7,self=0.3`,
    or in Python {"/data/a": 0.7, "self": 0.3}; without weights they are mixed by size."""
    seed: int = within(0, 2**32 - 1, 0)
    """Seed of all random choices."""
    text: TextConfig = field(default_factory=TextConfig)
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    initialization: InitializationConfig = field(default_factory=InitializationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(method="embedding", start_offset=0)
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(method="full", learning_rate=5e-5)
    )
    stage3: DistillationConfig = field(
        default_factory=lambda: DistillationConfig(method="full", learning_rate=5e-5)
    )
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


TRAINING = ("stage1", "stage2", "stage3")
"""Names of the training stages, in order."""


def training_stages(config: Config) -> dict[str, StageConfig]:
    """Return the training stages that a run has: those with steps, and a teacher for Stage 3."""
    stages = {name: getattr(config, name) for name in TRAINING}
    return {
        name: stage
        for name, stage in stages.items()
        if stage.steps and getattr(stage, "teacher", True)
    }


def reads_source(config: Config) -> bool:
    """Return whether rows are fitted to the source model's hidden states (method `composed`)."""
    return (
        config.alignment.method == "composed"
        and not config.alignment.file
        and config.initialization.tokens > 0
    )


TRAINED_FOR_EACH, WRITTEN_FOR_EACH = 104, 40
"""Upper bounds of `distillation_tokens` and `generated_tokens` per token of a vocabulary."""


def distillation_budget(config: Config, source_size: int, target_size: int) -> tuple[int, int]:
    """Return the maximum tokens of the initial distillation: generated and trained on.

    Args:
      source_size, target_size: sizes of the vocabularies.
    """
    settings = config.initialization
    generated = min(settings.generated_tokens, WRITTEN_FOR_EACH * source_size)
    return generated, min(settings.distillation_tokens, TRAINED_FOR_EACH * target_size)


def distills(config: Config) -> bool:
    """Return whether the initialised model is distilled from the source model."""
    settings = config.initialization
    return (
        config.alignment.method == "distilled"
        and not config.alignment.file
        and settings.distillation_tokens > 0
    )


def distills_tokens(config: Config) -> bool:
    """Return whether input rows are learned by Token Distillation."""
    return config.alignment.method == "token_distillation" and not config.alignment.file


def teacher_of(stage: StageConfig) -> str:
    """Return the name of Stage 3's teacher; "" if none is run."""
    return stage.teacher if isinstance(stage, DistillationConfig) and stage.weight else ""


def learns_from_source(stage: StageConfig) -> bool:
    """Return whether the source model is the teacher of a stage."""
    return stage.objective != "next_token"


def settings_of(stage: StageConfig) -> dict[str, Any]:
    """Return the settings of a stage that its result depends on.

    Fields without effect are left out, as are weights of terms that its objective does not have.
    """
    settings = _with_effect(stage)
    # Flat, as before they were a group, so that existing workdirs remain valid.
    batch = settings.pop("batch")
    settings |= {"batch_size": batch["size"], "sequence_length": batch["sequence_length"]}
    if stage.objective == "next_token":
        del settings["objective"], settings["weights"]
    elif stage.objective == "distillation":
        del settings["weights"]["next_token"]
    return settings


def selection_of(stage: StageConfig) -> dict[str, int]:
    """Return the settings that decide which checkpoint of a stage is its result.

    They are part of the fingerprints of what reads the result, not of the stage itself. Empty for
    the last checkpoint.
    """
    if stage.result == "last":
        return {}
    return {"every": stage.validation_every, "sequences": stage.validation_sequences}


def _with_effect(group: Any) -> dict[str, Any]:
    settings = {}
    for declared in dataclasses.fields(group):
        value = getattr(group, declared.name)
        if dataclasses.is_dataclass(value):
            if not isinstance(value, Bookkeeping):
                settings[declared.name] = _with_effect(value)
        elif declared.metadata.get("effect", True) and not _is_added_default(declared, value):
            settings[declared.name] = value
    return settings


def _is_added_default(declared: dataclasses.Field, value: Any) -> bool:
    return declared.metadata.get("added", False) and value == declared.default


def _check_objective(stage: StageConfig, prefix: str) -> None:
    name = prefix.removesuffix(".")
    if not learns_from_source(stage):
        return
    if isinstance(stage, DistillationConfig):
        raise UserError(
            f"config key '{prefix}objective' is {stage.objective!r}, but the teacher of {name} is "
            f"{prefix}teacher: leave {prefix}objective out, or set it for stage1 or stage2"
        )
    if not stage.weights.likelihood and not stage.weights.states:
        raise UserError(
            f"{prefix}objective={stage.objective} has nothing to learn from the source model: set "
            f"{prefix}weights.likelihood or {prefix}weights.states above 0, or "
            f"{prefix}objective=next_token"
        )


RENAMED: Mapping[type, Mapping[str, str]] = {
    AlignmentConfig: {
        "iterations": "glove.iterations",
        "glove_learning_rate": "glove.learning_rate",
        "x_max": "glove.x_max",
        "weight_power": "glove.alpha",
    },
    StageConfig: {
        **{
            name: f"optimizer.{name}"
            for name in ("weight_decay", "beta1", "beta2", "epsilon", "row_damping", "clip_norm")
        },
        "batch_size": "batch.size",
        "sequence_length": "batch.sequence_length",
        "per_device_batch": "batch.per_device",
        "checkpoint_every": "checkpoints.every",
        "keep_checkpoints": "checkpoints.keep",
    },
}
"""By group: keys of the previous version, and their new names."""

REMOVED: Mapping[type, Mapping[str, Any]] = {
    AlignmentConfig: {"bleu_lines": 1000},
    ExportConfig: {"max_shard_bytes": 5_000_000_000},
}
"""By group: keys of the previous version that became constants, with the values of these. They stay
in the fingerprints of stages, so that workdirs of that version remain valid."""


def new_name(key: str) -> str:
    """Return the current name of a dotted config key, with a warning if it was renamed."""
    *groups, last = key.split(".")
    kind = _group_type(groups)
    new = _renamed(kind).get(last) if kind else None
    if new is None:
        return key
    renamed = ".".join([*groups, new])
    _warn(
        f"config key '{key}' is now '{renamed}': use the new name, since the next version will not "
        "accept the old one"
    )
    return renamed


def is_removed(key: str) -> bool:
    """Return whether a dotted config key became a constant, with a warning if it did."""
    *groups, last = key.split(".")
    kind = _group_type(groups)
    if kind is None or last not in REMOVED.get(kind, {}):
        return False
    value = REMOVED[kind][last]
    _warn(
        f"config key '{key}' has no effect: it is always {value}; remove it, since it will be an "
        "error in the next version"
    )
    return True


def _group_type(groups: Sequence[str]) -> type | None:
    """Return the dataclass of a group of fields, by its path of names; None if there is none."""
    kind: type = Config
    for group in groups:
        hint = typing.get_type_hints(kind).get(group)
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            return None
        kind = hint
    return kind


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=3)


def _renamed(kind: type) -> dict[str, str]:
    return {old: new for base in kind.__mro__ for old, new in RENAMED.get(base, {}).items()}


def rename_keys(values: Any, kind: type = Config, prefix: str = "") -> Any:
    """Move values from keys of the previous version to the current ones, in place.

    Args:
      values: a dict or ConfigDict of any depth.

    Returns:
      The same object.
    """
    if not hasattr(values, "items"):
        return values
    for old in REMOVED.get(kind, {}):
        if old in values and is_removed(f"{prefix}{old}"):
            del values[old]
    for old, new in _renamed(kind).items():
        if old in values:
            group, name = new.split(".")
            new_name(f"{prefix}{old}")
            if group not in values:
                values[group] = {}
            values[group][name] = values[old]
            del values[old]
    for declared in dataclasses.fields(kind):
        if declared.name in values and declared.default_factory is not dataclasses.MISSING:
            group = type(declared.default_factory())
            rename_keys(values[declared.name], group, f"{prefix}{declared.name}.")
    return values


def config_from_dict(values: Any, kind: type = Config, prefix: str = "") -> Any:
    """Build a config dataclass from a dict or ConfigDict of any depth.

    Keys of the previous version are accepted with a warning.

    Args:
      kind: the dataclass.
      prefix: of the keys in messages.

    Raises:
      UserError: an unknown key, for which the most similar one is named, or a value of another
        type or out of bounds.
    """
    return _build(rename_keys(_copy(values), kind, prefix), kind, prefix)


def _copy(values: Any) -> Any:
    if isinstance(values, Mapping) or hasattr(values, "items"):
        return {key: _copy(value) for key, value in values.items()}
    return values


def _build(values: Any, kind: type, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise UserError(
                f"unknown config key '{prefix}{key}': there is no such field; the nearest is "
                f"'{prefix}{near[0]}' (all: {', '.join(fields)})"
            )
        arguments[key] = _checked(value, hints[key], f"{prefix}{key}")
    # Fields of a group that are not set have the defaults of its parent (stage1's and stage2's
    # differ).
    defaults: dict[str, Any] = {
        n: f.default_factory()
        for n, f in fields.items()
        if f.default_factory is not dataclasses.MISSING
    }
    for key, default in defaults.items():
        if key in arguments:
            group = arguments[key]
            changes = {name: getattr(group, name) for name in values[key]}
            arguments[key] = dataclasses.replace(default, **changes)
    config = kind(**arguments)
    _check_range(config, prefix)
    if isinstance(config, StageConfig):
        _check_objective(config, prefix)
        if config.result == "best" and not config.validation_every:
            raise UserError(
                f"config key '{prefix}result' is 'best', but nothing is validated: set "
                f"{prefix}validation_every above 0, or {prefix}result=last"
            )
    return config


def default_config() -> Any:
    """Return a ConfigDict of all defaults for config files, overridable on the command line."""
    values = ConfigDict(config_to_dict(Config()))
    for key in _SEVERAL_TYPES:
        # A placeholder of type `object` allows a number on the command line for a default that is a
        # string.
        *groups, name = key.split(".")
        holder: Any = values
        for group in groups:
            holder = holder[group]
        value = holder[name]
        del holder[name]
        holder[name] = placeholder(object)
        holder[name] = value
    return values


_SEVERAL_TYPES = (
    "corpus",
    "evaluation.other_text",
    "compute.loss_chunk",
    *(
        f"{stage}.{name}"
        for stage in TRAINING
        for name in ("start_offset", "embedding_learning_rate", "batch.per_device")
    ),
)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def _checked(value: Any, hint: Any, name: str) -> Any:
    """Check the type of a value; convert integers to floats and lists to tuples as hinted."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise UserError(
                f"config key '{name}' is a group of fields, not the single value {value!r}: set "
                f"its fields, such as {name}.{dataclasses.fields(hint)[0].name}"
            )
        return _build(value, typing.cast(type, hint), f"{name}.")
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise UserError(
                f"config key '{name}' is {value!r}; it must be one of {list(typing.get_args(hint))}"
            )
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = {typing.get_origin(o) or o for o in options}
    if isinstance(value, Mapping) and tuple in kinds:
        value = tuple(f"{part}={weight}" for part, weight in value.items())
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, bool) and bool not in kinds:
        raise UserError(f"config key '{name}' is {value!r}; it must be {_type_name(hint)}")
    if isinstance(value, int) and int not in kinds and float in kinds:
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, tuple(kinds)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise UserError(
            f"config key '{name}' is {value!r} of type {type(value).__name__}; it must be "
            f"{_type_name(hint)}" + (", and finite" if isinstance(value, float) else "")
        )
    if isinstance(value, tuple):
        _check_elements(value, options, name)
    return value


def _check_elements(value: tuple[Any, ...], options: Sequence[Any], name: str) -> None:
    (kind,) = {typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple}
    if any(not isinstance(element, kind) or isinstance(element, bool) for element in value):
        what = {str: "a string", int: "a whole number"}[kind]
        raise UserError(f"config key '{name}' is {value!r}; each of its elements must be {what}")


def _check_range(config: Any, prefix: str) -> None:
    for declared in dataclasses.fields(config):
        low, high = declared.metadata.get("within", (-math.inf, math.inf))
        value = getattr(config, declared.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(n, int | float) and not low <= n <= high for n in numbers):
            raise UserError(
                f"config key '{prefix}{declared.name}' is {value}; it must be at least {low} and "
                f"at most {high}"
            )
    for name, what in (("per_device", "sequences"), ("loss_chunk", "tokens")):
        if isinstance(number := getattr(config, name, 1), str) and number != AUTO:
            raise UserError(
                f"config key '{prefix}{name}' is {number!r}; it must be a number of {what} or "
                f"'{AUTO}'"
            )
    steps = getattr(config, "profile_steps", ())
    if steps and not (len(steps) == 2 and steps[0] <= steps[1]):
        raise UserError(
            f"config key '{prefix}profile_steps' is {steps}; it must be the first and the last "
            f"step to trace, such as (20, 22), or () for none"
        )
    if not _is_offset(offset := getattr(config, "start_offset", 0)):
        raise UserError(
            f"config key '{prefix}start_offset' is {offset!r}; it must be a number of sequences "
            "(without a decimal point), a fraction of one pass (at least 0.0 and below 1.0) or "
            f"'{AFTER_PREVIOUS}'"
        )


def _is_offset(value: float | str) -> bool:
    if isinstance(value, str):
        return value == AFTER_PREVIOUS
    return 0 <= value < (1 if isinstance(value, float) else 10**15)


def _type_name(hint: Any) -> str:
    return str(hint) if isinstance(hint, types.UnionType) else getattr(hint, "__name__", str(hint))
