"""Alignment of a target vocabulary to the tokens of a source vocabulary."""
