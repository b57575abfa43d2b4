"""A run's config, workdir, log and devices: what every stage is given."""

import functools
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from tokalign_jax.config import SELF, Config, training_stages
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.pipeline.inputs import Inputs
from tokalign_jax.planning import advice, memory
from tokalign_jax.text import corpus as documents
from tokalign_jax.utils.digests import Digests
from tokalign_jax.utils.progress import Log


class Context:
    """A run: its config, its folders, what it is made of, and its devices."""

    def __init__(self, config: Config, workdir: Path, log: Log, digests: Digests | None = None):
        """Describe a run; nothing is read or written yet.

        Args:
          digests: of outside files; runs of a sweep share them.
        """
        self.config, self.workdir, self.log = config, workdir, log
        self.digests = digests or Digests(workdir, log)
        self.inputs = Inputs(config, workdir, log)

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artifact."""
        return self.workdir / stage

    @property
    def corpus_config(self) -> Config:
        """The config with the file that the source model wrote for `self`, where the corpus names
        that.
        """
        return documents.with_self(self.config, self.folder(SELF) / documents.SELF_TEXT)

    @cached_property
    def mesh(self) -> Mesh:
        """All devices, with as many parts as it takes for the training state of every stage to fit
        (`config.mesh`).
        """
        stages, devices = training_stages(self.config).values(), jax.devices()
        if distributed.count() == 1:
            taken = sharding.usable(
                self.config.mesh, len(devices), [stage.batch_size for stage in stages]
            )
            if taken < len(devices):
                self.log(
                    f"{taken} of {len(devices)} devices are used: more do not divide the "
                    f"sequences of a step; a batch_size that "
                    f"is a multiple of {len(devices)} would use all"
                )
            devices = devices[:taken]
        needed = memory.state_bytes(self.config, self.inputs.new_model, self.inputs.teachers)
        share = functools.partial(memory.share, self.inputs.new_model)
        mesh = sharding.make_mesh(self.config.mesh, needed, devices, share)
        for warning in advice.not_split(self.inputs.new_model, mesh.devices.shape):
            self.log(f"warning: {warning}")
        return mesh
