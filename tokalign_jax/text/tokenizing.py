"""Token shards: the training documents as memory-mapped ids of the source and target tokenizer.

Each side has a folder with

- `tokens.bin`: raw little-endian uint16, or uint32 past 65,536 tokens;
- `documents.npy` (int64): the end of each document, whose last token is the end-of-text;
- `counts.npy` (int64 [V]): occurrences of each id;
- `unlearned.npy` (int64 [n, 2]): spans of tokens that are read but not predicted;
- `index.json`: type, sizes, kinds of text that the tokenizer does not preserve, and by language
  documents, bytes, tokens, unknown tokens and bytes per token.
"""

import dataclasses
import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import SELF, Config
from tokalign_jax.errors import UserError
from tokalign_jax.text import chats, corpus
from tokalign_jax.text.canonical import losses, special_ids, token_bytes, vocabulary_size
from tokalign_jax.text.special_tokens import end_of_text_id, ends_turn
from tokalign_jax.utils.progress import Log, Progress

SIDES = ("source", "target")


@dataclass(frozen=True)
class TokenShards:
    """One side's tokens, opened for random access."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens], memory-mapped: the documents concatenated."""
    documents: np.ndarray
    """int64 [documents]: the position after each document's end-of-text."""
    counts: np.ndarray
    """int64 [V]: occurrences of each id, end-of-text included."""
    index: dict[str, Any]
    """Content of `index.json`."""
    unlearned: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """int64 [n, 2]: spans (begin, end) of tokens that are read but not predicted: turns of a chat
    that are not the assistant's, and beginning and end of text that the source model wrote.
    """

    @property
    def opening(self) -> int | None:
        """Token that begins every training sequence (`opening_id` of the tokenizer), or None."""
        return self.index.get("opening")

    @classmethod
    def open(cls, folder: Path) -> "TokenShards":
        """Open the shards that `run` wrote to `folder/source` or `folder/target`.

        Raises:
          UserError: the folder contains no complete shards.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            # An empty file cannot be mapped, but every document has at least its end-of-text.
            tokens = np.memmap(
                folder / "tokens.bin", dtype=np.dtype(index["dtype"]).newbyteorder("<"), mode="r"
            )
            documents, counts, unlearned = (
                np.load(folder / f"{name}.npy") for name in ("documents", "counts", "unlearned")
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"'{folder}' holds no token shards ({error}): run the tokens stage again"
            ) from error
        if len(tokens) != index["tokens"] or len(counts) != index["vocabulary"]:
            raise UserError(
                f"the token shards in '{folder}' are not complete: {len(tokens):,} tokens where "
                f"index.json says {index['tokens']:,}: run the tokens stage again"
            )
        return cls(tokens, documents, counts, index, unlearned)

    def __len__(self) -> int:
        return len(self.tokens)


def run(
    config: Config,
    corpus_folder: Path,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    """Tokenize the training documents in `corpus_folder` with both tokenizers.

    The text is read once; both tokenizers process each batch concurrently, each with its own
    threads.

    Returns:
      The content of `index.json` by side.
    """
    writers = [
        ShardWriter(folder / side, tokenizer, target_tokenizer)
        for side, tokenizer in zip(SIDES, (source_tokenizer, target_tokenizer))
    ]
    for side, tokenizer in zip(SIDES, (source_tokenizer, target_tokenizer)):
        log(f"tokens: {_separator_line(side, tokenizer)}")
    total = json.loads((corpus_folder / "summary.json").read_text(encoding="utf-8"))["train_bytes"]
    progress = Progress(log, "tokens", total, "bytes")
    with ThreadPoolExecutor(len(writers)) as pool:
        for documents in corpus.train_batches(corpus_folder):
            list(pool.map(lambda writer, documents=documents: writer.add(documents), writers))
            progress.update(sum(document.bytes for document in documents))
    indices = {side: writer.close() for side, writer in zip(SIDES, writers)}
    progress.done(
        ", ".join(f"{side} {i['bytes_per_token']:.2f} bytes/token" for side, i in indices.items())
    )
    for side, index in indices.items():
        if index["loses"]:
            log(
                f"tokens: the {side} tokenizer does not keep {', '.join(index['loses'])} "
                f"({_unknown_share(index)})"
            )
    return indices


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[corpus.Document]
) -> TokenShards:
    """Tokenize documents, which may be none, into shards in memory."""
    if not documents:  # An empty file cannot be mapped.
        counts = np.zeros(vocabulary_size(tokenizer), np.int64)
        empty = np.zeros(0, np.int64)
        return TokenShards(empty, empty, counts, {"opening": opening_id(tokenizer)})
    with TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), tokenizer)
        writer.add(documents)
        writer.close()
        shards = TokenShards.open(Path(folder))
        return dataclasses.replace(shards, tokens=np.array(shards.tokens))


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can make shards.

    Raises:
      UserError: the tokenizer has no token to end documents (`end_of_text_id`), adds wrong ids to
        texts (`check_added_tokens`), or fails on some text.
    """
    end_of_text_id(tokenizer)
    check_added_tokens(tokenizer)
    losses(tokenizer)


