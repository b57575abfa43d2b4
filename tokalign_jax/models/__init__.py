"""The decoder: its config, its pure functions, and reading and writing Hugging Face folders."""
