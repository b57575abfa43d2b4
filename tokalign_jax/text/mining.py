"""Vocabulary extension: the source tokenizer with new tokens mined from text.

Byte pair encoding continues from the source's merges. Text is tokenized by the source tokenizer;
repeatedly the most frequent pair of neighbouring tokens becomes a token (Sennrich et al. 2016,
section 3.2), and its merge is appended to the existing ones. Every text is thus first tokenized as
before, then some neighbours are joined: no text gets longer, and no old token changes its id or
meaning. Characters that a SentencePiece vocabulary spells in bytes, or does not know, may become
tokens too (a text of unknown characters may get longer, since several may have been one unknown
token).
"""

import heapq
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import Config
from tokalign_jax.errors import UserError
from tokalign_jax.text import corpus
from tokalign_jax.text.canonical import plain_backend, space_mark, special_ids, vocabulary_size
from tokalign_jax.text.editing import edited
from tokalign_jax.utils.progress import Log, Progress, quantity

BATCH_BYTES = 4 << 20
"""Bytes of text tokenized at once."""
LONGEST_WORD = 256
"""Tokens per word, at most; longer words are counted in parts, since the cost is quadratic in the
length.
"""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Mined(NamedTuple):
    """New tokens as spelled, each with the number of tokens that it saves in the text."""

    characters: list[tuple[str, int]]
    """Characters that were spelled in bytes, the most useful first."""
    merges: list[tuple[str, str, int]]
    """Joined pairs, in order."""


def run(
    config: Config, corpus_folder: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, log: Log
) -> dict[str, Any]:
    """Extend `tokenizer` with tokens mined from the training documents, and write it to `folder`.

    Args:
      config: `extend` has the settings.
      corpus_folder: the corpus artifact.
      tokenizer: the source tokenizer.
      folder: receives the tokenizer.
      log: receives progress and warnings.

    Returns:
      The sizes of both vocabularies, and the bytes that were read.
    """
    settings = config.extend
    texts = sample(corpus_folder, settings.budget_bytes, config.seed)
    extended = extended_tokenizer(
        tokenizer, texts, settings.new_tokens, min_count=settings.min_count, log=log
    )
    before, after = vocabulary_size(tokenizer), vocabulary_size(extended)
    log(f"extend: {after - before:,} new tokens after {before:,}")
    if after == before:
        log(
            f"extend: warning: nothing occurs {settings.min_count} times in the"
            f" {quantity(sum(map(len, texts)))} characters that were read and is not a token yet:"
            " lower extend.min_count, or give more text"
        )
    extended.save_pretrained(str(folder))
    return {
        "source_tokens": before,
        "tokens": after,
        "bytes": sum(len(text.encode()) for text in texts),
    }


def sample(corpus_folder: Path, budget_bytes: int, seed: int) -> list[str]:
    """Sample training documents of at most `budget_bytes`; the last one is truncated.

    Each document is drawn at random, so that each part of the corpus has its share. If the draw has
    less than half of the budget because documents are few, the first documents are taken.
    """
    total = json.loads((corpus_folder / "summary.json").read_text(encoding="utf-8"))["train_bytes"]
    random = np.random.default_rng(seed)
    texts = _drawn(corpus_folder, budget_bytes, lambda: random.random() < budget_bytes / total)
    if 2 * sum(len(text.encode()) for text in texts) < min(budget_bytes, total):
        texts = _drawn(corpus_folder, budget_bytes, lambda: True)
    return texts


def _drawn(corpus_folder: Path, budget_bytes: int, is_chosen: Callable[[], bool]) -> list[str]:
    texts, remaining = [], budget_bytes
    for document in itertools.chain.from_iterable(corpus.train_batches(corpus_folder)):
        if is_chosen():
            texts.append(document.text.encode()[:remaining].decode(errors="ignore"))
            remaining -= document.bytes
        if remaining <= 0:
            break
    return texts


