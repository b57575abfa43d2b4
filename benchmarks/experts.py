"""Training speed of a mixture of experts: sparse and dense implementations here, and transformers.

    python benchmarks/experts.py --out experts.json           # one GPU, under three minutes
    python benchmarks/experts.py --tiny --out experts.json    # any CPU, a check of the script

The shape is that of the first layers of Qwen3-30B-A3B. Weights and tokens are random but identical
for all implementations: a weight is a hash of its tensor's name and its index, so that no file is
exchanged. Each implementation runs in a separate process; one that fails or times out is reported,
and the others continue.

- `sparse`, `dense`, `ragged`: this project's training step with that implementation of the experts
  (models/experts.py): float32 master weights, gradient clipping, AdamW, donated buffers.
- `transformers`: PyTorch with SDPA, fused AdamW, gradient clipping, and weights and optimizer state
  in the compute type (half the memory of ours). It is measured with grouped matrix products if the
  installed version has them, and on a GPU also with torch.compile; the fastest run counts.

MFU counts the parameters that are active for a token, 6 FLOPs each, and attention over all pairs of
tokens; `causal MFU` counts half of the pairs (as in benchmarks/train_throughput.py). Agreement with
transformers is measured by the loss of the first step, in the compute type, and by the loss of
every token of the first sequence, in float32.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OURS = ("sparse", "dense", "ragged")
TRANSFORMERS = "transformers"
RESERVED = 30
"""Seconds that a side leaves to each side after it."""
STEP_TOLERANCE = {"bfloat16": 0.01, "float32": 1e-4}
"""Largest difference of the first step's losses, by compute type."""
TOKEN_TOLERANCE = 1e-3
"""Largest difference between token losses in float32, root mean square, relative to their spread."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and the batch."""

    hidden: int = 2048
    layers: int = 4
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    per_token: int = 8
    intermediate: int = 768
    """Width of an expert."""
    vocabulary: int = 151_936
    batch: int = 4
    length: int = 2048
    dtype: Any = "bfloat16"

    def config(self) -> dict[str, Any]:
        """Returns the config.json."""
        return {
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": 3 * self.hidden,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "norm_topk_prob": True,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the weights by their names in transformers."""
        hidden, size = self.hidden, self.head_dim
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (self.heads * size, hidden),
            "self_attn.k_proj": (self.kv_heads * size, hidden),
            "self_attn.v_proj": (self.kv_heads * size, hidden),
            "self_attn.o_proj": (hidden, self.heads * size),
            "self_attn.q_norm": (size,),
            "self_attn.k_norm": (size,),
            "mlp.gate": (self.experts, hidden),
        }
        experts = {
            "mlp.experts.gate_up_proj": (self.experts, 2 * self.intermediate, hidden),
            "mlp.experts.down_proj": (self.experts, hidden, self.intermediate),
        }
        shapes = {f"{name}.weight": shape for name, shape in layer.items()} | experts
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
            **{
                f"model.layers.{number}.{name}": shape
                for number in range(self.layers)
                for name, shape in shapes.items()
            },
        }

    def flops_per_token(self) -> float:
        """Returns the FLOPs of a training step per token, attention over all pairs."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        router = self.experts * self.hidden
        experts = 3 * self.per_token * self.intermediate * self.hidden
        parameters = self.layers * (attention + router + experts) + self.vocabulary * self.hidden
        return 6 * parameters + 2 * self._causal_pairs()

    def causal_flops_per_token(self) -> float:
        """Returns the same with half of the pairs."""
        return self.flops_per_token() - self._causal_pairs()

    def _causal_pairs(self) -> float:
        return 6 * self.layers * self.heads * self.head_dim * self.length

    def tokens(self) -> np.ndarray:
        """Returns the batch [B, T + 1]."""
        shape = self.batch, self.length + 1
        return np.random.default_rng(0).integers(self.vocabulary, size=shape, dtype=np.int32)


TINY = Shape(64, 2, 4, 2, 16, 8, 2, 32, 512, 2, 64, "float32")


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        shape, steps = Shape(**json.loads(arguments.shape)), arguments.steps
        measure = measure_transformers if arguments.worker == TRANSFORMERS else measure_ours
        for row in measure(arguments.worker, shape, steps, Path(arguments.losses)):
            print(json.dumps(row), flush=True)
        return
    shape = TINY if arguments.tiny else Shape(layers=arguments.layers, batch=arguments.batch)
    sides, deadline = arguments.sides.split(","), time.monotonic() + arguments.seconds
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.npy" for side in sides}
        for number, side in enumerate(sides):
            seconds = deadline - time.monotonic() - RESERVED * (len(sides) - number - 1)
            rows += run(side, shape, arguments.steps, files[side], max(seconds, RESERVED))
            write(arguments.out, shape, rows, [])
        agreements = [
            agreement(side, shape, rows, files)
            for side in sides
            if side != TRANSFORMERS and TRANSFORMERS in sides
        ]
    write(arguments.out, shape, rows, agreements)
    print(table(rows), *map(sentence, agreements), sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("experts.json"), help="JSON of the results"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32, for CPUs")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--batch", type=int, default=Shape.batch, help="sequences")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--sides",
        default=f"sparse,{TRANSFORMERS},dense",
        help=f"of {', '.join(OURS)}, {TRANSFORMERS}, in this order",
    )
    parser.add_argument("--seconds", type=float, default=170, help="for all sides together")
    for name in ("worker", "shape", "losses"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.sides.split(",")) - {*OURS, TRANSFORMERS}
    if unknown:
        parser.error(f"--sides: unknown {', '.join(sorted(unknown))}")
    return arguments


# --- Sides as processes -------------------------------------------------------------------------


def run(side: str, shape: Shape, steps: int, losses: Path, seconds: float) -> list[Row]:
    """Runs a side in a process; returns its rows, or one that says why there are none.

    Args:
      side: the side.
      shape: sizes.
      steps: timed steps.
      losses: the file for the losses of tokens.
      seconds: time after which the process is ended; rows that it printed before count.
    """
    began = time.monotonic()
    print(f"{side}: at most {seconds:.0f} s", flush=True)
    command = [sys.executable, __file__, f"--worker={side}", f"--steps={steps}"]
    command += [f"--shape={json.dumps(asdict(shape))}", f"--losses={losses}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
        problem = "" if process.returncode == 0 else _last_error(errors, process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        problem = f"no more results within {seconds:.0f} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if problem:
        rows.append({"side": side, "error": problem})
    for row in rows:
        if "error" in row:
            print(f"  {row['side']} failed: {row['error']}\n{errors[-2000:]}", flush=True)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return rows


def _last_error(errors: str, code: int) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    described = [line for line in lines if "Error" in line or "EXHAUSTED" in line] or lines
    return (described[-1][:300] if described else "") or f"exit status {code}"


def _row(side: str, variant: str, shape: Shape, kind: str, **measured: Any) -> Row:
    from tokalign_jax.planning.machine import peak_flops

    rate, peak = shape.batch * shape.length / measured["seconds"], peak_flops(kind)
    return {
        "side": side,
        "variant": variant,
        "device": kind,
        "tokens_per_second": rate,
        "mfu": peak and shape.flops_per_token() * rate / peak,
        "causal_mfu": peak and shape.causal_flops_per_token() * rate / peak,
        **measured,
    }


# --- Weights ------------------------------------------------------------------------------------


def hashed(index: Any, seed: Any, number: Callable[[int], Any] = int) -> Any:
    """Returns hashes in [0, 2^32) of the elements of a tensor, in NumPy, JAX or PyTorch.

    Args:
      index: indices of elements.
      seed: the tensor's (`seed_of`).
      number: makes constants of the type of `index`: 64-bit integers, or unsigned 32-bit ones.
    """
    x = index ^ seed
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * number(factor)) & number(0xFFFFFFFF)
    return x ^ (x >> 14)


def seed_of(name: str) -> int:
    """Returns the seed of the tensor `name`."""
    return zlib.crc32(name.encode())


def scaled(hashes: Any, name: str, as_float: Callable[[Any], Any]) -> Any:
    """Returns weights in float32: uniform with standard deviation 0.02, around 1 in norms."""
    unit = as_float(hashes >> 8) * 2.0**-23 - 1.0
    return unit * np.float32(0.02 * 3**0.5).item() + (1.0 if "norm" in name else 0.0)


# --- This project -------------------------------------------------------------------------------


def measure_ours(side: str, shape: Shape, steps: int, losses: Path) -> Iterator[Row]:
    """Measures the training step with one implementation of the experts."""
    from tokalign_jax.utils import compiling

    compiling.prepare()
    import jax
    import jax.numpy as jnp

    from tokalign_jax.config import BatchConfig, ComputeConfig, StageConfig
    from tokalign_jax.models import families
    from tokalign_jax.parallel import sharding
    from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
    from tokalign_jax.training.step import init_state, make_loss, make_train_step
    from tokalign_jax.utils import paths

    config = families.config_from_hf(shape.config())
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, computed=side))
    params = our_params(config, shape)
    tokens = shape.tokens()
    np.save(losses, our_token_losses(config, params, tokens[:1]))

    stage = StageConfig(
        method="full", batch=BatchConfig(size=shape.batch, sequence_length=shape.length)
    )
    compute = ComputeConfig(dtype=shape.dtype, remat="dots")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    labels = paths.label_tree(rules_for("full"), params)
    optimizer = make_optimizer(stage, labels, config.vocab_size)

    def start(params: Any) -> Any:
        leaves = {
            path: _padded(leaf.astype(jnp.float32), sharding.padded_shape(path, leaf.shape, mesh))
            for path, leaf in paths.flatten(params).items()
        }
        return init_state(paths.unflatten(leaves), optimizer)

    # Donation is left out: float32 buffers do not fit in those of the compute type.
    state = jax.jit(start, out_shardings=sharding.shardings(jax.eval_shape(start, params), mesh))(
        params
    )
    del params
    step = make_train_step(make_loss(config, compute, None), optimizer, compute.dtype, mesh)
    batch = sharding.global_batch(tokens[None], mesh)
    inputs = ({}, batch, jax.random.key(0), schedule_of(stage))
    began = time.monotonic()
    lowered: Any = step.lower(state, *inputs)  # pyright: ignore[reportFunctionMemberAccess]
    compiled = lowered.compile()
    compile_seconds = time.monotonic() - began
    state, metrics = compiled(state, *inputs)
    first_loss = float(metrics["loss"])
    state, _ = compiled(state, *inputs)
    jax.block_until_ready(state)
    began = time.monotonic()
    for _ in range(steps):
        state, metrics = compiled(state, *inputs)
    jax.block_until_ready(state)
    seconds = (time.monotonic() - began) / steps
    device = jax.devices()[0]
    yield _row(
        side,
        f"jax {jax.__version__}",
        shape,
        device.device_kind,
        seconds=seconds,
        compile_seconds=compile_seconds,
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        first_loss=first_loss,
    )


def our_params(config: Any, shape: Shape) -> Any:
    """Returns the weights as our parameters, in the compute type, made on the device."""
    import jax
    import jax.numpy as jnp

    from tokalign_jax.models.families import weight_table
    from tokalign_jax.models.transformer import abstract_params
    from tokalign_jax.utils import paths

    shapes = shape.tensors()

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def made(seed: jax.Array, size: tuple[int, ...], kind: str) -> jax.Array:
        index = jax.lax.iota(jnp.uint32, math.prod(size)).reshape(size)
        as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
        return scaled(hashed(index, seed, np.uint32), kind, as_float).astype(shape.dtype)

    def tensor(name: str) -> jax.Array:
        # Compiled once for tensors of the same size.
        return made(np.uint32(seed_of(name)), shapes[name], "norm" if "norm" in name else "")

    leaves: dict[str, list[Any]] = {}
    for weight in weight_table(config, shapes):
        for part in weight.slices(config.num_layers):
            name = next(name for name in weight.names(part) if name in shapes)
            stored: Any = tensor(name)  # A jax.Array, which NumPy's functions leave on its device.
            for path, block in zip(weight.leaves, weight.split(stored), strict=True):
                leaves.setdefault(path, []).append(block)
    stacked = {
        path: jnp.stack(blocks) if path.startswith("layers/") else blocks[0]
        for path, blocks in leaves.items()
    }
    expected = {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}
    assert {path: leaf.shape for path, leaf in stacked.items()} == expected
    return paths.unflatten(stacked)


def our_token_losses(config: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the loss of each token in float32, [B, T]."""
    import jax
    import jax.numpy as jnp

    from tokalign_jax.models.transformer import forward, head_matrix

    @jax.jit
    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = forward(config, params, tokens[:, :-1], dtype=jnp.float32)
        head = head_matrix(params).astype(jnp.float32)
        logits = jnp.matmul(hidden, head.T, precision="highest")
        label = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - label

    return np.asarray(losses(params, tokens))


