"""Give a pre-trained language model a new vocabulary: TokAlign on JAX."""

__version__ = "0.1.0"
