"""Parameters for the new vocabulary, from an alignment and the source model."""
