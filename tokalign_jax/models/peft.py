"""Writing adapters as a folder for PEFT (https://github.com/huggingface/peft)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import weight_table
from tokalign_jax.models.lora import Adapter
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.models.weights import Weight
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import paths

FOLDER = "adapter"
"""Name of the adapter folder within the model's folder."""


def check(config: ModelConfig) -> None:
    """Refuses models whose adapters PEFT does not support.

    Raises:
      UserError: the model has experts, which are not modules in transformers.
    """
    if config.experts is not None:
        raise UserError(
            "export.adapters=apart: PEFT has no adapters for the experts of a"
            f" '{config.model_type}' model, which transformers stores as one parameter per layer;"
            " use export.adapters=merged"
        )


class _Factors(NamedTuple):
    """Factors of a module's adapter: W + B A, including the scale."""

    a: np.ndarray
    """[r, in]"""
    b: np.ndarray
    """[out, r]"""


def save_adapters(
    folder: Path,
    config: ModelConfig,
    adapters: Mapping[str, Sequence[Adapter]],
    stored: Collection[str],
    writes: bool = True,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, in float32.

    Several adapters of a kernel are combined into one whose rank is their sum; so are the adapters
    of projections that are one tensor in the checkpoint, as a block-diagonal matrix.

    Args:
      folder: the new folder.
      config: the model's config.
      adapters: adapters by the path of their kernel.
      stored: names of the checkpoint's tensors.
      writes: True in the one process that writes; all processes must call this.
    """
    check(config)
    factors = {path: [_factors(adapter) for adapter in group] for path, group in adapters.items()}
    shapes = {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}
    modules: dict[str, _Factors] = {}
    for weight in weight_table(config, stored):
        if factors.keys().isdisjoint(weight.leaves):
            continue
        for part in weight.slices(config.num_layers):
            default, *aliases = weight.names(part)
            name = next((name for name in (default, *aliases) if name in stored), default)
            module = _module_factors(weight, part, factors, shapes, _is_transposed(config))
            modules[name.removesuffix(".weight")] = module
    if not writes:
        return
    folder.mkdir(parents=True)
    tensors = {}
    for name, (a, b) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"base_model_name_or_path": str(folder.parent), **_config(config, modules)}
    hub.write_json(folder / "adapter_config.json", settings)


def _config(config: ModelConfig, modules: Mapping[str, _Factors]) -> dict[str, Any]:
    """Returns the settings; alpha is the rank, since the factors include the scale."""
    ranks = {name: len(factors.a) for name, factors in modules.items()}
    default = min(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != default}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _is_transposed(config),
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }


def _is_transposed(config: ModelConfig) -> bool:
    """Tells if weights are stored as [in, out]."""
    return config.model_type == "gpt2"


def _factors(adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    """Returns both factors on the host, [L, in, r] and [L, r, out], the second scaled."""
    spec, a, b = adapter
    return _host(a), np.float32(spec.scale) * _host(b)


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(sharding.to_host(x), np.float32)


def _module_factors(
    weight: Weight,
    part: tuple[int, ...],
    factors: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    shapes: Mapping[str, tuple[int, ...]],
    transposed: bool,
) -> _Factors:
    """Combines the adapters of a module's projections; `transposed`: its weight is [in, out]."""
    layer = part[0]
    parts = [
        (number, a[layer], b[layer])
        for number, path in enumerate(weight.leaves)
        for a, b in factors.get(path, ())
    ]
    rank = sum(a.shape[1] for _, a, _ in parts)
    blocks = [np.zeros((rank, shapes[path][-1]), np.float32) for path in weight.leaves]
    first = 0
    for number, a, b in parts:
        blocks[number][first : first + a.shape[1]] = b
        first += a.shape[1]
    b_joined = weight.join(blocks)
    return _Factors(
        np.concatenate([a.T for _, a, _ in parts]), b_joined.T if transposed else b_joined
    )