def largest_size(config: Config, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an upper bound on the rows of the extended vocabulary, before text is read."""
    return vocabulary_size(tokenizer) + config.extend.new_tokens + bool(config.end_of_text)


def extended_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    new_tokens: int,
    *,
    min_count: int = 10,
    longest: int = 24,
    log: Log = lambda line: None,
) -> PreTrainedTokenizerBase:
    """Extend `tokenizer` by up to `new_tokens` tokens, whose ids follow its largest one.

    The same texts in the same order give the same tokenizer. A few tens of megabytes of text
    suffice, which are read in a minute or two.

    Args:
      tokenizer: the source tokenizer.
      texts: text in which the new tokens are frequent.
      new_tokens: upper bound; fewer are added if the text has no more pairs of `min_count`.
      min_count: occurrences that a new token needs in the text.
      longest: characters of a new token as spelled (bytes, for byte-level tokenizers).
      log: receives progress.

    Raises:
      UserError: the tokenizer has no merges to continue (Unigram, WordPiece).
    """
    check(tokenizer)
    characters = unknown_characters(tokenizer, texts, min_count)[:new_tokens]
    base = _with_tokens(tokenizer, Mined(characters, []))
    words = count_words(base, texts, log)
    mined = _best(characters, mine(base, words, new_tokens, min_count, longest), new_tokens)
    log(
        f"extend: {len(mined.characters):,} characters and {len(mined.merges):,} merges of"
        f" {len(words):,} different words"
    )
    return _with_tokens(tokenizer, mined)


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a vocabulary can be extended.

    Raises:
      UserError: it has no merges to continue.
    """
    model = plain_backend(tokenizer).model
    is_bpe = isinstance(model, tokenizers.models.BPE)
    marked = is_bpe and (model.continuing_subword_prefix or model.end_of_word_suffix)
    if marked or not is_bpe:
        kind = "BPE with marks within words" if marked else type(model).__name__
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' is of kind {kind}, whose vocabulary cannot"
            " be extended: only byte pair encoding has merges to continue; give another vocabulary"
            " (target_tokenizer) instead"
        )


# --- Old vocabulary -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """The existing tokens, and constraints on new ones."""

    spelled: list[str]
    """The string of every id; "" for unused ids."""
    mergeable: Bool[np.ndarray, "V"]
    """Tell if a token may be part of a new one: not special, not added, not a byte token."""
    mark: str
    """`▁` for SentencePiece's kind, else ""."""
    digits: int
    """The longest run of digits in a token, so that a vocabulary that splits numbers continues to.
    """

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Vocabulary":
        mark, spelled = space_mark(tokenizer), [""] * vocabulary_size(tokenizer)
        for token, index in tokenizer.get_vocab().items():
            spelled[index] = token
        others = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
        mergeable = np.array(
            [bool(token) and not (mark and _BYTE_TOKEN.fullmatch(token)) for token in spelled]
        )
        mergeable[list(others)] = False
        runs = (
            run
            for token, can in zip(spelled, mergeable)
            if can
            for run in re.findall(r"\d+", token)
        )
        return cls(spelled, mergeable, mark, max(map(len, runs), default=0))

    def allows(self, token: str, longest: int) -> bool:
        """Return whether `token`, the text of a pair, is one that this vocabulary might have had.

        SentencePiece tokens have characters of one kind (letters, digits, others) after at most one
        `▁`, or only `▁`; no pre-tokenizer ensures that here.
        """
        if len(token) > longest or any(len(run) > self.digits for run in re.findall(r"\d+", token)):
            return False
        if not self.mark:
            return True
        body = token.removeprefix(self.mark)
        kinds = {_kind(character) for character in body}
        return self.mark not in body and len(kinds) <= 1 if body.strip(self.mark) else True


def _kind(character: str) -> str:
    """Classify a character: letter (or its mark), digit, or other."""
    return {"L": "letter", "M": "letter", "N": "digit"}.get(
        unicodedata.category(character)[0], "other"
    )


def unknown_characters(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_count: int
) -> list[tuple[str, int]]:
    """Return characters that the vocabulary lacks, with the tokens they would save, best first.

    A byte-level vocabulary lacks none. One without byte tokens gains a known token for an unknown
    one.
    """
    if not space_mark(tokenizer):
        return []
    backend = plain_backend(tokenizer)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(backend.normalizer.normalize_str(text) if backend.normalizer else text)
    without_bytes = not getattr(backend.model, "byte_fallback", False)
    saved = {
        character: count * max(len(character.encode("utf-8", "replace")) - 1, int(without_bytes))
        for character, count in counts.items()
        if count >= min_count
        and character.isprintable()
        and backend.token_to_id(character) is None
        and character != " "
    }
    return sorted(((c, n) for c, n in saved.items() if n), key=lambda item: (-item[1], item[0]))


# --- Words --------------------------------------------------------------------------------------


def count_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], log: Log
) -> Counter[bytes]:
    """Count the runs of tokens within which neighbours may be joined.

    Runs are keyed by the bytes of their int32 ids and have at least two tokens. They end where the
    pre-tokenizer splits, before a `▁`, and at tokens that cannot be joined.
    """
    vocabulary, backend = _Vocabulary.of(tokenizer), plain_backend(tokenizer)
    mark = vocabulary.mark
    begins = np.array([bool(mark) and token.startswith(mark) for token in vocabulary.spelled])
    only_mark = np.array([bool(mark) and not token.strip(mark) for token in vocabulary.spelled])
    progress = Progress(log, "extend", sum(map(len, texts)), "characters")
    words: Counter[bytes] = Counter()
    for batch in _batches(texts):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            if len(ids) < 2:
                continue
            joins = vocabulary.mergeable[ids]
            cut = np.diff(np.array(encoding.word_ids, np.int64)) != 0
            cut |= ~joins[1:] | ~joins[:-1] | (begins[ids[1:]] & ~only_mark[ids[:-1]])
            _add(words, ids, np.flatnonzero(cut) + 1)
        progress.update(sum(map(len, batch)))
    progress.done()
    return words


