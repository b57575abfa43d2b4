"""Vocabulary pruning: the source tokenizer without the tokens that a corpus does not need.

Kept are tokens that are frequent enough in the text, special and added tokens, the tokens of the
chat template, and everything that they are built from. Text that uses none of the removed tokens is
thus split as before; any other text is spelled with the remaining tokens: it gets longer, and
decodes to the same bytes.

- BPE: each kept token keeps the merges that build it, and the tokens that these merges pass
  through. Other merges are removed.
- Bytes, or single characters in a vocabulary without bytes, are always kept.
- Tokens keep their order; new ids are 0, 1, 2, ...
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import Config
from tokalign_jax.errors import UserError
from tokalign_jax.text import corpus, mining
from tokalign_jax.text.canonical import plain_backend, space_mark, special_ids, vocabulary_size
from tokalign_jax.text.editing import edited
from tokalign_jax.utils.progress import Log, Progress

KEPT, SUMMARY = "kept.npy", "pruned.json"
BATCH = 256
"""Texts tokenized at once."""
MEASURED_BYTES = 2_000_000
"""Bytes of held-out text on which the cost of pruning is measured, at most."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pruned(NamedTuple):
    """A pruned tokenizer and its relation to the source tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    kept: Int[np.ndarray, "V_t"]
    """int64: the id of each token in the source tokenizer."""


def run(
    config: Config, corpus_folder: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, log: Log
) -> dict[str, Any]:
    """Prune `tokenizer` of tokens that training documents do not need; write it to `folder`.

    Args:
      config: `prune` has the settings.
      corpus_folder: the corpus artifact.
      tokenizer: the source tokenizer.
      folder: receives the tokenizer.
      log: receives progress and the result.

    Returns:
      The sizes of both vocabularies, the bytes that were read, and the tokens of held-out text with
      either.
    """
    settings = config.prune
    texts = mining.sample(corpus_folder, settings.budget_bytes, config.seed)
    counts = count(tokenizer, texts, log)
    pruned = prune(tokenizer, counts, settings.min_count, settings.most_tokens)
    held_out = _up_to(MEASURED_BYTES, (text.text for text in corpus.held_out(corpus_folder)))
    before, after = (int(count(t, held_out).sum()) for t in (tokenizer, pruned.tokenizer))
    sizes = vocabulary_size(tokenizer), len(pruned.kept)
    log(
        f"prune: {sizes[1]:,} of {sizes[0]:,} tokens are kept; held-out text takes {after:,} "
        f"tokens instead of {before:,} ({after / max(before, 1) - 1:+.2%})"
    )
    pruned.tokenizer.save_pretrained(str(folder))
    np.save(folder / KEPT, pruned.kept)
    summary = {
        "source_tokens": sizes[0],
        "tokens": sizes[1],
        "bytes": sum(len(text.encode()) for text in texts),
        "held_out": {
            "bytes": sum(len(text.encode()) for text in held_out),
            "source_tokens": before,
            "tokens": after,
        },
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def count(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], log: Log | None = None
) -> Int[np.ndarray, "V"]:
    """Count the occurrences of each token in the texts, int64."""
    backend, counts = plain_backend(tokenizer), np.zeros(vocabulary_size(tokenizer), np.int64)
    progress = Progress(log, "prune", sum(map(len, texts)), "characters") if log else None
    for batch in _groups(texts):
        for encoding in backend.encode_batch_fast(list(batch), add_special_tokens=False):
            counts += np.bincount(encoding.ids, minlength=len(counts))
        if progress:
            progress.update(sum(map(len, batch)))
    if progress:
        progress.done(f"{int(counts.sum()):,} tokens")
    return counts


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a vocabulary can be pruned.

    Raises:
      UserError: it is neither BPE without marks within words, nor Unigram.
    """
    model = plain_backend(tokenizer).model
    is_bpe = isinstance(model, tokenizers.models.BPE)
    marked = is_bpe and (model.continuing_subword_prefix or model.end_of_word_suffix)
    if marked or not (is_bpe or isinstance(model, tokenizers.models.Unigram)):
        kind = "BPE with marks within words" if marked else type(model).__name__
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' is of kind {kind}, which cannot be pruned: "
            "byte-level and SentencePiece BPE and Unigram can; give the model another vocabulary "
            "(target_tokenizer) instead"
        )


