"""The whole configuration as frozen dataclasses, one per stage; every field is documented where it
is declared.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict` with the same names. It is
turned into `Config` once, here, and from then on nothing looks anything up by string. A file states
what makes up its recipe; the rest is as below.
"""

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections.config_dict import ConfigDict, placeholder

from tokalign_jax.errors import UserError

EMBEDDED = "embedded"
"""Names the source model, target tokenizer or corpus that ships inside the package
(`tokalign_jax/demo`)."""

SELF = "self"
"""Names, as (a part of) the corpus, text that the source model writes itself."""

EXTEND = "extend"
"""As the target tokenizer: the source model's own, with more tokens (`ExtendConfig`)."""

PRUNE = "prune"
"""As the target tokenizer: the source model's own, without tokens that the corpus does not need
(`PruneConfig`)."""

DERIVED = (EXTEND, PRUNE)
"""Target tokenizers that a run makes from the source's, in a stage of that name."""

AFTER_PREVIOUS = "after_previous"
"""A start offset: the sequence after the last one that the previous training stage read."""

AUTO = "auto"
"""A number of sequences a device holds at once, or what layers keep: chosen by what fits
(`planning.resolve`)."""


def within(low: float, high: float, default: Any, effect: bool = True) -> Any:
    """Declare a field of numbers from `low` to `high`; past these, what a user meant is something
    else.

    Args:
      effect: whether the result depends on it by more than rounding; else it is in no fingerprint.
    """
    return field(default=default, metadata={"within": (low, high), "effect": effect})


class Bookkeeping:
    """Base of groups of settings on which no result depends."""


@dataclass(frozen=True)
class TextConfig:
    """How documents are read, de-duplicated and split."""

    text_field: str = "text"
    """Field (column) that holds a document's text."""
    self_tokens: int = within(1000, 10**12, 4_000_000)
    """Tokens that the source model writes where the corpus names `self`, prompts included."""
    messages_field: str = "messages"
    """Field that holds the messages of a chat (objects with `role` and `content`); a record that
    has it is a chat, written by the chat template and learned on the assistant's turns alone."""
    language_field: str = ""
    """Field that holds a document's language or domain, for results by language. Empty: all
    documents are one group, `all`."""
    group_by: Literal["language", "source"] = "language"
    """What results are told apart by: the language field, or which of several names in `corpus` a
    document is from."""
    hub_config: str = ""
    """Config name when `corpus` is a hub dataset."""
    hub_split: str = "train"
    """Split when `corpus` is a hub dataset, or a folder that the library datasets saved several in.
    """
    budget_bytes: int = within(1, 10**15, 5_000_000_000)
    """UTF-8 bytes of text to keep, held-out documents included; where there is more, each file is
    read in proportion to its size."""
    max_broken_share: float = within(0, 1, 0.001)
    """Share of records (lines of JSON, rows, documents of plain text) that may be broken: not JSON,
    not UTF-8, without the text field, or with something else than text in it. They are skipped and
    counted, 10 beside that share in any corpus; more of them are an error.
    0: none may be."""
    held_out_fraction: float = within(0, 0.5, 0.005)
    """Share of documents, chosen by their SHA-256, that nothing is aligned or trained on; results
    are measured on them."""


@dataclass(frozen=True)
class ExtendConfig:
    """Tokens that the source model's tokenizer gets, where the target tokenizer is `extend`; they
    are mined from the corpus.
    """

    new_tokens: int = within(1, 10**7, 8000)
    """Tokens to add; fewer come where the text has no more that are frequent enough."""
    min_count: int = within(1, 10**12, 10)
    """The fewest times that a new token must stand in the text that is read for it."""
    budget_bytes: int = within(1, 10**15, 50_000_000)
    """UTF-8 bytes of training documents that are read for it, drawn at random from all of them;
    they are held in memory."""


@dataclass(frozen=True)
class PruneConfig:
    """Tokens that go from the source model's tokenizer, where the target tokenizer is `prune`."""

    min_count: int = within(1, 10**12, 1)
    """Tokens go that the text has fewer times; 1: those that it never has."""
    most_tokens: int = within(0, 10**7, 0)
    """Tokens that stay, at most: the most frequent, beside bytes, special tokens and what the chat
    template is written with, which always stay; 0: no limit."""
    budget_bytes: int = within(1, 10**15, 1_000_000_000)
    """UTF-8 bytes of training documents that are read for it, drawn at random from all of them;
    they are held in memory."""