def _separator_line(side: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the token that separates documents, with a warning if it also ends turns."""
    end = end_of_text_id(tokenizer)
    line = f"{tokenizer.convert_ids_to_tokens(end)!r} separates documents in the {side} tokenizer"
    eos = tokenizer.eos_token_id
    if eos is not None and eos != end:
        line += f"; its eos, {tokenizer.eos_token!r}, ends turns of a chat"
    elif ends_turn(tokenizer, end):
        line = (
            f"warning: {line}, although it ends turns of a chat: there is no other end-of-text"
            " token"
        )
        line += (
            ", so the model learns that any text may end a turn; name one with --config.end_of_text"
        )
        line += "" if side == "target" else " if it is the target's"
    return line


def opening_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token prepended to every text (LLaMA's, Gemma's, BERT's), or None.

    Such a model was never trained on text without it, and some (Gemma) perform badly on it.
    """
    return _added_to_text(tokenizer, 0)


def closing_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token appended to every text (T5's eos, BERT's `[SEP]`), or None."""
    return _added_to_text(tokenizer, -1)


def _added_to_text(tokenizer: PreTrainedTokenizerBase, place: int) -> int | None:
    # Some vocabularies (of other scripts) lack "a"; then their first token with ids is used.
    for text in itertools.chain("a", tokenizer.get_vocab()):
        full, bare = (
            tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False)
        )
        if bare and not set(bare) & special_ids(tokenizer):
            return _beside(full, bare, place)
    return None


def _beside(full: list[int], bare: list[int], place: int) -> int | None:
    """Return the first (`place` 0) or last (-1) id of `full`, unless it is in `bare`."""
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if not starts:
        return None
    before, after = starts[0], len(full) - len(bare) - starts[0]
    return full[place] if (before if place == 0 else after) else None


def check_added_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the ids that the post-processor adds to texts.

    Raises:
      UserError: an id does not belong to the token that the post-processor names, as after
        retraining a tokenizer from another one; or a template leaves out the text, or repeats it.
    """
    post_processor = cast(Any, tokenizer).backend_tokenizer.post_processor
    state = json.loads(post_processor.__getstate__()) if post_processor else {}
    if (times := _times_text(state)) != 1:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' puts each text {times} times where it should"
            " once: in its tokenizer.json, under post_processor, `single` must have Sequence A once"
        )
    vocabulary = tokenizer.get_vocab()
    for token, index in _added_by(state):
        if vocabulary.get(token) == index:
            continue
        actual = vocabulary.get(token)
        other = tokenizer.convert_ids_to_tokens(index) if index in vocabulary.values() else None
        means = "no token" if other is None else f"the token {other!r}"
        remedy = "take it out" if actual is None else f"write its id, {actual}"
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' adds {token!r} to texts as the id {index},"
            f" which is {means}: its model has no such row, or another token's; in its"
            f" tokenizer.json, under post_processor, {remedy}"
        )


def _times_text(post_processor: Mapping[str, Any]) -> int:
    """Return how often a post-processor, as in tokenizer.json, puts the text itself."""
    times = math.prod(map(_times_text, post_processor.get("processors", ())))
    if "single" not in post_processor:
        return times
    return times * sum("Sequence" in item for item in post_processor["single"])


