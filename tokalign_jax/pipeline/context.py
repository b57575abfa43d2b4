"""Context of a run, which every stage gets: config, folders, inputs, log and devices."""

import dataclasses
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from tokalign_jax.config import SELF, Config, MeshConfig, training_stages
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.pipeline.inputs import Inputs
from tokalign_jax.planning import advice
from tokalign_jax.planning.inference import Source, mesh_sizes
from tokalign_jax.planning.machine import Machine
from tokalign_jax.text import corpus as documents
from tokalign_jax.utils.digests import Digests
from tokalign_jax.utils.progress import Log


class Context:
    """Config, folders, inputs, log and devices of a run."""

    def __init__(self, config: Config, workdir: Path, log: Log, digests: Digests | None = None):
        """Create the context without reading or writing anything.

        Args:
          digests: cache of digests that the runs of a sweep share.
        """
        self.config, self.workdir, self.log = config, workdir, log
        self.digests = digests or Digests(workdir, log)
        self.inputs = Inputs(config, workdir, log)

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artifact."""
        return self.workdir / stage

    @property
    def corpus_config(self) -> Config:
        """The config, with the file that the source model wrote in place of `self`."""
        return documents.with_self(self.config, self.folder(SELF) / documents.SELF_TEXT)

    @cached_property
    def mesh(self) -> Mesh:
        """Mesh of all devices, on which training and a distilled start fit (`config.mesh`)."""
        stages, devices = training_stages(self.config).values(), jax.devices()
        if distributed.count() == 1:
            batch_sizes = [stage.batch.size for stage in stages]
            usable = sharding.usable(self.config.mesh, len(devices), batch_sizes)
            if usable < len(devices):
                self.log(
                    f"{usable} of {len(devices)} devices are used, because more do not divide "
                    f"batch.size; a multiple of {len(devices)} would use all"
                )
            devices = devices[:usable]
        inputs, source = self.inputs, Source.of(*self.inputs.source_model)
        machine = dataclasses.replace(Machine.of(), devices=len(devices))
        sizes = mesh_sizes(self.config, source, inputs.new_model, machine, inputs.teachers)
        mesh = sharding.make_mesh(MeshConfig(*sizes), devices=devices)
        for warning in advice.not_split(inputs.new_model, sizes):
            self.log(f"warning: {warning}")
        return mesh