@dataclass(frozen=True)
class GloveConfig:
    """GloVe (Pennington et al. 2014), where `alignment.vectors` is `glove` or the method is
    `tokalign`.
    """

    iterations: int = within(1, 10**5, 15)
    """Passes over the co-occurrences."""
    learning_rate: float = within(0, 10, 0.05)
    """AdaGrad's rate."""
    x_max: float = within(1e-3, 1e12, 10.0)
    """Co-occurrences from this count on have full weight."""
    alpha: float = within(0, 10, 0.75)
    """Exponent of the weighting below `x_max`."""


@dataclass(frozen=True)
class AlignmentConfig:
    """Token vectors and how target tokens are made of source tokens."""

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
    """`distilled` (mean of the pieces, then trained on text of the source model's own and of the
    corpus to keep what the source knows, see `InitializationConfig`), `composed` (fits the corpus
    better and
    keeps less: pieces of the text, corrected by co-occurrence and frequency, by what the source
    model's own tokens teach, and by a rule tuned on text, see `InitializationConfig`), `tokalign`
    (exactly as published), `lexicon` (one source token each, by a self-learned orthogonal map),
    `topk` (weighted mixtures of several source tokens), `focus` (FOCUS: mixtures of shared tokens,
    by cosines of target token vectors), `omp` (combinations of shared tokens found in a donor
    model, as mergekit-tokensurgeon's), `token_distillation` (Token
    Distillation: the mean of the pieces, then input rows that give the source's hidden states, see
    `TokenDistillationConfig`); and the baselines `pieces` (FVT: mean of the pieces),
    `exact` (else random source tokens), `random`."""
    vectors: Literal["ppmi", "glove"] = "ppmi"
    """Token vectors: a truncated factorisation of positive pointwise mutual information with the
    tokens that both sides share, or GloVe of each side by itself. Method `tokalign` is GloVe's
    always."""
    source_vectors: str = ""
    """Vectors of the source tokens to use instead of computing them: an `.npz` of `ids` [n] and
    `vectors` [n, d], or GloVe's text format with token ids for words. Given together with
    `target_vectors`, which alone do for method `focus`."""
    target_vectors: str = ""
    """The same for the target tokens."""
    top_k: int = within(1, 10**6, 8)
    """Source tokens in a mixture of method `topk`."""
    donor: str = ""
    """Method `omp`: a model that has the target tokenizer, a folder or a hub name."""
    atoms: int = within(1, 10**6, 64)
    """Method `omp`: shared tokens in a combination."""
    file: str = ""
    """A finished alignment to use instead of computing one: `align_matrix.json` ({"target_id":
    source_id}) or `alignment.npz`."""
    window: int = within(1, 20, 15)
    """Co-occurrence window, tokens to either side; a pair at distance d counts 1/d. Past 20, the
    exact integers that these weights are counted in overflow."""
    min_count: int = within(1, 10**12, 5)
    """Tokens seen fewer times get no vector."""
    vector_size: int = within(1, 10**5, 300)
    """Dimensions of the token vectors."""
    glove: GloveConfig = field(default_factory=GloveConfig)
    pivots: int = within(1, 10**8, 300)
    """Shared tokens to which method `tokalign` compares every vector (relative representation);
    others take all of them."""
    neighbours: int = within(1, 10**6, 10)
    """Neighbours for the hubness correction (CSLS)."""
    similarity_threshold: float = within(0, 1, 0.3)
    """Methods `composed` and `topk`: calibrated similarity (0: what chance gives, 1: the same)
    under which a target token falls back to the pieces of its text."""
    bleu_lines: int = within(1, 10**9, 1000)
    """Held-out lines for BLEU-1 of the mapped target ids against the source ids."""


@dataclass(frozen=True)
class TokenDistillationConfig:
    """Method `token_distillation` (Dobler et al. 2025); the defaults are the paper's."""

    snippets: int = within(1, 10**6, 25)
    """Snippets of text around each new token, at most."""
    snippet_length: int = within(2, 2**20, 50)
    """Source tokens of a snippet."""
    most_snippets: int = within(1, 10**9, 4_000_000)
    """Snippets of all new tokens together, at most; every token keeps its first before any keeps a
    second. A training step reads `batch_size` of them."""
    tokens: int = within(1, 10**15, 100_000_000)
    """Source tokens of the corpus that are searched for snippets, at most."""
    layers: int = within(0, 10**4, 0)
    """Layers after which hidden states are compared (with the final norm); 0: all."""
    learning_rate: float = within(0, 10, 1e-4)
    """Adam's peak rate: it rises over the first half of the steps and falls to 0 over the rest."""
    batch_size: int = within(1, 2**20, 16)
    """Snippets of a step."""