def _added_by(post_processor: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (token, id) of all tokens that a post-processor, as in tokenizer.json, adds."""
    for part in post_processor.get("processors", ()):
        yield from _added_by(part)
    for key in ("cls", "sep"):  # BERT's and RoBERTa's
        if key in post_processor:
            yield tuple(post_processor[key])
    named = post_processor.get("special_tokens", {})
    template = [*post_processor.get("single", ()), *post_processor.get("pair", ())]
    for name in dict.fromkeys(
        item["SpecialToken"]["id"] for item in template if "SpecialToken" in item
    ):
        yield from zip(named[name]["tokens"], named[name]["ids"], strict=True)


_COUNTED = ("documents", "bytes", "text_tokens", "unknown_tokens")


class ShardWriter:
    """Appends documents to one side's shards."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        template: PreTrainedTokenizerBase | None = None,
    ):
        """Open the files of one side.

        Args:
          folder: receives the shards.
          tokenizer: the side's tokenizer.
          template: the tokenizer whose chat template writes chats; None: the same one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The index is written last: shards without it are not complete.
        (folder / "index.json").unlink(missing_ok=True)
        self._folder = folder
        self._encoder = chats.Encoder(tokenizer, template)
        self._end, self._opening = end_of_text_id(tokenizer), opening_id(tokenizer)
        self._unknown = tokenizer.unk_token_id
        self._losses = losses(tokenizer)
        contents = enumerate(token_bytes(tokenizer))
        self._blank = {i for i, content in contents if content is not None and not content.strip()}
        self._counts = np.zeros(vocabulary_size(tokenizer), np.int64)
        self._dtype = np.dtype("<u2" if len(self._counts) <= 1 << 16 else "<u4")
        self._file = (folder / "tokens.bin").open("wb")
        self._ends, self._unlearned = array("q"), array("q")
        self._tokens = 0
        self._languages: Counter[tuple[str, str]] = Counter()

    def add(self, documents: Sequence[corpus.Document]) -> None:
        """Append documents."""
        plain = [d.text for d in documents if not d.chat]
        encodings = self._encoder.backend.encode_batch_fast(plain, add_special_tokens=False)
        plain_ids = (encoding.ids for encoding in encodings)
        read = [
            self._chat(d.chat) if d.chat else self._plain(next(plain_ids), d.source)
            for d in documents
        ]
        written = [np.array([*ids, self._end], self._dtype) for ids, _ in read]
        if written:  # Counted together, since each count goes through the whole vocabulary.
            self._counts += np.bincount(np.concatenate(written), minlength=len(self._counts))
        for document, ids, (_, learned) in zip(documents, written, read):
            self._file.write(ids.tobytes())
            if learned is not None:
                self._mark(learned)
            self._tokens += len(ids)
            self._ends.append(self._tokens)
            unknown = (
                0 if self._unknown is None else int(np.count_nonzero(ids[:-1] == self._unknown))
            )
            for name, amount in zip(_COUNTED, (1, document.bytes, len(ids) - 1, unknown)):
                self._languages[document.language, name] += amount

    def _plain(self, ids: Sequence[int], source: str) -> tuple[Sequence[int], np.ndarray | None]:
        """Return the ids of a text, and which are learned; None: all, and its end-of-text.

        Most texts that the source model wrote begin with a given word and are cut off after a few
        tokens. Learning that would make any word likely at the beginning of a document, and any
        place its end. Some tokenizers give the space before the word a token of its own.
        """
        if source != SELF:
            return ids, None
        first = next((i for i, token in enumerate(ids) if token not in self._blank), len(ids))
        return ids, np.arange(len(ids)) > first

    def _chat(self, chat: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a chat, and which of them are learned."""
        written = self._encoder.written(chat)
        tokens = self._encoder.encode([written.pieces])[0]
        return tokens.ids, chats.is_learned(tokens.ends, written.learned)

    def _mark(self, learned: np.ndarray) -> None:
        """Record which tokens of the next document are not learned, its end-of-text included."""
        unlearned = np.concatenate([[False], ~learned, [True, False]])
        edges = np.flatnonzero(unlearned[1:] != unlearned[:-1])
        self._unlearned.extend((self._tokens + edges).tolist())

    def close(self) -> dict[str, Any]:
        """Write all other files and return the content of `index.json`."""
        self._file.close()
        unlearned = np.frombuffer(self._unlearned, np.int64).reshape(-1, 2)
        np.save(self._folder / "unlearned.npy", unlearned)
        np.save(self._folder / "documents.npy", np.frombuffer(self._ends, np.int64))
        np.save(self._folder / "counts.npy", self._counts)
        languages = {
            language: _with_rate({name: self._languages[language, name] for name in _COUNTED})
            for language in sorted({language for language, _ in self._languages})
        }
        totals = {name: sum(counts[name] for counts in languages.values()) for name in _COUNTED}
        index = {
            "dtype": self._dtype.name,
            "tokens": self._tokens,
            "vocabulary": len(self._counts),
            "end_of_text": self._end,
            "opening": self._opening,
            "loses": self._losses,
            **_with_rate(totals),
            "languages": languages,
        }
        (self._folder / "index.json").write_text(
            json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return index


def _with_rate(sums: dict[str, int]) -> dict[str, Any]:
    return {**sums, "bytes_per_token": sums["bytes"] / max(sums["text_tokens"], 1)}


def _unknown_share(index: dict[str, Any]) -> str:
    return f"{index['unknown_tokens'] / max(index['text_tokens'], 1):.2%} of its tokens are unknown"
