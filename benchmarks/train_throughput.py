"""Tokens per second, MFU, memory and compile time of training steps, here and in PyTorch for the
same work.

    python benchmarks/train_throughput.py --model pythia-1b --vocabulary 151936 --method embedding,full --torch --out runs/throughput

Weights are random, in the shape of a published model or of any config.json of a supported family;
nothing is downloaded. Each measurement runs in a separate process, so that its peak memory is its
own. For this project, it times the step of the real training loop (mixed precision, gradient
clipping, AdamW, donated buffers), first on one fixed batch, then on batches from shuffled token
shards as in training, to see whether input keeps up. `--torch` adds PyTorch + transformers:
torch.compile, SDPA, fused AdamW, gradient clipping, and gradients only for the parameters that the
method trains (LoRA is left out, since it is not part of transformers).

MFU is model FLOPs as a share of the devices' peak. Per token, each parameter in a matrix product
counts 2 FLOPs forward, 2 for the gradient of its input and, if it is trained, 2 for its own
gradient; attention counts 12 N H T per layer, over all T x T pairs as is common (PaLM, appendix B;
`planning.flops`). `causal MFU` counts only the half of the pairs that a causal model needs. Neither
counts recomputation.

Mixtures of experts, here the first 4 of Qwen3-30B-A3B's 48 layers, with each implementation:

    for way in dense sparse; do python benchmarks/train_throughput.py --model qwen3-30b-a3b-4 --method full \
        --batch 4 --experts $way --torch --out runs/experts-$way; done

Optimizer state in less memory, and deep models with all layers unrolled or in two groups:

    python benchmarks/train_throughput.py --model llama-8b --vocabulary 151936 --method lora --batch 4 \
        --accumulation 4 --state float32,vocabulary,in-place --no-feed --out runs/state
    python benchmarks/train_throughput.py --model qwen3-4b --method lora,full --batch 4 --unroll 18,36 \
        --no-feed --out runs/depth

Projections in float8 and in bfloat16 (`compute.matmul`; the row also counts the float8 kernels in
the compiled program, which should not be 0):

    python benchmarks/train_throughput.py --model pythia-1b --vocabulary 151936 \
        --method embedding,lora,full --batch 8 --matmul dtype,float8 --no-feed --out runs/float8

LoRA on projections in 8 and 4 bits (`stageN.lora.frozen`):

    python benchmarks/train_throughput.py --model llama-8b --vocabulary 151936 --method lora --batch 4 \
        --frozen dtype,int8,nf4 --no-feed --out runs/frozen

Writes `throughput.json` (rows of this project, which `tokalign plan --throughput` reads),
`throughput-torch.json` and `throughput.png`; with `--profile` also the kernels and the compiled
program of each variant.
"""

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokalign_jax.utils.progress import Progress, quantity

_NEOX = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    }


MODELS: dict[str, dict[str, Any]] = {
    "tiny": _NEOX | _sizes(64, 256, 2, 4, 1000),
    "pythia-1b": _NEOX | _sizes(2048, 8192, 16, 8, 50304),
    "qwen3-4b": _LLAMA
    | _sizes(2560, 9728, 36, 32, 151936)
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "granite-2b": _LLAMA
    | _sizes(2048, 8192, 40, 32, 49152)
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "llama-8b": _LLAMA
    | _sizes(4096, 14336, 32, 32, 128256)
    | {"num_key_value_heads": 8, "head_dim": 128},
    "qwen3-30b-a3b-4": _QWEN3_MOE
    | _sizes(2048, 6144, 4, 32, 151936)
    | {"num_key_value_heads": 4, "head_dim": 128},
}
"""Configs as Hugging Face writes them; of qwen3-4b and granite-2b the sizes alone."""