@dataclass(frozen=True)
class InitializationConfig:
    """Rows of the new vocabulary. Method `distilled` trains the start with the source model as its
    teacher; method `composed` learns rows from the source model's states and tunes them.
    """

    rows_multiple_of: int = within(1, 2**20, 1)
    """Embedding and head get a number of rows that is a multiple of this (64 or 128 suits tensor
    cores of serving engines); rows without a token are the mean of all others."""
    distillation_tokens: int = within(0, 10**15, 4_000_000)
    """Method `distilled`: the most target tokens on which the start is trained to keep what the
    source model knows, and at most 80 for each token of the target vocabulary; 0: the mean of the
    pieces."""
    generated_tokens: int = within(0, 10**15, 1_800_000)
    """Method `distilled`: the most tokens that the source model writes for it, and at most 40 for
    each token of its vocabulary; 0: it reads the corpus alone."""
    corpus_share: float = within(0, 1, 0.35)
    """Method `distilled`: share of the training sequences that are of the corpus, the others being
    the source model's own text. More fits the corpus better, less keeps more of what the model
    knew."""
    trains: Literal["all", "rows"] = "all"
    """Method `distilled`: the whole model, or the new rows alone, which needs less memory and keeps
    less: words of shared tokens that are split differently can only be learned by the body."""
    tokens: int = within(0, 10**15, 20_000_000)
    """Method `composed`: source tokens of the corpus that the source model reads; 0: rows stay the
    alignment's mixtures."""
    learned: float = within(0, 1, 0.5)
    """Share of a composed row that is learned; the rest is the alignment's mixture."""
    calibration: float = within(0, 1, 0.5)
    """How far head rows go towards giving every token its frequency in the text: 0 not at all, 1
    all the way."""
    tuning: int = within(0, 10**15, 4_000_000)
    """Target tokens of the corpus on which rows are then moved together, by a rule that all of them
    share; 0: they are not."""
    token_distillation: TokenDistillationConfig = field(default_factory=TokenDistillationConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on every projection: y = x W + (alpha / rank) dropout(x) A B."""

    rank: int = within(1, 2**16, 64)
    """Inner dimension of A and B."""
    alpha: float = within(0, 1e6, 16.0)
    """Scale: the product A B counts alpha / rank times."""
    dropout: float = within(0, 0.999, 0.1)
    """Share of the adapters' inputs that are zeroed at each training step."""


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the loss terms where a stage's objective is `distillation` or `mixture`."""

    next_token: float = within(0, 1e6, 1.0)
    """Next-token loss; of `mixture` alone."""
    likelihood: float = within(0, 1e6, 0.5)
    """Binary divergence between both models' likelihoods of the text between shared boundaries."""
    states: float = within(0, 1e6, 2.0)
    """Squared distance between both models' final states at shared boundaries, over their variance.
    """


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what is done to its gradients; the learning rates are the stage's own."""

    weight_decay: float = within(0, 10, 0.01)
    """AdamW's decoupled decay, on matrices only (not on norms and biases)."""
    beta1: float = within(0, 0.99999, 0.9)
    """AdamW's decay of the mean gradient."""
    beta2: float = within(0, 0.99999, 0.95)
    """AdamW's decay of the mean squared gradient."""
    epsilon: float = within(1e-15, 1, 1e-8)
    """AdamW's, beside the root of the second moment."""
    row_damping: float = within(0, 1e3, 0.3)
    """Embedding and head only: adds `row_damping * sqrt(mean(v))` to Adam's denominator, so that
    rows of rare tokens, whose few gradients say little, move by less (docs/results/recipe.md); 0:
    AdamW."""
    clip_norm: float = within(1e-12, 1e12, 1.0)
    """Global norm to which the gradient of everything that trains is clipped."""


@dataclass(frozen=True)
class CheckpointConfig(Bookkeeping):
    """When a stage saves what it has trained."""

    every: int = within(1, 10**9, 250)
    """Steps between checkpoints; a killed run loses at most this many."""
    keep: int = within(1, 10**6, 2)
    """Newest checkpoints kept."""


@dataclass(frozen=True)
class StageConfig:
    """One training stage."""

    method: Literal["embedding", "lora", "full"] = "embedding"
    """What trains: `embedding` (input embedding and head only), `lora` (those and adapters on every
    projection), `full`."""
    objective: Literal["next_token", "distillation", "mixture"] = "next_token"
    """Loss of Stages 1 and 2: `next_token`; `distillation`, with the source model as the teacher
    that reads the same text with its own tokenizer (`training/source_teacher.py`); `mixture` of
    both."""
    weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    steps: int = within(0, 10**9, 2500)
    """Optimizer steps; 0 skips the stage."""
    learning_rate: float = within(0, 10, 6.4e-4)
    """Peak rate of what the stage trains; with `lora`, of the adapters."""
    embedding_learning_rate: float | None = within(0, 10, None)
    """Peak rate of embedding and head in `lora` and `full` stages; None: the same as
    `learning_rate`."""
    warmup_fraction: float = within(0, 1, 0.03)
    """Share of the steps over which the rate rises from 0; a cosine then takes it down to 0."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = within(1, 2**24, 1024)
    """Sequences a step, over all devices: neither the rate nor the order of the data depends on how
    many there are."""
    per_device_batch: int | str = within(1, 2**24, AUTO, effect=False)
    """Sequences that a device holds at once, at most; gradients of a step's batch are summed over
    as many rounds as that takes. `auto`: as many as fit in its memory and are faster together
    (`planning.resolve`)."""
    sequence_length: int = within(1, 2**24, 2048)
    """Tokens a sequence."""
    start_offset: int | float | str = AFTER_PREVIOUS
    """First sequence to read in the shuffled stream: a number of sequences (int), a fraction of one
    pass over the corpus (float below 1), or `after_previous`. After a stage of another
    `sequence_length`, the tokens that it read carry over, rounded up to a whole sequence; each
    length has an order of its own, so some text may be met again."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = within(1, 10**9, 10, effect=False)
    """Steps between lines on the terminal (the metrics file has every step)."""
    max_skipped_in_a_row: int = within(1, 10**9, 5, effect=False)
    """Non-finite steps in a row that stop the run."""
    profile_steps: tuple[int, ...] = within(1, 10**9, (), effect=False)
    """First and last step, such as (20, 22), of which a JAX trace is written to
    `WORKDIR/STAGE/profile`; empty: none."""
    validation_every: int = within(0, 10**9, 0, effect=False)
    """Steps between measurements of the next-token loss on held-out text (the last step is measured
    too); 0: never. The checkpoint with the lowest loss is kept."""
    validation_sequences: int = within(1, 2**20, 64, effect=False)
    """Held-out sequences of `sequence_length` tokens that a validation reads, at most."""
    result: Literal["last", "best"] = field(default="last", metadata={"effect": False})
    """Checkpoint from which later stages, evaluation and export go on: the `last`, or the `best`
    by validation loss. No effect on the training itself."""


@dataclass(frozen=True)
class DistillationConfig(StageConfig):
    """A training stage in which a stronger model with the target tokenizer teaches: at each
    position the student learns its distribution over the tokens (`training/distillation.py`).
    """

    teacher: str = ""
    """Local folder or hub name (`name@revision` pins one) of a model whose tokenizer has the same
    tokens as the target tokenizer; empty: no such stage."""
    divergence: Literal["forward", "reverse", "mixed"] = "forward"
    """KL(teacher || student), which covers all that the teacher says; KL(student || teacher), which
    keeps to what it says most; or both."""
    mixture: float = within(0, 1, 0.5)
    """Share of the reverse divergence where they are `mixed`."""
    temperature: float = within(1e-3, 1e3, 1.0)
    """By which the logits of both are divided; above 1 the less likely tokens have more of a say.
    """
    weight: float = within(0, 1, 1.0)
    """Share of the divergence in the loss; the rest is the loss of the next token. 0: the teacher
    is not run."""


@dataclass(frozen=True)
class DataConfig:
    """The stream of training sequences."""

    epochs: int = within(0, 10**6, 0)
    """Passes over the corpus that the stream holds, each in another order; a start offset past its
    end is an error.
    0: as many as the steps need, while an offset must lie within the first pass."""


@dataclass(frozen=True)
class ComputeConfig:
    """Precision and memory."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and of weights that do not train; what trains has float32 masters. With
    `float32`, products are float32 ones on every device; GPUs and TPUs would take TensorFloat-32 or
    bfloat16 passes for them, which are faster."""
    remat: Literal["auto", "dots", "attention", "layer"] = "auto"
    """What a layer keeps for its backward pass: `dots` (results of all matrix products),
    `attention` (those around attention), `layer` (its input alone; all else is computed again);
    `auto`: the most that fits in the memory of the devices."""
    loss_chunk: int = within(1, 2**24, 4096)
    """Tokens whose logits exist at once in the cross-entropy."""
    unroll: int = within(0, 10**4, 0)
    """Layers in one turn of the compiled loop over them: more are faster on GPUs, and take longer
    to compile. 0: all of up to 32 on GPUs, unless `remat` is `layer`, where that gains nothing;
    else 1."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along three axes; their product is the number of devices. 0: chosen, so that a model
    fits.
    """

    data: int = within(0, 10**6, 0)
    """Copies of the parameters; the batch is split over them."""
    fsdp: int = within(0, 10**6, 0)
    """Parts that parameters and optimizer state are split in; the batch is split over them too."""
    tensor: int = within(0, 10**6, 0)
    """Parts that each layer's matrices, heads and the vocabulary are split in, for the same
    sequences; at most the devices of one process. 0: 1."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out documents."""

    bytes_per_language: int = within(1, 10**12, 200_000)
    """UTF-8 bytes of held-out text per language, whole documents, the last one cut."""
    sequence_length: int = within(1, 2**24, 1024)
    """Tokens of a window; a document longer than one is cut into several."""
    batch: int = within(1, 2**20, 8)
    """Windows per device at once."""
    random_baseline: bool = True
    """Also measure the model with every row of the new vocabulary drawn at random."""
    prompts: tuple[str, ...] = ()
    """Texts that the source and the adapted model continue, greedily; empty: passages of held-out
    documents."""
    sample_tokens: int = within(1, 10**6, 48)
    """Tokens of each continuation."""
    abilities: str = ""
    """Multiple-choice questions that every state answers: a file of JSON lines, a folder with such
    files or a glob (several separated by commas), or `embedded`; a suite of sums is added. Empty:
    none."""
    max_questions: int = within(0, 10**9, 0)
    """Questions of each suite, the first ones; 0: all."""
    chat_questions: str = ""
    """Questions that the source and the adapted model are asked through their chat templates and
    answer greedily: a file of JSON lines with `question` and `answers` (any of which is right).
    Empty: none."""
    reply_tokens: int = within(1, 10**6, 64)
    """Tokens of a reply to a chat question, at most."""
    other_text: str | tuple[str, ...] = ""
    """Text of another kind than the corpus, in the same forms and with the same fields: measured,
    never trained on. Empty: none."""


@dataclass(frozen=True)
class ExportConfig:
    """The Hugging Face folder."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Type of the written weights; `source`: each weight keeps the type it had."""
    adapters: Literal["merged", "apart"] = "merged"
    """Where adapters of LoRA go: into the weights, or (`apart`) into a PEFT folder `adapter` inside
    the export, whose own weights are then what the adapters were trained on, with the new rows."""
    max_shard_bytes: int = within(1_000_000, 10**15, 5_000_000_000)
    """Size past which the weights are split over several files."""
    push_to_hub: str = ""
    """Hub repository (`owner/name`) that the folder is uploaded to when it is whole, made private
    if it is new; empty: none."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    source_model: str = EMBEDDED
    """Local folder or hub name (`name@revision` pins one) of the model that gets a new vocabulary,
    or `embedded`."""
    target_tokenizer: str = EMBEDDED
    """Local folder or hub name of the tokenizer it gets, or `embedded`; `extend`: its own with
    further tokens, whose rows alone are made anew; `prune`: its own without tokens that the corpus
    does not need, all rows as they were (a folder of that name is `./extend`)."""
    end_of_text: str = ""
    """Token that separates documents in the target tokenizer, added if it has none such; empty:
    chosen among its special tokens, `<|endoftext|>` and its like before the end of a chat's turn.
    """
    chat: Literal["target", "source"] = "target"
    """Chat template and special tokens of the new model: the target tokenizer's (the source's where
    it has none but all special tokens of the source's), or the `source`'s, added where the target
    lacks them, with the source's rows."""
    corpus: str | tuple[str, ...] = EMBEDDED
    """Local files (path or glob, several separated by commas), a hub dataset, `embedded`, or
    `self`: text that the source model writes (`text.self_tokens`; a folder of that name is
    `./self`). Several
    may have weights, the shares of the text in bytes: `/data/a=0.7,self=0.3`, or in Python
    {"/data/a": 0.7, "self": 0.3}; without weights they count by their size."""
    seed: int = within(0, 2**32 - 1, 0)
    """The root of every random choice."""
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
    """Return the training stages of a run in order: those with steps, the third with a teacher."""
    found = {name: getattr(config, name) for name in TRAINING}
    return {
        name: stage
        for name, stage in found.items()
        if stage.steps and getattr(stage, "teacher", True)
    }


def reads_source(config: Config) -> bool:
    """Whether the source model reads text for the rows of the start: method `composed` alone has
    any that it can teach.
    """
    return (
        config.alignment.method == "composed"
        and not config.alignment.file
        and config.initialization.tokens > 0
    )


TRAINED_FOR_EACH, WRITTEN_FOR_EACH = 80, 40
"""Bounds of `distillation_tokens` and `generated_tokens` for each token of a vocabulary."""


def distillation_budget(config: Config, source_size: int, target_size: int) -> tuple[int, int]:
    """(tokens that the source model writes, target tokens that the start is trained on), at most.

    Args:
      source_size, target_size: tokens of either vocabulary.
    """
    settings = config.initialization
    written = min(settings.generated_tokens, WRITTEN_FOR_EACH * source_size)
    return written, min(settings.distillation_tokens, TRAINED_FOR_EACH * target_size)


def distills(config: Config) -> bool:
    """Whether the start is trained with the source model as its teacher."""
    settings = config.initialization
    return (
        config.alignment.method == "distilled"
        and not config.alignment.file
        and settings.distillation_tokens > 0
    )


def distills_tokens(config: Config) -> bool:
    """Whether input rows are learned by Token Distillation."""
    return config.alignment.method == "token_distillation" and not config.alignment.file


def teacher_of(stage: StageConfig) -> str:
    """The model that teaches in Stage 3; "" where none is run."""
    return stage.teacher if isinstance(stage, DistillationConfig) and stage.weight else ""


def learns_from_source(stage: StageConfig) -> bool:
    """Whether the source model is the teacher of a stage."""
    return stage.objective != "next_token"


def settings_of(stage: StageConfig) -> dict[str, Any]:
    """Return the settings of a stage that its result may depend on.

    Left out are those without effect, and weights of terms that its objective does not have.
    """
    settings = _with_effect(stage)
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
    found = {}
    for declared in dataclasses.fields(group):
        value = getattr(group, declared.name)
        if dataclasses.is_dataclass(value):
            if not isinstance(value, Bookkeeping):
                found[declared.name] = _with_effect(value)
        elif declared.metadata.get("effect", True):
            found[declared.name] = value
    return found


def _check_objective(stage: StageConfig, prefix: str) -> None:
    name = prefix.removesuffix(".")
    if not learns_from_source(stage):
        return
    if isinstance(stage, DistillationConfig):
        raise UserError(
            f"config key '{prefix}objective' is {stage.objective!r}, but the teacher of {name} is "
            f"{prefix}teacher: leave {prefix}objective out, or use stage1 or stage2"
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
        "checkpoint_every": "checkpoints.every",
        "keep_checkpoints": "checkpoints.keep",
    },
}
"""By group: keys of the version before, and what they are called now."""


