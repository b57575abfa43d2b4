"""One decoder for several model families: its configuration, its pure functions, and Hugging Face folders in and out."""