_VOCABULARY = {"moment_dtype": "bfloat16", "row_second_moment": True}
STATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"moment_dtype": "bfloat16"},
    "vocabulary": _VOCABULARY,
    "in-place": _VOCABULARY | {"accumulate_in_place": True},
    "sums-in-place": {"accumulate_in_place": True},
    "all": _VOCABULARY
    | {
        "accumulate_in_place": True,
        "body_moment_dtype": "bfloat16",
        "body_row_second_moment": True,
    },
}
"""Formats of the optimizer's state: fields of `OptimizerConfig`."""

_FLOAT8_KERNEL = '"__cublas$lt$matmul$f8"'
"""A call of cuBLASLt's float8 kernels in a compiled program."""
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|OutOfMemoryError|out of memory", re.IGNORECASE)
Row = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        print(
            json.dumps(
                measure_torch(arguments) if arguments.worker == "torch" else measure(arguments)
            )
        )
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    methods = arguments.method.split(",")
    measured = _together if arguments.together else functools.partial(_apart, "jax")
    lists = (
        arguments.remat.split(","),
        arguments.unroll.split(","),
        arguments.xla.split(";"),
        arguments.state.split(","),
        arguments.loss_chunk.split(","),
        arguments.matmul.split(","),
        arguments.frozen.split(","),
    )
    rows = [
        measured(method, arguments, **variant)
        for method in methods
        for variant in _variants(*lists)
    ]
    torch_rows = []
    if arguments.torch:
        policies = ["none", "checkpointing"] if arguments.torch_checkpointing else ["none"]
        trainable = [method for method in methods if method != "lora"]
        torch_rows = [
            _apart("torch", method, arguments, remat=policy)
            for method in trainable
            for policy in policies
        ]
    print(table(rows + torch_rows))
    # The fastest of each method comes last: that is the one a reader by method keeps.
    rows.sort(key=lambda row: row.get("tokens_per_second", 0))
    (arguments.out / "throughput.json").write_text(
        json.dumps([row for row in rows if "error" not in row], indent=1)
    )
    (arguments.out / "throughput-torch.json").write_text(json.dumps(torch_rows, indent=1))
    picture(rows + torch_rows, arguments.out / "throughput.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny", help=f"{', '.join(MODELS)} or the path of a config.json"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=0, help="rows of embedding and head; 0: the model's own"
    )
    parser.add_argument("--method", default="embedding,full", help="of embedding, lora, full")
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences that all devices hold at once"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="such batches of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--remat", default="dots", help="of dots, attention, layer")
    parser.add_argument(
        "--experts",
        default="auto",
        choices=("auto", "dense", "sparse"),
        help="how a mixture of experts is computed (models/experts.py)",
    )
    parser.add_argument(
        "--unroll",
        default="0",
        help="layers in one turn of the loop over them; 0: as the model chooses",
    )
    parser.add_argument(
        "--xla",
        default="",
        help="options of the compiler, name=value,name=value; several such sets with ; between",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="all of this project in one process: memory is then what is planned",
    )
    parser.add_argument("--no-feed", action="store_true", help="only the fixed batch")
    parser.add_argument(
        "--mesh", default="0,0,0", help="devices along data, fsdp, tensor; 0: chosen"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--row-damping", type=float, default=0.0, help="of the optimizer, as StageConfig has it"
    )
    parser.add_argument(
        "--state", default="float32", help=f"formats of the optimizer's state: {', '.join(STATES)}"
    )
    parser.add_argument(
        "--loss-chunk", default="0", help="tokens whose logits exist at once; 0: the default"
    )
    parser.add_argument(
        "--matmul", default="dtype", help="how projections are computed: of dtype, float8"
    )
    parser.add_argument(
        "--frozen", default="dtype", help="types of LoRA's frozen projections: of dtype, int8, nf4"
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument(
        "--device", default="", help="platform: cpu, cuda, tpu; empty: the best there is"
    )
    parser.add_argument("--torch", action="store_true", help="PyTorch too")
    parser.add_argument(
        "--torch-checkpointing", action="store_true", help="also with gradient checkpointing"
    )
    parser.add_argument(
        "--torch-masters", default="bfloat16", choices=("bfloat16", "float32"), help="its weights"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also a table of the kernels, beside the results"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _variants(*lists: Sequence[str]) -> list[dict[str, Any]]:
    names = "remat", "unroll", "xla", "state", "loss_chunk", "matmul", "frozen"
    return [dict(zip(names, values)) for values in itertools.product(*lists)]


def _together(method: str, arguments: argparse.Namespace, **variant: Any) -> Row:
    """One measurement in this process."""
    what = {"implementation": "jax", "method": method, **variant}
    _say(", ".join(str(value) for value in what.values() if value))
    try:
        return what | measure(argparse.Namespace(**vars(arguments) | {"method": method} | variant))
    except Exception as error:
        if OUT_OF_MEMORY.search(str(error)):
            return what | {"error": "out of memory"}
        raise


def _apart(worker: str, method: str, arguments: argparse.Namespace, **variant: Any) -> Row:
    """One measurement in a process of its own; what it reports goes to the terminal, its row comes
    back.
    """
    what = {"implementation": worker, "method": method, **variant}
    own = {
        "method": method,
        "worker": worker,
        "torch": False,
        "torch_checkpointing": False,
        **variant,
    }
    flags = []
    for name, value in (vars(arguments) | own).items():
        if value is True:
            flags.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            flags.append(f"--{name.replace('_', '-')}={value}")
    environment = dict(os.environ)
    if worker == "jax" and arguments.device:
        environment["JAX_PLATFORMS"] = arguments.device
    name = ", ".join(str(value) for value in what.values() if value)
    _say(name)
    done = subprocess.Popen(
        [sys.executable, __file__, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    for line in done.stderr or ():
        said.append(line)
        if line.startswith("  "):
            print(line, end="", flush=True)
    output, _ = done.communicate()
    if done.returncode == 0:
        return what | json.loads(output.splitlines()[-1])
    if OUT_OF_MEMORY.search("".join(said)):
        return what | {"error": "out of memory"}
    raise SystemExit(f"{name} failed:\n{''.join(said[-30:])}")


def _say(line: str) -> None:
    print(line, flush=True)


def _report(line: str) -> None:
    """A line of a worker for the terminal."""
    print(f"  {line}", file=sys.stderr, flush=True)


# --- This project -------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> Row:
    """The training step of one method and policy on all devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokalign_jax.config import (
        BatchConfig,
        ComputeConfig,
        LoraConfig,
        MeshConfig,
        OptimizerConfig,
        StageConfig,
    )
    from tokalign_jax.parallel import sharding
    from tokalign_jax.planning.machine import peak_flops
    from tokalign_jax.training.loop import lora_spec, micro_batch
    from tokalign_jax.training.optimizer import make_optimizer, schedule_of
    from tokalign_jax.training.step import make_loss, make_train_step

    model, batch, length = _model(arguments), arguments.batch, arguments.length
    mesh = sharding.make_mesh(MeshConfig(*map(int, arguments.mesh.split(","))))
    stage = StageConfig(
        method=arguments.method,
        lora=LoraConfig(frozen=arguments.frozen),
        optimizer=OptimizerConfig(row_damping=arguments.row_damping, **STATES[arguments.state]),
        batch=BatchConfig(
            size=batch * arguments.accumulation,
            per_device=batch // sharding.sequences_at_once(mesh),
            sequence_length=length,
        ),
    )
    chunk = {"loss_chunk": int(arguments.loss_chunk)} if int(arguments.loss_chunk) else {}
    compute = ComputeConfig(
        dtype=arguments.dtype,
        remat=arguments.remat,
        unroll=int(arguments.unroll),
        matmul=arguments.matmul,
        **chunk,
    )
    assert micro_batch("benchmark", stage, mesh) == batch
    optimizer = make_optimizer(stage, _labels(stage, model), model.vocab_size)
    state, frozen = _random_state(stage, model, jnp.dtype(arguments.dtype), optimizer, mesh)
    step = make_train_step(
        make_loss(model, compute, lora_spec(stage)),
        optimizer,
        compute.dtype,
        mesh,
        stage.optimizer.accumulate_in_place,
    )

    shape = (arguments.accumulation, batch, length + 1)
    random = np.random.default_rng(0)
    fixed = sharding.global_batch(
        random.integers(model.vocab_size, size=shape, dtype=np.int32), mesh
    )
    key, schedule = jax.random.key(0), schedule_of(stage)
    began = time.monotonic()
    lowered: Any = step.lower(state, frozen, fixed, key, schedule)  # pyright: ignore[reportFunctionMemberAccess]
    compiled = lowered.compile(compiler_options=_options(arguments.xla))
    compile_seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    planned = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes
    )  # outputs lie where the state came in
    _report(f"compiled in {compile_seconds:.1f} s, {planned / 2**30:.2f} GiB a device")
    kernels = {}
    if arguments.matmul == "float8":
        kernels["float8_kernels"] = compiled.as_text().count(_FLOAT8_KERNEL)
        _report(f"{kernels['float8_kernels']} float8 kernels in the program")

    def run(batches: Iterator[Any], steps: int, what: str) -> float:
        """Seconds a step; the host stays two steps ahead, as in training."""
        nonlocal state
        progress, ahead, began = Progress(_report, what, steps, "steps"), deque(), time.monotonic()
        for _ in range(steps):
            state, metrics = compiled(state, frozen, next(batches), key, schedule)
            ahead.append(metrics["loss"])
            if len(ahead) > 2:
                ahead.popleft().block_until_ready()
                progress.update()
        jax.block_until_ready(state)
        return (time.monotonic() - began) / steps

    same = iter(lambda: fixed, None)
    run(same, arguments.warmup, "warm-up")
    seconds = run(same, arguments.steps, "fixed batch")
    _report(f"{1e3 * seconds:.1f} ms a step")
    fed = {}
    if not arguments.no_feed:
        feed = _feed(stage, model, mesh, (arguments.warmup + arguments.steps) * stage.batch.size)
        run(feed, arguments.warmup, "warm-up")
        fed["fed_tokens_per_second"] = stage.batch.size * length / run(feed, arguments.steps, "fed")
    if arguments.profile:
        _profile(
            lambda: run(same, 3, "profile"),
            3,
            arguments.out / f"kernels-{_file_name(arguments)}.txt",
        )
        program = gzip.compress(compiled.as_text().encode())
        (arguments.out / f"program-{_file_name(arguments)}.txt.gz").write_bytes(program)

    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    measured = (
        None if arguments.together else (device.memory_stats() or {}).get("peak_bytes_in_use")
    )
    timing = {
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "peak_bytes": measured or planned,
    }
    return _row(arguments, timing, jax.device_count(), device.device_kind, peak) | fed | kernels


def _options(text: str) -> dict[str, Any]:
    """Of the compiler, by name: truth values and numbers as such."""
    values = (option.split("=", 1) for option in text.split(",") if option)
    known = {"true": True, "false": False}
    return {
        name: known.get(value, int(value) if value.isdigit() else value) for name, value in values
    }


def _file_name(arguments: argparse.Namespace) -> str:
    parts = (
        arguments.method,
        arguments.remat,
        arguments.unroll,
        arguments.xla,
        arguments.state,
        arguments.loss_chunk,
        arguments.matmul,
        arguments.frozen,
    )
    return re.sub(r"[^\w-]+", "-", "-".join(part for part in parts if part))


def _model(arguments: argparse.Namespace) -> Any:
    from tokalign_jax.models import families

    model = families.config_from_hf(_hf_config(arguments))
    if model.experts is None:
        return model
    experts = dataclasses.replace(model.experts, computed=arguments.experts)
    return dataclasses.replace(model, experts=experts)


def _hf_config(arguments: argparse.Namespace) -> dict[str, Any]:
    known = MODELS.get(arguments.model)
    config = known or json.loads(Path(arguments.model).read_text())
    return config | ({"vocab_size": arguments.vocabulary} if arguments.vocabulary else {})


def _labels(stage: Any, model: Any) -> Any:
    from tokalign_jax.planning.memory import shapes
    from tokalign_jax.training.optimizer import rules_for
    from tokalign_jax.utils import paths

    return paths.label_tree(rules_for(stage.method), shapes(model, stage)[0])


def _random_state(stage: Any, model: Any, dtype: Any, optimizer: Any, mesh: Any) -> tuple[Any, Any]:
    """A train state and frozen parameters, made on their devices: no array is ever whole on one if
    the rules split it.
    """
    import jax
    import jax.numpy as jnp

    from tokalign_jax.models import quantized
    from tokalign_jax.parallel import sharding
    from tokalign_jax.planning.memory import shapes
    from tokalign_jax.training.loop import frozen_kind
    from tokalign_jax.training.step import init_state
    from tokalign_jax.utils import paths

    def random(tree: Any, dtype: Any, seed: int) -> Any:
        leaves = paths.flatten(tree)
        keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
        return paths.unflatten(
            {
                path: 0.02
                * jax.random.normal(key, sharding.padded_shape(path, leaf.shape, mesh), dtype)
                for (path, leaf), key in zip(leaves.items(), keys)
            }
        )

    def on_devices(make: Callable[[], Any]) -> Any:
        return jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh))()

    trained, frozen = shapes(model, stage)
    state = on_devices(lambda: init_state(random(trained, jnp.float32, 0), optimizer))
    if (kind := frozen_kind(stage)) is None:
        return state, on_devices(lambda: random(frozen, dtype, 1))
    leaves = {}
    for seed, (path, leaf) in enumerate(paths.flatten(frozen).items(), 1):
        one = paths.unflatten({path: leaf})
        made = on_devices(functools.partial(random, one, dtype, seed))
        leaves[path] = quantized.quantize_leaf(path, paths.flatten(made).pop(path), kind, mesh)
    return state, paths.unflatten(leaves)


def _feed(stage: Any, model: Any, mesh: Any, sequences: int) -> Iterator[Any]:
    """Batches on the device as in training, from random tokens in the shards' form."""
    import numpy as np

    from tokalign_jax.parallel import sharding
    from tokalign_jax.training.batches import make_stream

    class Tokens:
        """Sequences of shards, as `batches.TokenSource` reads them."""

        tokens = np.random.default_rng(1).integers(
            model.vocab_size, size=sequences * stage.batch.sequence_length + 1, dtype=np.uint32
        )

        def __len__(self) -> int:
            return sequences

        def __getitem__(self, index: int) -> Any:
            start = int(index) * stage.batch.sequence_length
            return self.tokens[start : start + stage.batch.sequence_length + 1].astype(np.int32)

    micro = stage.batch.per_device * sharding.sequences_at_once(mesh)
    accumulation = stage.batch.size // micro
    stream = make_stream(
        Tokens(),  # pyright: ignore[reportArgumentType]
        seed=0,
        epochs=0,
        offset=0,
        accumulation=accumulation,
        micro_batch=micro,
    )
    ready: deque[Any] = deque()
    while True:
        while len(ready) < 3:
            ready.append(sharding.global_batch(next(stream), mesh))
        yield ready.popleft()


def _row(
    arguments: argparse.Namespace, timing: Row, devices: int, kind: str, peak: float | None
) -> Row:
    from tokalign_jax.config import BatchConfig, StageConfig
    from tokalign_jax.planning.flops import flops_per_token

    model = _model(arguments)
    stage = StageConfig(
        method=arguments.method, batch=BatchConfig(sequence_length=arguments.length)
    )
    flops = flops_per_token(model, stage)
    causal = flops - 6 * model.num_layers * model.num_heads * model.head_dim * arguments.length
    rate = arguments.batch * arguments.accumulation * arguments.length / timing["seconds"]
    share = (lambda work: work * rate / (devices * peak)) if peak else (lambda work: None)
    return {
        "model": arguments.model,
        "vocabulary": model.vocab_size,
        "batch": arguments.batch,
        "accumulation": arguments.accumulation,
        "length": arguments.length,
        "devices": devices,
        "device": kind,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu": share(flops),
        "causal_mfu": share(causal),
        **timing,
    }


# --- A profile ----------------------------------------------------------------------------------

KINDS = (
    ("attention", r"fmha|flash|cudnn.*(sdpa|attention)|splash"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|dot|matmul|convolution"),
    ("between devices", r"nccl|all-gather|all-reduce|reduce-scatter|collective"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("gather and scatter", r"scatter|gather"),
    ("the rest", r""),
)
"""Kernels by the first expression that is found in their names."""


def _profile(work: Callable[[], Any], steps: int, file: Path) -> None:
    """Writes the times of the kernels of `work`, which is so many steps, and says their shares by
    kind.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        times, idle = kernel_times(
            max(Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
        )
    busy = sum(time for time, _ in times.values())
    lines = [
        f"{1e-6 * busy / steps:.2f} ms a step in kernels, {1e-6 * idle / steps:.2f} between them",
        *by_kind(times),
    ]
    for line in lines:
        _report(line)
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:80]
    lines += [
        f"{1e-6 * time / steps:8.3f} ms {count / steps:7.1f} x {name}"
        for name, (time, count) in longest
    ]
    file.write_text("\n".join(lines) + "\n")


Times = dict[str, tuple[float, int]]
"""By kernel: nanoseconds, and how often it ran."""


def kernel_times(file: Path) -> tuple[Times, float]:
    """And the nanoseconds from the first to the last of them in which none ran."""
    import jax

    times: Times = {}
    spans: list[tuple[float, float]] = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            if _has_kernels(plane.name, line.name):
                for event in line.events:
                    if not _WRAPPERS.search(event.name):
                        time_before, count = times.get(event.name, (0.0, 0))
                        times[event.name] = time_before + event.duration_ns, count + 1
                        spans.append((event.start_ns, event.start_ns + event.duration_ns))
    idle, until = 0.0, min(spans, default=(0.0, 0.0))[0]
    for start, end in sorted(spans):
        idle, until = idle + max(0.0, start - until), max(until, end)
    return times, idle


def by_kind(times: Times) -> Iterator[str]:
    """Shares of the device's time by kind, each with its three longest kernels."""
    total = sum(time for time, _ in times.values()) or 1
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind, _ in KINDS}
    for name, (time_of, _) in times.items():
        kinds[kind_of(name)][name] = int(time_of)
    for kind, names in sorted(kinds.items(), key=lambda item: -item[1].total()):
        if names:
            longest = ", ".join(
                f"{name[:40]} {time_of / total:.1%}" for name, time_of in names.most_common(3)
            )
            yield f"{names.total() / total:6.1%} {kind:18} ({longest})"


_WRAPPERS = re.compile(r"^(end: |ThunkExecutor|while|call|conditional)")
"""Events that only contain other events."""


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def _has_kernels(plane: str, line: str) -> bool:
    """Of a GPU the streams, of a TPU the line of operations, of a CPU the threads that run compiled
    code.
    """
    if plane.startswith("/device:GPU"):
        return line.startswith("Stream")
    return line == "XLA Ops" if plane.startswith("/device:TPU") else "XLA" in line


# --- PyTorch ------------------------------------------------------------------------------------


def measure_torch(arguments: argparse.Namespace) -> Row:
    """The same work by PyTorch and transformers on one device: AdamW over what the method trains."""
    import torch
    import transformers

    from tokalign_jax.planning.machine import PEAKS

    on = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    dtype = getattr(torch, arguments.torch_masters if arguments.dtype == "bfloat16" else "float32")
    hf_config = _hf_config(arguments)
    config = transformers.AutoConfig.for_model(**hf_config)
    with torch.device(on):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    if arguments.method == "embedding":
        model.requires_grad_(False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(True)
    if arguments.remat == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    shape = (arguments.accumulation, arguments.batch, arguments.length)
    tokens = torch.randint(config.vocab_size, shape, device=on)
    mixed = arguments.dtype == "bfloat16" and dtype == torch.float32

    def step() -> None:
        for micro_batch in tokens:
            with torch.autocast(on, torch.bfloat16, enabled=mixed):
                loss = compiled(input_ids=micro_batch, labels=micro_batch).loss / len(tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(steps: int, what: str) -> float:
        progress, began = Progress(_report, what, steps, "steps"), time.monotonic()
        for _ in range(steps):
            step()
            progress.update()
        if on == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - began) / steps

    compile_seconds = run(1, "compilation")
    _report(f"first step, compilation included: {compile_seconds:.1f} s")
    run(arguments.warmup, "warm-up")
    seconds = run(arguments.steps, "fixed batch")
    peak_bytes = torch.cuda.max_memory_allocated() if on == "cuda" else None
    kind = torch.cuda.get_device_name() if on == "cuda" else on
    peak = next((peak for name, peak in PEAKS.items() if name in kind), None)
    timing = {"seconds": seconds, "compile_seconds": compile_seconds, "peak_bytes": peak_bytes}
    return _row(arguments, timing, 1, kind, peak) | {"version": torch.__version__}


# --- Results ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| | method | variant | tokens/s | ms a step | MFU | causal MFU | with input feed | memory, GiB | compile, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    share = lambda x: "" if x is None else f"{x:.3f}"  # noqa: E731
    for row in rows:
        head = f"| {row['implementation']} | {row['method']} | {_variant(row)} | "
        if "error" in row:
            lines.append(f"{head}{row['error']} | | | | | | |")
            continue
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        fed = quantity(row["fed_tokens_per_second"]) if "fed_tokens_per_second" in row else ""
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            f"{1e3 * row['seconds']:.1f}",
            share(row["mfu"]),
            share(row["causal_mfu"]),
            fed,
            memory,
            f"{row['compile_seconds']:.1f}",
        ]
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def _variant(row: Row) -> str:
    """Settings, besides the method, that identify a row."""
    defaults = {
        "unroll": "0",
        "state": "float32",
        "loss_chunk": "0",
        "matmul": "dtype",
        "frozen": "dtype",
    }
    changed = [
        f"{name}={row[name]}" for name, value in defaults.items() if row.get(name, value) != value
    ]
    return " ".join(part for part in (row["remat"], *changed, row.get("xla", "")) if part)


def picture(rows: Sequence[Row], file: Path) -> None:
    """Tokens a second and memory as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if "error" not in row]
    names = [f"{row['implementation']}, {row['method']}, {_variant(row)}" for row in good]
    colours = ["tab:blue" if row["implementation"] == "jax" else "tab:gray" for row in good]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1 + 0.4 * len(good)), sharey=True, layout="constrained"
    )
    left.barh(names, [row["tokens_per_second"] / 1e3 for row in good], color=colours)
    left.set_xlabel("thousand tokens a second")
    right.barh(names, [(row["peak_bytes"] or math.nan) / 2**30 for row in good], color=colours)
    right.set_xlabel("peak memory of a device, GiB")
    left.invert_yaxis()
    if good:
        row = good[0]
        figure.suptitle(
            f"{row['model']}, {row['vocabulary']:,} rows, {row['batch']} x {row['length']} on {row['device']}"
        )
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