def new_name(key: str) -> str:
    """Return what a dotted config key is called now, with a warning where that is another name."""
    *groups, last = key.split(".")
    kind: type = Config
    for group in groups:
        hint = typing.get_type_hints(kind).get(group)
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            return key
        kind = hint
    now = _renamed(kind).get(last)
    if now is None:
        return key
    renamed = ".".join([*groups, now])
    warnings.warn(
        f"config key '{key}' is now '{renamed}'; the old name will go with the next version",
        FutureWarning,
        stacklevel=2,
    )
    return renamed


def _renamed(kind: type) -> dict[str, str]:
    return {old: new for base in kind.__mro__ for old, new in RENAMED.get(base, {}).items()}


def rename_keys(values: Any, kind: type = Config, prefix: str = "") -> Any:
    """Move what stands under keys of the version before to where it belongs now, in place; return
    `values`.

    Args:
      values: a dict or ConfigDict of any depth.
    """
    if not hasattr(values, "items"):
        return values
    for old, now in _renamed(kind).items():
        if old in values:
            group, name = now.split(".")
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
    """Build `kind` from a mapping (a dict or ConfigDict of any depth), field by field.

    Keys of the version before are taken too, with a warning.

    Raises:
      UserError: for a key that `kind` has not, naming the nearest one it has, or a value of another
        type.
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
    # A group that is only partly given keeps the defaults that its parent declares for it (stage1
    # and stage2 differ).
    defaults: dict[str, Any] = {
        n: f.default_factory()
        for n, f in fields.items()
        if f.default_factory is not dataclasses.MISSING
    }
    for key, default in defaults.items():
        if key in arguments:
            given = arguments[key]
            arguments[key] = dataclasses.replace(
                default, **{k: getattr(given, k) for k in values[key]}
            )
    made = kind(**arguments)
    _check_range(made, prefix)
    if isinstance(made, StageConfig):
        _check_objective(made, prefix)
        if made.result == "best" and not made.validation_every:
            raise UserError(
                f"config key '{prefix}result' is 'best', but nothing is validated: set "
                f"{prefix}validation_every above 0, or {prefix}result=last"
            )
    return made


def default_config() -> Any:
    """A ConfigDict of all defaults, for a config file to change; every field can then be overridden
    on the command line.
    """
    values = ConfigDict(config_to_dict(Config()))
    for group, name in _OF_SEVERAL_TYPES:
        # A placeholder of type `object` lets the command line give a number where the default is a
        # word.
        holder: Any = values[group] if group else values
        value = holder[name]
        del holder[name]
        holder[name] = placeholder(object)
        holder[name] = value
    return values


_OF_SEVERAL_TYPES = (
    ("", "corpus"),
    ("evaluation", "other_text"),
    *(
        (stage, name)
        for stage in TRAINING
        for name in ("start_offset", "embedding_learning_rate", "per_device_batch")
    ),
)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config dataclass, ready for JSON."""
    return dataclasses.asdict(config)


