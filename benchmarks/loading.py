"""Memory of reading a large checkpoint onto several devices, and of writing it again.

    python benchmarks/loading.py --layers 32 --devices 8

Creates a checkpoint with the shape of LLaMA 3 8B in bfloat16 (zeros in sparse files, which take no
disk space), reads it onto `--devices` simulated CPU devices in a separate process, and reports the
peak host memory in addition to the arrays on the devices, and each device's share of these arrays.
With --export it is written again (16 GB for 32 layers).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 5_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="of the devices, along `tensor`; the rest is along `fsdp`",
    )
    parser.add_argument("--export", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where to put both checkpoints; a temporary folder by default"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(Path(arguments.worker), arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        largest = make(Path(folder) / "model", arguments.layers)
        flags = f"--xla_force_host_platform_device_count={arguments.devices}"
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], f"--worker={folder}"],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout.splitlines()[-1])
    gigabytes = {name: value / 1e9 for name, value in result.items() if name.endswith("bytes")}
    beside = (result["peak_bytes"] - result["start_bytes"] - result["device_bytes"]) / largest
    print(f"{arguments.layers} layers on {arguments.devices} devices, tensor={arguments.tensor}")
    for name, value in gigabytes.items():
        print(f"  {name.removesuffix('_bytes'):24} {value:8.2f} GB")
    print(
        f"  largest file             {largest / 1e9:8.2f} GB; host memory beside the arrays: "
        f"{beside:.2f} of it"
    )
    print(f"  seconds to read          {result['seconds']:8.0f}")


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors."""
    rows, width, inner, keys = (
        LLAMA_8B[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads")
    )
    keys *= width // LLAMA_8B["num_attention_heads"]
    of_layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {
        "model.embed_tokens.weight": (rows, width),
        **{
            f"model.layers.{i}.{name}.weight": shape
            for i in range(layers)
            for name, shape in of_layer.items()
        },
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }


def make(folder: Path, layers: int) -> int:
    """Writes the checkpoint; returns the bytes of its largest file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": layers}))
    files: list[dict[str, dict]] = [{}]
    end = 0
    for name, shape in tensors(layers).items():
        size = 2 * math.prod(shape)
        if end + size > SHARD_BYTES:
            files.append({})
            end = 0
        files[-1][name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [end, end := end + size],
        }
    index = {}
    for number, header in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(
                8 + len(text) + max(entry["data_offsets"][1] for entry in header.values())
            )
        index |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: the most memory that it had, and what of that were the arrays."""
    import jax

    from tokalign_jax.config import MeshConfig
    from tokalign_jax.models import hub, huggingface
    from tokalign_jax.parallel import sharding

    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=arguments.tensor))
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    start = resident()
    config, _ = hub.load_config(folder / "model")
    began = time.monotonic()
    params = jax.block_until_ready(huggingface.load_params(folder / "model", config, mesh=mesh))
    result = {"seconds": time.monotonic() - began, "start_bytes": start, "peak_bytes": peak()}
    leaves = jax.tree.leaves(params)
    by_device = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            by_device[shard.device] += shard.data.nbytes
    result |= {
        "device_bytes": sum(by_device.values()),
        "most_on_a_device_bytes": max(by_device.values()),
    }
    if arguments.export:
        stored = huggingface.stored_dtypes(folder / "model")
        (folder / "export").mkdir()
        huggingface.write_weights(folder / "export", params, config, "source", stored, SHARD_BYTES)
        result["peak_after_export_bytes"] = peak()
    return result


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
