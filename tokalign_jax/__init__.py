"""Give a pre-trained language model a new vocabulary: TokAlign on JAX."""

import os

__version__ = "0.1.0"

# transformers would say that PyTorch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
