"""Acceptance rate of a draft model in speculative decoding (Leviathan et al., arXiv 2211.17192).

Draft and teacher share a vocabulary. The draft proposes `gamma` tokens; the teacher scores them in
one call, accepts those before the first rejection and adds a token of its own. The number of
accepted tokens follows from both models' predictions at each position, so speculative decoding
itself is not run:

- greedy: a token is accepted if it is the most likely one of both models. The teacher continues
  prompts greedily, the draft reads the continuations, and blocks of drafts are counted exactly
  (`calls`).
- sampled, at a temperature: a token is accepted with probability sum_v min(p(v), q(v)) (their
  corollary 3.6), where p is the teacher's and q the draft's distribution. Its mean over positions
  of held-out text is their alpha, which gives the expected tokens per call for independent
  positions (their equation 1).

Dimensions: B batch, T length, D model, V vocabulary, R head rows (V and padding), C chunk. Logits
of both models are materialized for C tokens at once, never as [B, T, V].
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.bits_per_byte import first_context, split_windows
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical
from tokalign_jax.text.canonical import plain_backend, vocabulary_size
from tokalign_jax.text.tokenizing import opening_id
from tokalign_jax.utils import compiling
from tokalign_jax.utils.progress import Log, Progress

CHUNK = 1024
"""C, the number of tokens per chunk."""


class Model(NamedTuple):
    """A model's config and parameters."""

    config: ModelConfig
    params: dict


class Agreement(NamedTuple):
    """Predictions of draft and teacher for the next token at each position."""

    shared: Float[Array, "B T"]
    """sum_v min(p(v), q(v))"""
    draft: Int[Array, "B T"]
    """The draft's most likely token."""
    teacher: Int[Array, "B T"]
    """The teacher's most likely token."""


