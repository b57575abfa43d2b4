"""How good a model drafts for a teacher with the same vocabulary, in speculative decoding
(Leviathan et al. 2023, arXiv 2211.17192).

The draft proposes `gamma` tokens, the teacher reads them all in one call, keeps those up to the
first that it rejects and adds one of its own. Which are kept follows from what both models say at
each position, so no such decoding need be run:

- greedy: a token is kept where the draft's most likely token is the teacher's. The teacher
  continues prompts by its own greedy choice; the draft reads the continuations; blocks of drafts
  are then counted out exactly (`calls`).
- sampled, at a temperature: a drafted token is kept with probability sum_v min(p(v), q(v)) (their
  corollary 3.6), p the teacher's and q the draft's distribution. Its mean over the positions of
  held-out text is their alpha, from which the tokens a call follow for positions that are
  independent (their equation 1).

Letters: B batch, T length, D model, V tokens of the vocabulary, R rows of a head (V and its
padding), C tokens of a chunk. Logits of both models exist for C tokens at once, never [B, T, V].
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

from tokalign_jax.evaluation.bits_per_byte import cut, first_context
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical
from tokalign_jax.text.canonical import plain_backend, vocabulary_size
from tokalign_jax.text.tokenizing import opening_id
from tokalign_jax.utils import compiling
from tokalign_jax.utils.progress import Log, Progress

CHUNK = 1024
"""C"""


class Model(NamedTuple):
    """What is run."""

    config: ModelConfig
    params: dict


class Agreement(NamedTuple):
    """What draft and teacher say of the next token, at each position."""

    shared: Float[Array, "B T"]
    """sum_v min(p(v), q(v))"""
    draft: Int[Array, "B T"]
    """The draft's most likely token."""
    teacher: Int[Array, "B T"]


def difference_of_vocabularies(
    draft: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str:
    """Why two tokenizers cannot draft for each other, with the tokens each has and the first that
    differ; empty where they are the same.
    """
    differing = {i: (own, its) for i, own, its in canonical.differing(draft, teacher)}
    differing |= {i: (own, its) for i, its, own in canonical.differing(teacher, draft)}
    if not differing:
        return ""
    first = min(differing)
    one, other = (repr(token) if token else "none" for token in differing[first])
    return (
        f"the draft's vocabulary has {len(draft.get_vocab()):,} tokens and the teacher's"
        f" {len(teacher.get_vocab()):,}; {len(differing):,} ids differ, the first is {first}: {one}"
        f" in the draft's, {other} in the teacher's"
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
    """The acceptance by language.

    Args:
      tokenizer: of both.
      gamma: tokens of a draft.
      temperature: of both when they sample.
      prompts: how many windows of `length` tokens a language gives, spread evenly over its text.
      steps: tokens of each greedy continuation.

    Returns: For JSON, by language, None where the text has no window of `length` tokens: `prompts`,
      `greedy` with the `rate` of agreement and the `tokens_per_call`, `sampled` with `rate` and
      `tokens_per_call`, and `agreement` of the most likely tokens on the text itself.
    """
    start, each, backend = (
        first_context(tokenizer),
        opening_id(tokenizer) is not None,
        plain_backend(tokenizer),
    )
    mesh = mesh or sharding.make_mesh()
    vocabulary = vocabulary_size(tokenizer)
    progress = Progress(log, what, len(texts), "languages")
    found: dict[str, dict[str, Any] | None] = {}
    for language, documents in texts.items():
        encoded = (
            e.ids for e in backend.encode_batch_fast(list(documents), add_special_tokens=False)
        )
        windows = [
            inputs
            for ids in encoded
            for inputs, _ in cut(ids, start, length, each)
            if len(inputs) == length
        ]
        found[language] = None
        if windows:
            places = np.linspace(0, len(windows) - 1, prompts).round().astype(int)
            ids = jnp.asarray([windows[i] for i in np.unique(places)], jnp.int32)
            agree = functools.partial(
                _agreement, draft, teacher, vocabulary, temperature, dtype, mesh
            )
            found[language] = _of_language(agree, teacher, ids, gamma, steps, dtype)
        progress.update()
    progress.done()
    return found


def _of_language(
    agree: Any, teacher: Model, ids: Int[Array, "B T"], gamma: int, steps: int, dtype: str
) -> dict[str, Any]:
    text = jax.tree.map(np.asarray, agree(ids))
    whole = transformer.generate(teacher.config, teacher.params, ids, steps, jnp.dtype(dtype))
    continuation = np.asarray(whole)[:, ids.shape[1] :]
    kept = np.asarray(agree(whole[:, :-1]).draft)[:, ids.shape[1] - 1 :] == continuation
    rate = float(text.shared.mean())
    return {
        "prompts": len(ids),
        "greedy": {"rate": float(kept.mean()), "tokens_per_call": kept.size / calls(kept, gamma)},
        "sampled": {"rate": rate, "tokens_per_call": tokens_per_call(rate, gamma)},
        "agreement": float((text.draft == text.teacher).mean()),
    }


def calls(kept: Bool[np.ndarray, "B T"], gamma: int) -> int:
    """Teacher calls that it takes to write B continuations of T tokens, in each of which `gamma`
    tokens are drafted.

    Args:
      kept: whether the draft, after what came before, proposes the token that the teacher chooses.
    """
    total = 0
    for row in kept:
        position = 0
        while position < len(row):
            block = row[position : position + gamma]
            accepted = len(block) if block.all() else int(block.argmin())
            position += accepted + 1  # the teacher's own token behind them
            total += 1
    return total


def tokens_per_call(rate: float, gamma: int) -> float:
    """Expected tokens a teacher call, where each draft is kept with probability `rate` whatever the
    others (Leviathan, equation 1).
    """
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
    """`agreement` of both models reading `ids`, a batch that is filled up so that it divides among
    the devices.
    """
    filling = -len(ids) % sharding.sequences_at_once(mesh)
    padded = np.pad(np.asarray(ids), ((0, filling), (0, 0)))
    inputs = sharding.put(padded, NamedSharding(mesh, P(sharding.BATCH)))
    found = _read(
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
    return jax.tree.map(lambda x: x[: len(ids)], found)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8))
def _read(
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
    """What both models say, from (states [B, T, D], head [R, D], adjustment of logits) of each.

    Args:
      vocabulary: V; rows past it get no probability.
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
            every = adjust(
                jnp.einsum("cd,vd->cv", states, head, preferred_element_type=jnp.float32)
            )
        return jnp.where(jnp.arange(len(head)) < vocabulary, every, -jnp.inf)[
            :, : _rows(draft, teacher)
        ]

    def one_chunk(states: tuple[Array, Array]) -> Agreement:
        q, p = (logits(of, side) for of, side in zip(states, (draft, teacher)))
        shared = jnp.minimum(jax.nn.softmax(q / temperature), jax.nn.softmax(p / temperature)).sum(
            -1
        )
        return Agreement(shared, q.argmax(-1), p.argmax(-1))

    found = jax.lax.map(one_chunk, (chunks(hidden), chunks(teacher_hidden)))
    return jax.tree.map(lambda x: x.reshape(-1)[: batch * length].reshape(batch, length), found)


def _rows(draft: tuple, teacher: tuple) -> int:
    """Rows that both heads have: the vocabulary and perhaps padding."""
    return min(len(draft[1]), len(teacher[1]))
