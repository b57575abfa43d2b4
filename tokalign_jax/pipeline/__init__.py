"""Pipeline: the stages of a run, their dependencies, and the records by which a run resumes.

`graph` lists the stages, `runner` runs them, `records` keeps `stages.json`, `context` opens a run's
inputs, `checks` validates them, and `stages` does the I/O around the pure core.
"""

from tokalign_jax.pipeline.graph import fingerprints_of, model_states
from tokalign_jax.pipeline.records import STATE_FILE, drop_outdated, lock, read_records
from tokalign_jax.pipeline.runner import run

__all__ = [
    "STATE_FILE",
    "drop_outdated",
    "fingerprints_of",
    "lock",
    "model_states",
    "read_records",
    "run",
]