def vocabulary_difference(draft: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Describes how two vocabularies differ; returns "" if they are equal.

    Only models with equal vocabularies can draft for each other.
    """
    pairs = {i: (first, second) for i, first, second in canonical.differing(draft, teacher)}
    pairs |= {i: (first, second) for i, second, first in canonical.differing(teacher, draft)}
    if not pairs:
        return ""
    index = min(pairs)
    draft_token, teacher_token = (repr(token) if token else "none" for token in pairs[index])
    return (
        f"the draft's vocabulary has {len(draft.get_vocab()):,} tokens and the teacher's"
        f" {len(teacher.get_vocab()):,}; {len(pairs):,} ids differ, the first is {index}:"
        f" {draft_token} in the draft's, {teacher_token} in the teacher's"
    )


def acceptance(
    draft: Model,
    teacher: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    gamma: int = 4,
    temperature: float = 1.0,
    prompts: int = 8,
    length: int = 64,
    steps: int = 64,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    log: Log = lambda line: None,
    what: str = "drafting",
) -> dict[str, dict[str, Any] | None]:
    """Measures the acceptance rate by language.

    Args:
      draft: the draft model.
      teacher: the teacher model.
      tokenizer: the tokenizer of both.
      texts: held-out documents by language.
      gamma: number of tokens per draft.
      temperature: sampling temperature of both.
      prompts: number of windows of `length` tokens per language, spread evenly over its text.
      length: number of tokens per window.
      steps: number of tokens per greedy continuation.
      dtype: dtype of the activations.
      mesh: mesh of the devices to run on; None for all devices.
      log: writes progress lines.
      what: their label.

    Returns:
      By language, for JSON: `prompts`, `greedy` and `sampled`, each with the acceptance `rate` and
      `tokens_per_call`, and `agreement` of the most likely tokens on the text itself. None for
      languages without a window of `length` tokens.
    """
    mesh = mesh or sharding.make_mesh()
    vocabulary = vocabulary_size(tokenizer)
    progress = Progress(log, what, len(texts), "languages")
    results: dict[str, dict[str, Any] | None] = {}
    for language, documents in texts.items():
        windows = _windows(tokenizer, documents, length)
        results[language] = None
        if windows:
            indices = np.linspace(0, len(windows) - 1, prompts).round().astype(int)
            ids = jnp.asarray([windows[i] for i in np.unique(indices)], jnp.int32)
            agree = functools.partial(
                _agreement, draft, teacher, vocabulary, temperature, dtype, mesh
            )
            results[language] = _language_acceptance(agree, teacher, ids, gamma, steps, dtype)
        progress.update()
    progress.done()
    return results


def _windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int
) -> list[Sequence[int]]:
    """Returns the inputs of all full windows of `length` tokens."""
    start, backend = first_context(tokenizer), plain_backend(tokenizer)
    starts_every_window = opening_id(tokenizer) is not None
    encodings = backend.encode_batch_fast(list(documents), add_special_tokens=False)
    return [
        inputs
        for encoding in encodings
        for inputs, _ in split_windows(encoding.ids, start, length, starts_every_window)
        if len(inputs) == length
    ]


def _language_acceptance(
    agree: Any, teacher: Model, ids: Int[Array, "B T"], gamma: int, steps: int, dtype: str
) -> dict[str, Any]:
    text = jax.tree.map(np.asarray, agree(ids))
    extended = transformer.generate(teacher.config, teacher.params, ids, steps, jnp.dtype(dtype))
    continuation = np.asarray(extended)[:, ids.shape[1] :]
    drafts = np.asarray(agree(extended[:, :-1]).draft)[:, ids.shape[1] - 1 :]
    accepted = drafts == continuation
    rate = float(text.shared.mean())
    return {
        "prompts": len(ids),
        "greedy": {
            "rate": float(accepted.mean()),
            "tokens_per_call": accepted.size / calls(accepted, gamma),
        },
        "sampled": {"rate": rate, "tokens_per_call": tokens_per_call(rate, gamma)},
        "agreement": float((text.draft == text.teacher).mean()),
    }


def calls(is_accepted: Bool[np.ndarray, "B T"], gamma: int) -> int:
    """Counts the teacher calls that write B continuations of T tokens with drafts of `gamma`.

    Args:
      is_accepted: True where the draft's proposal, given the preceding tokens, is the teacher's
        choice.
      gamma: number of tokens per draft.
    """
    total = 0
    for row in is_accepted:
        position = 0
        while position < len(row):
            block = row[position : position + gamma]
            accepted = len(block) if block.all() else int(block.argmin())
            position += accepted + 1  # Plus the teacher's own token.
            total += 1
    return total


def tokens_per_call(rate: float, gamma: int) -> float:
    """Returns the expected tokens per teacher call at an acceptance `rate` (their equation 1)."""
    return float(sum(rate**i for i in range(gamma + 1)))


def _agreement(
    draft: Model,
    teacher: Model,
    vocabulary: int,
    temperature: float,
    dtype: str,
    mesh: Mesh,
    ids: Int[Array, "B T"],
) -> Agreement:
    """Computes `agreement` on `ids`, padded to a batch that is divisible by the devices."""
    padding = -len(ids) % sharding.sequences_at_once(mesh)
    padded = np.pad(np.asarray(ids), ((0, padding), (0, 0)))
    inputs = sharding.put(padded, NamedSharding(mesh, P(sharding.BATCH)))
    result = _read_both(
        draft.params,
        teacher.params,
        inputs,
        draft.config,
        teacher.config,
        vocabulary,
        temperature,
        dtype,
        mesh,
    )
    return jax.tree.map(lambda x: x[: len(ids)], result)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8))
def _read_both(
    draft: dict,
    teacher: dict,
    ids: Int[Array, "B T"],
    draft_config: ModelConfig,
    teacher_config: ModelConfig,
    vocabulary: int,
    temperature: float,
    dtype: str,
    mesh: Mesh,
) -> Agreement:
    with sharding.within(mesh):
        sides = []
        for config, params in ((draft_config, draft), (teacher_config, teacher)):
            hidden = transformer.forward(config, params, ids, dtype=jnp.dtype(dtype))
            head = transformer.head_matrix(params).astype(dtype)
            sides.append((hidden, head, functools.partial(transformer.adjust_logits, config)))
        return agreement(*sides, vocabulary=vocabulary, temperature=temperature)


def agreement(
    draft: tuple, teacher: tuple, *, vocabulary: int, temperature: float = 1.0
) -> Agreement:
    """Computes the agreement from each model's (states [B, T, D], head [R, D], logit adjustment).

    Args:
      draft: states, head and logit adjustment of the draft.
      teacher: the same of the teacher.
      vocabulary: V; rows past it get no probability.
      temperature: divides the logits.
    """
    (hidden, _, _), (teacher_hidden, _, _) = draft, teacher
    batch, length = hidden.shape[:2]
    chunk = min(CHUNK, batch * length)

    def chunks(states: Float[Array, "B T D"]) -> Float[Array, "N C D"]:
        flat = states.reshape(batch * length, -1)
        return jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, flat.shape[-1])

    def logits(states: Float[Array, "C D"], side: tuple) -> Float[Array, "C R"]:
        _, head, adjust = side
        with compiling.products(states.dtype):
            product = jnp.einsum("cd,vd->cv", states, head, preferred_element_type=jnp.float32)
            adjusted = adjust(product)
        masked = jnp.where(jnp.arange(len(head)) < vocabulary, adjusted, -jnp.inf)
        return masked[:, : _common_rows(draft, teacher)]

    def one_chunk(states: tuple[Array, Array]) -> Agreement:
        q, p = (logits(part, side) for part, side in zip(states, (draft, teacher)))
        overlap = jnp.minimum(jax.nn.softmax(q / temperature), jax.nn.softmax(p / temperature))
        return Agreement(overlap.sum(-1), q.argmax(-1), p.argmax(-1))

    result = jax.lax.map(one_chunk, (chunks(hidden), chunks(teacher_hidden)))
    return jax.tree.map(lambda x: x.reshape(-1)[: batch * length].reshape(batch, length), result)


def _common_rows(draft: tuple, teacher: tuple) -> int:
    """Returns the number of rows that both heads have: the vocabulary and possibly padding."""
    return min(len(draft[1]), len(teacher[1]))