def _padded(x: Any, shape: tuple[int, ...]) -> Any:
    import jax.numpy as jnp

    return jnp.pad(x, [(0, size - old) for size, old in zip(shape, x.shape)])


# --- transformers -------------------------------------------------------------------------------


def measure_transformers(side: str, shape: Shape, steps: int, losses: Path) -> Iterator[Row]:
    """Measures transformers' experts as they are and compiled; yields a row for each that runs."""
    import torch

    on = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    model, implementation = torch_model(shape, on)
    tokens = torch.tensor(shape.tokens(), device=on).long()
    np.save(losses, torch_token_losses(model, tokens[:1]))
    torch.set_float32_matmul_precision("high")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Compilation for CPUs takes minutes.
    for compiled in (False, True) if on == "cuda" else (False,):
        variant = f"torch {torch.__version__}, {implementation}{', compiled' * compiled}"
        try:
            model.load_state_dict(state)
            measured = torch_steps(model, tokens, steps, compiled)
        except Exception as error:
            traceback.print_exc()
            yield {"side": side, "variant": variant, "error": f"{type(error).__name__}: {error}"}
            continue
        kind = torch.cuda.get_device_name() if on == "cuda" else on
        yield _row(side, variant, shape, kind, **measured)


def torch_model(shape: Shape, on: str) -> tuple[Any, str]:
    """Returns the model with its weights, and the name of its implementation of the experts."""
    import torch
    import transformers

    raw = shape.config()
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    make = functools.partial(
        transformers.AutoModelForCausalLM.from_config,
        config,
        attn_implementation="sdpa",
        dtype=getattr(torch, shape.dtype),
    )
    with torch.device(on):
        try:
            model, implementation = make(experts_implementation="grouped_mm"), "grouped_mm"
        except (TypeError, ValueError, KeyError):  # An older version.
            model, implementation = make(), "eager"
    model.config.use_cache = False
    weights = dict(model.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shape.tensors()
    chunk = 1 << 26  # Elements at a time, whose indices take eight bytes each.
    with torch.no_grad():
        for name, weight in weights.items():
            flat = weight.view(-1)
            for first in range(0, len(flat), chunk):
                index = torch.arange(first, min(first + chunk, len(flat)), device=on)
                values = scaled(hashed(index, seed_of(name)), name, lambda x: x.float())
                flat[first : first + chunk] = values.to(weight.dtype)
    return model, implementation


def torch_token_losses(model: Any, tokens: Any) -> np.ndarray:
    """Returns the loss of each token in float32, [B, T], from the plain loop over experts."""
    import torch

    dtype, implementation = model.dtype, getattr(model.config, "_experts_implementation", None)
    model.eval()
    _convert(model, torch.float32)
    if implementation is not None:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
        labels = tokens[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    if implementation is not None:
        model.set_experts_implementation(implementation)
    _convert(model, dtype)
    return losses.view(len(tokens), -1).cpu().numpy()


def _convert(model: Any, dtype: Any) -> None:
    """Converts the weights alone: buffers (rotary frequencies) are float32 in any model."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def torch_steps(model: Any, tokens: Any, steps: int, compiled: bool) -> Row:
    """Times training steps; raises what PyTorch raises."""
    import torch

    on_gpu = tokens.is_cuda
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    called = torch.compile(model) if compiled else model
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step() -> Any:
        loss = called(input_ids=inputs, labels=inputs, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    began = time.monotonic()
    first_loss = float(step())
    compile_seconds = time.monotonic() - began
    float(step())
    began = time.monotonic()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return {
        "seconds": (time.monotonic() - began) / steps,
        "compile_seconds": compile_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "first_loss": first_loss,
    }


# --- Results ------------------------------------------------------------------------------------


def agreement(side: str, shape: Shape, rows: list[Row], files: dict[str, Path]) -> Row:
    """Compares a side's losses with those of transformers, as far as both have them."""
    found: Row = {"side": side, "agrees": None}
    ours, theirs = (
        min(
            (row for row in rows if row["side"] == name and "error" not in row),
            key=_seconds,
            default=None,
        )
        for name in (side, TRANSFORMERS)
    )
    checks = []
    if ours and theirs:
        found["step_difference"] = abs(ours["first_loss"] - theirs["first_loss"])
        checks.append(found["step_difference"] <= STEP_TOLERANCE[shape.dtype])
    if files[side].exists() and files[TRANSFORMERS].exists():
        tokens, reference = (
            np.load(files[name]).astype(np.float64) for name in (side, TRANSFORMERS)
        )
        found["token_difference"] = float(np.sqrt(np.square(tokens - reference).mean()))
        found["token_spread"] = float(reference.std())
        checks.append(found["token_difference"] <= TOKEN_TOLERANCE * found["token_spread"])
    if checks:
        found["agrees"] = all(checks)
    return found


def _seconds(row: Row) -> float:
    return row["seconds"]


def sentence(found: Row) -> str:
    """Says how a side agrees with transformers."""
    if found["agrees"] is None:
        return f"{found['side']}: not compared with transformers"
    parts = []
    if "step_difference" in found:
        parts.append(f"first step's loss differs by {found['step_difference']:.1e}")
    if "token_difference" in found:
        parts.append(
            f"token losses in float32 by {found['token_difference']:.1e} (root mean square; their"
            f" spread is {found['token_spread']:.2f})"
        )
    verdict = "agrees" if found["agrees"] else "DOES NOT AGREE"
    return f"{found['side']} {verdict} with transformers: {', '.join(parts)}"


def table(rows: list[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| side | version | tokens/s | ms per step | MFU | causal MFU | memory, GiB | compile, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        head = f"| {row['side']} | {row.get('variant', '')} |"
        if "error" in row:
            lines.append(f"{head} {row['error'].replace('|', '/')[:80]} | | | | | |")
            continue
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            f"{1e3 * row['seconds']:.1f}",
            *("" if row[name] is None else f"{row[name]:.3f}" for name in ("mfu", "causal_mfu")),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}",
            f"{row['compile_seconds']:.1f}",
        ]
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines)


def write(file: Path, shape: Shape, rows: list[Row], agreements: list[Row]) -> None:
    """Writes all results as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    results = {"shape": asdict(shape), "rows": rows, "agreement": agreements}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