def _add(words: Counter[bytes], ids: np.ndarray, cuts: np.ndarray) -> None:
    starts, ends = np.append(0, cuts), np.append(cuts, len(ids))
    several = ends - starts > 1
    content = ids.tobytes()
    for start, end in zip(starts[several].tolist(), ends[several].tolist()):
        for part in range(start, end, LONGEST_WORD):
            words[content[4 * part : 4 * min(part + LONGEST_WORD, end)]] += 1


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- Merges -------------------------------------------------------------------------------------


def mine(
    tokenizer: PreTrainedTokenizerBase,
    words: Mapping[bytes, int],
    new_tokens: int,
    min_count: int,
    longest: int,
) -> list[tuple[str, str, int]]:
    """Return the next merges in order: both tokens, and their frequency at that point.

    Of equally frequent pairs, the one of the lowest ids comes first. A pair whose text is already a
    token is skipped: its merge could trigger old ones, and the text would no longer be tokenized as
    counted.
    """
    vocabulary = _Vocabulary.of(tokenizer)
    spelled, existing = list(vocabulary.spelled), set(vocabulary.spelled)
    cut = [np.frombuffer(word, np.int32).tolist() for word in words]
    counts = list(words.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (tokens, count) in enumerate(zip(cut, counts)):
        for pair in itertools.pairwise(tokens):
            pairs[pair] += count
            where[pair].append(i)

    def candidate(pair: tuple[int, int]) -> bool:
        text = spelled[pair[0]] + spelled[pair[1]]
        return (
            pairs[pair] >= min_count and text not in existing and vocabulary.allows(text, longest)
        )

    heap = [(-count, pair) for pair, count in pairs.items() if candidate(pair)]
    heapq.heapify(heap)
    merges: list[tuple[str, str, int]] = []
    while heap and len(merges) < new_tokens:
        claimed, pair = heapq.heappop(heap)
        if not candidate(pair):
            continue
        if pairs[pair] != -claimed:  # Other merges used some of its tokens.
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        first, second = (spelled[i] for i in pair)
        merges.append((first, second, pairs[pair]))
        new = len(spelled)
        spelled.append(first + second)
        existing.add(first + second)
        fresh = set()
        for i in set(where.pop(pair)):
            before, after = cut[i], _joined(cut[i], pair, new)
            for old in itertools.pairwise(before):
                pairs[old] -= counts[i]
            for now in itertools.pairwise(after):
                pairs[now] += counts[i]
                if new in now:
                    fresh.add(now)
                    where[now].append(i)
            cut[i] = after
        for now in fresh:
            if candidate(now):
                heapq.heappush(heap, (-pairs[now], now))
    return merges


def _joined(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace every `pair` in `tokens` by `new`, from the left."""
    result, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


def _best(
    characters: Sequence[tuple[str, int]], merges: Sequence[tuple[str, str, int]], count: int
) -> Mined:
    """Return the `count` tokens that save the most.

    A merge saves no more than its characters, so these come first.
    """
    ranked = sorted(
        [(-n, 0, i) for i, (_, n) in enumerate(characters)]
        + [(-n, 1, i) for i, (*_, n) in enumerate(merges)]
    )
    counts = [sum(kind == other for _, kind, _ in ranked[:count]) for other in (0, 1)]
    return Mined(list(characters[: counts[0]]), list(merges[: counts[1]]))


# --- New tokenizer ------------------------------------------------------------------------------


def _with_tokens(tokenizer: PreTrainedTokenizerBase, mined: Mined) -> PreTrainedTokenizerBase:
    """Return a copy of `tokenizer` with the mined tokens."""
    new = [character for character, _ in mined.characters] + [
        first + second for first, second, _ in mined.merges
    ]
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}

    def extend(state: dict[str, Any], settings: dict[str, Any]) -> None:
        # Added tokens that the model does not have get ids after the model's when they are read,
        # so they would move. Tokens of the model keep their ids.
        state["model"]["vocab"] |= added | {
            token: i for i, token in enumerate(new, vocabulary_size(tokenizer))
        }
        state["model"]["merges"] += [[first, second] for first, second, _ in mined.merges]

    result = edited(tokenizer, extend)
    before, after = tokenizer.get_vocab(), result.get_vocab()
    if any(after.get(token) != index for token, index in before.items()) or after.keys() != {
        *before,
        *new,
    }:
        raise ValueError("an old token's id changed")
    return result