def _checked(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint` wants it; a whole number is welcome where a float is wanted, and a list
    where a tuple is.
    """
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise UserError(
                f"config key '{name}' is a group of fields, not the single value {value!r}"
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
        raise UserError(f"config key '{name}' is {value!r}; it must be of type {hint}")
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


def _check_range(made: Any, prefix: str) -> None:
    for declared in dataclasses.fields(made):
        low, high = declared.metadata.get("within", (-math.inf, math.inf))
        value = getattr(made, declared.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(n, int | float) and not low <= n <= high for n in numbers):
            raise UserError(
                f"config key '{prefix}{declared.name}' is {value}; it must be at least {low} and "
                f"at most {high}"
            )
    if isinstance(batch := getattr(made, "per_device_batch", 1), str) and batch != AUTO:
        raise UserError(
            f"config key '{prefix}per_device_batch' is {batch!r}; it must be a number of "
            f"sequences or '{AUTO}'"
        )
    steps = getattr(made, "profile_steps", ())
    if steps and not (len(steps) == 2 and steps[0] <= steps[1]):
        raise UserError(
            f"config key '{prefix}profile_steps' is {steps}; it must be the first and the last "
            f"step to trace, such as (20, 22), or () for none"
        )
    if not _is_offset(offset := getattr(made, "start_offset", 0)):
        raise UserError(
            f"config key '{prefix}start_offset' is {offset!r}; it must be a number of sequences "
            f"(without a decimal point), a "
            f"fraction of one pass (at least 0.0 and below 1.0) or '{AFTER_PREVIOUS}'"
        )


def _is_offset(value: float | str) -> bool:
    if isinstance(value, str):
        return value == AFTER_PREVIOUS
    return 0 <= value < (1 if isinstance(value, float) else 10**15)


def _type_name(hint: Any) -> str:
    return (
        getattr(hint, "__name__", str(hint)) if not isinstance(hint, types.UnionType) else str(hint)
    )
