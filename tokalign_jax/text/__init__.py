"""Text: corpora, tokenizers and their special tokens, token shards."""
