"""Decoder models: configs, pure functions, and reading and writing Hugging Face folders."""
