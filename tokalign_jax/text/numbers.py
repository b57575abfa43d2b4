"""Tokenization of numbers: splitting digits differently may cost a model its arithmetic."""

from transformers import PreTrainedTokenizerBase

from tokalign_jax.text.boundaries import NONE, token_boundaries
from tokalign_jax.text.canonical import plain_backend

PROBES = ("2023", "12345")


def number_pieces(tokenizer: PreTrainedTokenizerBase, number: str) -> list[str]:
    """Return the pieces of `number` within a text."""
    before = "a"
    text = f"{before} {number}"
    (boundaries,) = token_boundaries(plain_backend(tokenizer), [text])
    ends = [end for end in boundaries.ends.tolist() if end != NONE and end > len(before)]
    pieces = [text[start:end].strip() for start, end in zip([len(before), *ends], ends)]
    return [piece for piece in pieces if piece]


def warning_line(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> str:
    """Return a warning if the two tokenizers split numbers differently; else ""."""
    for number in PROBES:
        one, other = ("|".join(number_pieces(tokenizer, number)) for tokenizer in (source, target))
        if one != other:
            return (
                "warning: the tokenizers split numbers differently: "
                f"{number} is {one} for the source and {other} for the target, so the model may "
                "lose arithmetic; config.evaluation.abilities measures it (suite `sums`)"
            )
    return ""
