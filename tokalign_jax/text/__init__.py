"""Corpora, tokenizers and what both sides of an adaptation read."""