def prune(
    tokenizer: PreTrainedTokenizerBase,
    counts: Int[np.ndarray, "V"],
    min_count: int = 1,
    most_tokens: int = 0,
) -> Pruned:
    """Return `tokenizer` without its rare tokens.

    Args:
      tokenizer: the source tokenizer.
      counts: occurrences of each token in the text that the vocabulary is pruned for.
      min_count: tokens that occur less often are removed.
      most_tokens: number of tokens to keep, at most, the most frequent; 0 for no limit. Tokens that
        are always kept may be more.

    Raises:
      UserError: it is neither BPE without marks within words, nor Unigram.
    """
    check(tokenizer)
    state = json.loads(plain_backend(tokenizer).to_str())["model"]
    ids = _ids(state) | tokenizer.get_vocab()
    kept = _always(tokenizer, state, ids)
    built_from = _built_from(state)
    limit = most_tokens or len(ids)
    spelled = {index: token for token, index in ids.items()}
    for index in np.argsort(-counts, kind="stable").tolist():
        if counts[index] < min_count or len(kept) >= limit:
            break
        needed = ({ids[part] for part in built_from(spelled[index])} | {index}) - kept
        if len(kept) + len(needed) <= limit:
            kept |= needed
    order = np.array(sorted(kept), np.int64)
    new_ids = {spelled[old]: new for new, old in enumerate(order.tolist())}
    return Pruned(_with(tokenizer, new_ids), order)


# --- Kept tokens --------------------------------------------------------------------------------


def _ids(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each of the model's own tokens, without added ones."""
    vocabulary = state["vocab"]
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {token: index for index, (token, _) in enumerate(vocabulary)}


def _always(
    tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], ids: Mapping[str, int]
) -> set[int]:
    """Return tokens that are kept whatever the text contains."""
    kept = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    template = str(tokenizer.chat_template or "")
    kept |= set(plain_backend(tokenizer).encode(template, add_special_tokens=False).ids)
    bytes_ = {token for token in ids if _BYTE_TOKEN.fullmatch(token)}
    if state.get("byte_fallback") and len(bytes_) >= 256:
        kept |= {ids[token] for token in bytes_ | ({space_mark(tokenizer)} & ids.keys())}
    else:
        kept |= {index for token, index in ids.items() if len(token) == 1}
    if state["type"] == "Unigram":
        return kept | ({state["unk_id"]} if state["unk_id"] is not None else set())
    return kept | ({ids[state["unk_token"]]} if state.get("unk_token") in ids else set())


def _built_from(state: Mapping[str, Any]) -> Callable[[str], Iterable[str]]:
    """Return a function from a token to the tokens that its merges pass through, itself included.

    For a token that merges do not build, as in Unigram, these are the token alone.
    """
    if state["type"] != "BPE":
        return lambda token: [token]
    ranks = {tuple(merge): rank for rank, merge in enumerate(state["merges"])}

    def parts(token: str) -> Iterable[str]:
        symbols, intermediate = list(token), {token}
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[best] not in ranks:
                return [token]
            intermediate.update(symbols)
            symbols[best : best + 2] = ["".join(pairs[best])]
        return intermediate

    return parts


# --- New tokenizer ------------------------------------------------------------------------------


def _with(
    tokenizer: PreTrainedTokenizerBase, new_ids: Mapping[str, int]
) -> PreTrainedTokenizerBase:
    """Return a copy of `tokenizer` with only these tokens, under these ids."""
    old = {index: token for token, index in tokenizer.get_vocab().items()}

    def edit(state: dict[str, Any], settings: dict[str, Any]) -> None:
        model = state["model"]
        if model["type"] == "BPE":
            # Including added tokens: the library would number those that the model lacks itself.
            model["vocab"] = dict(new_ids)
            model["merges"] = [
                merge for merge in model["merges"] if {*merge, "".join(merge)} <= new_ids.keys()
            ]
        else:
            unknown = model["vocab"][model["unk_id"]][0] if model["unk_id"] is not None else None
            model["vocab"] = [piece for piece in model["vocab"] if piece[0] in new_ids]
            model["unk_id"] = None if unknown is None else new_ids[unknown]
        for token in state["added_tokens"]:
            token["id"] = new_ids[token["content"]]
        state["post_processor"] = _renumbered(state.get("post_processor"), new_ids)
        if state.get("padding"):
            state["padding"]["pad_id"] = new_ids[state["padding"]["pad_token"]]
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] = {
                str(new_ids[token["content"]]): token
                for token in settings["added_tokens_decoder"].values()
            }

    result = edited(tokenizer, edit)
    if result.get_vocab() != dict(new_ids):
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' cannot be pruned: the ids of its "
            f"{len(old):,} tokens are not in the order in which the library numbers them; give the "
            "model another vocabulary (target_tokenizer) instead"
        )
    return result


def _renumbered(content: Any, new_ids: Mapping[str, int]) -> Any:
    """Return a post-processor with the new ids of the special tokens that it names."""
    if isinstance(content, list):
        if [type(part) for part in content] == [str, int]:
            return [content[0], new_ids[content[0]]]
        return [_renumbered(part, new_ids) for part in content]
    if not isinstance(content, dict):
        return content
    if content.keys() >= {"ids", "tokens"}:
        return {**content, "ids": [new_ids[token] for token in content["tokens"]]}
    return {key: _renumbered(value, new_ids) for key, value in content.items()}


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def _up_to(size: int, texts: Iterable[str]) -> list[str]:
    """Return the first texts, until they have `size` bytes."""
    chosen: list[str] = []
    for text in texts:
        if size <= 0:
            break
        chosen.append(text)
        size -= len(text.encode())
    return chosen
