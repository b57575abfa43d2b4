"""A run: its stages, what each depends on, and the records that let it resume.

`graph` lists the stages, `runner` runs them, `records` keeps `stages.json`, `context` opens a run's
inputs, `checks` refuses what would fail later, and `stages` does the I/O around the pure core.
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
