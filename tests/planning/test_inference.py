"""Planned memory of stages that do not train, against compiled programs and allocations."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.planning.test_plan import MODELS, model_of, setup_of, train_throughput
from tokalign_jax.config import (
    AlignmentConfig,
    BatchConfig,
    ComputeConfig,
    Config,
    EvaluationConfig,
    InitializationConfig,
    MeshConfig,
    StageConfig,
    TokenDistillationConfig,
)
from tokalign_jax.evaluation import token_costs
from tokalign_jax.initialization import (
    composition,
    contexts,
    row_features,
    self_distillation,
    self_text,
)
from tokalign_jax.models import families, sampling
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.parallel import sharding
from tokalign_jax.pipeline import resources
from tokalign_jax.pipeline.context import Context
from tokalign_jax.planning import advice, inference, memory
from tokalign_jax.planning.inference import Run, Source
from tokalign_jax.planning.machine import Machine, Speed, available_host_memory
from tokalign_jax.planning.report import make_plan
from tokalign_jax.planning.resolve import resolve
from tokalign_jax.text import pairs
from tokalign_jax.training import cross_tokenizer
from tokalign_jax.utils import paths

LLAMA_8B = model_of("llama-8b", 151_669)
SOURCE = Source(128_256, 2)
LORA = StageConfig(method="lora", batch=BatchConfig(size=64, per_device=4))
CONFIG = Config(
    alignment=AlignmentConfig(method="composed"),
    stage1=replace(LORA, method="embedding"),
    stage2=LORA,
)
DISTILLED = replace(CONFIG, alignment=AlignmentConfig())


def run_of(config=CONFIG, mesh=(1, 1, 1), device_memory="80GB", host="512GB"):
    return Run(config, SOURCE, LLAMA_8B, mesh, Machine.of(int(np.prod(mesh)), device_memory, host))


def plan_of(device_memory="80GB", host="512GB", config=CONFIG):
    machine = Machine.of(1, device_memory, host)
    return make_plan(config, LLAMA_8B, machine, Speed(), 10**9, 2, 1e15, None, SOURCE)


# --- Evaluation and export never need more than training ----------------------------------------


def test_model_that_trains_on_a_gpu_can_be_evaluated_and_exported_there():
    """Llama-3.1-8B with adapters on a card of 80 GB: float32 and a merged copy would not fit."""
    needs = inference.needs(run_of())
    setup = resolve(setup_of(LORA, ComputeConfig(), LLAMA_8B, device_memory=80e9))
    training = memory.needed(setup)
    for name in ("evaluate", "export"):
        assert sum(needs[name].device.values()) < 0.5 * training, name
    assert not plan_of().warnings
    model, adapted = (memory.elements(abstract_params(LLAMA_8B), (1, 1, 1)), 6.98e9)
    assert 4 * (model + adapted) > 0.92 * 60e9, "float32, and every kernel once more"


@pytest.mark.parametrize("method", ["embedding", "lora", "full"])
def test_evaluation_needs_no_more_memory_than_training(method):
    stage = replace(LORA, method=method)
    config = Config(stage1=replace(LORA, method="embedding"), stage2=stage)
    setup = resolve(setup_of(stage, ComputeConfig(), LLAMA_8B, device_memory=1e12))
    needs = inference.needs(run_of(config))
    for name in ("evaluate", "export"):
        assert sum(needs[name].device.values()) < memory.needed(setup), name


# --- Estimates against programs and allocations -------------------------------------------------


def placed(tree, mesh):
    """Float32 shapes with their shardings."""

    def place(path, leaf):
        shape = sharding.padded_shape(path, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=sharding.sharding_of(path, shape, mesh)
        )

    return paths.unflatten({path: place(path, leaf) for path, leaf in paths.flatten(tree).items()})


@pytest.fixture(params=MODELS)
def small(request):
    """A small model and a run of it in float32, in which XLA for CPUs casts nothing."""
    model = MODELS[request.param]
    config = Config(
        compute=ComputeConfig(dtype="float32", loss_chunk=256),
        evaluation=EvaluationConfig(batch=8, sequence_length=256),
    )
    machine = Machine(1, 1e12, fused_attention=False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Run(config, Source(3000, 4), model, (1, 1, 1), machine), mesh


def test_evaluation_memory_matches_its_program(small):
    run, mesh = small
    tokens = jax.ShapeDtypeStruct(
        (8, 256), jnp.int32, sharding=jax.NamedSharding(mesh, P(sharding.BATCH))
    )
    params, options = (
        placed(abstract_params(run.model), mesh),
        dict(config=run.model, compute=run.config.compute),
    )
    lowered = token_costs._batch_costs.lower(
        params, tokens, tokens, **options, mesh=mesh, likeliest=False
    )
    found = lowered.compile().memory_analysis()
    model, work = inference.needs(run)["evaluate"].device.values()
    assert 0 <= found.argument_size_in_bytes - model < 20_000
    assert 1 < work / found.temp_size_in_bytes < 1.7


def test_memory_for_reading_text_matches_its_program(small):
    run, mesh = small
    model, width, shape = run.source_model, run.model.hidden_size, (16, 256)
    sums = [jax.ShapeDtypeStruct((size, width), jnp.float32) for size in (3000, 3000, 4000, 4000)]
    moments = tuple(jax.ShapeDtypeStruct((width,) * n, jnp.float32) for n in (1, 2))
    tokens = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=jax.NamedSharding(mesh, P(sharding.BATCH))
    )
    labels = [jax.ShapeDtypeStruct(shape, jnp.int32)] * 4
    params = placed(abstract_params(model), mesh)
    lowered = contexts._add.lower(
        sums,
        moments,
        params,
        tokens,
        labels,
        5,
        config=model,
        dtype=jnp.dtype("float32"),
        mesh=mesh,
    )
    found = lowered.compile().memory_analysis().temp_size_in_bytes
    places = 16 * 256
    assert 0.95 < (inference._forward(run, model, places, 256) + 5 * places * run.row) / found < 1.7


def test_host_memory_of_learned_rows_matches_allocations():
    model = replace(MODELS["llama"], vocab_size=40_000)
    run = Run(CONFIG, Source(20_000, 4), model, (1, 1, 1), Machine(1, 1e12))
    random, width = np.random.default_rng(0), model.hidden_size

    def tokens(count):
        states = np.zeros((count, width), np.float32)
        pieces = composition.Pieces.of(random.integers(0, run.source.rows, (count, 2)).tolist())
        seen = contexts.Contexts(states, states, np.full(count, 500))
        return composition.Tokens(np.arange(count), pieces, np.zeros(count, np.float32), seen)

    known, wanted = tokens(run.source.rows), tokens(model.vocab_size)
    reading = contexts.Reading(known.contexts, wanted.contexts, np.zeros(width), np.eye(width))
    rows = random.normal(size=(run.source.rows, width)).astype(np.float32)
    tracemalloc.start()
    for _ in composition.learned_rows(rows, known, wanted, reading):
        pass
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kinds = inference.needs(run)["init"].host
    (work,) = (size for kind, size in kinds.items() if kind.startswith("largest"))
    assert found < work


def test_host_memory_of_features_matches_allocations():
    model = replace(MODELS["llama"], vocab_size=30_000)
    config = replace(DISTILLED, compute=ComputeConfig(dtype="float32"))
    run = Run(config, Source(5000, 2, "bfloat16"), model, (1, 1, 1), Machine(1, 1e12))
    random, width = np.random.default_rng(0), model.hidden_size
    parts = random.integers(0, run.source.rows, (model.vocab_size, 2)).tolist()
    stored = random.normal(size=(run.source.rows, width)).astype(jnp.bfloat16)
    tracemalloc.start()
    rows = np.array(stored).astype(np.float32)
    states = [np.ones((len(parts), width), np.float32) for _ in row_features.DEPTHS]
    made = [row_features.features(rows, parts, np.arange(len(parts)), states, 0) for _ in range(2)]
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kinds = inference.needs(run)["init"].host
    assert kinds["features of tokens (float32)"] == sum(x.nbytes for x in made)
    assert 0.9 < (sum(kinds.values()) - kinds["new rows (float32)"]) / found < 1.5


def test_memory_of_writing_matches_its_program(small):
    run, mesh = small
    run = replace(run, config=replace(run.config, alignment=AlignmentConfig()))
    batch, length = sampling.BATCH_SIZE["cpu"], self_text.FREE_LENGTH + 32
    lowered = sampling._extend.lower(
        run.source_model,
        placed(abstract_params(run.source_model), mesh),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        jax.ShapeDtypeStruct((), jnp.float32),
        dtype=jnp.dtype("float32"),
        mesh=mesh,
    )
    found = lowered.compile().memory_analysis().temp_size_in_bytes
    assert 0.9 < inference._writing(run) / found < 1.7


@pytest.mark.parametrize(
    ("intermediate_size", "sequences", "least"), [(64, 24, 0.75), (2048, 4, 0)]
)
def test_memory_of_inner_states_matches_its_program(intermediate_size, sequences, least):
    """Beside large weights too, of which it takes no copies."""
    model = replace(
        MODELS["llama"],
        vocab_size=200,
        intermediate_size=intermediate_size,
        num_layers=6,
        layer_kinds=MODELS["llama"].layer_kinds[:1] * 6,
    )
    length = self_distillation.LENGTH
    ids = [(sequences, n) for n in (length + 1, pairs.source_length(length), length)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ids]
    factors = [jax.ShapeDtypeStruct((sequences,), jnp.float32)] * 2
    compute = ComputeConfig(dtype="float32", loss_chunk=256)
    models = cross_tokenizer.Models(model, model, compute)
    params, batch = abstract_params(model), cross_tokenizer.Batch(*arrays, *factors)

    def found(inner):
        gradient = jax.grad(cross_tokenizer.loss, argnums=1, has_aux=True)
        lowered = jax.jit(gradient, static_argnums=(0, 4)).lower(
            models, params, params, batch, cross_tokenizer.Weights(inner=inner)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    planned = inference.inner_states_bytes(model, 4, sequences * length)
    assert least * planned < found(4.0) - found(0.0) < planned


# --- Plan and warnings --------------------------------------------------------------------------


def test_plan_lists_device_and_host_memory_of_all_stages():
    table = plan_of().table()
    before_training, _, after = table.partition("stage1 (embedding)")
    assert (
        "init" in before_training
        and "host memory" in before_training
        and "source model as stored" in before_training
    )
    assert "\nevaluate\n" in after and "model (bfloat16)" in after and "\nexport\n" in after
    needs = plan_of().untrained
    # float32: new rows of both matrices, two mean states of every token of both vocabularies.
    new_rows, states = 2 * 151_669 * 4096 * 4, 2 * (151_669 + 128_256) * 4096 * 4
    assert [*needs["init"].host.values()][:2] == [new_rows, states]
    mixtures = replace(CONFIG, initialization=InitializationConfig(tokens=0))
    assert sum(inference.needs(run_of(mixtures))["init"].host.values()) < new_rows + 2 * states


def test_too_small_a_host_is_warned_of_with_what_would_fit():
    (warning,) = plan_of(host="27GB").warnings
    assert warning.startswith("init will not fit: it needs about ") and "of host memory" in warning
    for setting in ("initialization.tuning=0", "initialization.tokens=0"):
        assert setting in warning
    assert "no settings change that" in plan_of(host="4GB").warnings[0]


def test_too_small_a_device_is_warned_of_with_what_would_fit():
    crowded = replace(CONFIG, evaluation=EvaluationConfig(batch=512))
    (warning,) = [w for w in plan_of("48GB", config=crowded).warnings if w.startswith("evaluate")]
    assert "on each device" in warning and "evaluation.batch=" in warning
    batch = int(warning.partition("evaluation.batch=")[2].split(",")[0])
    fits = replace(CONFIG, evaluation=EvaluationConfig(batch=batch))
    assert not [w for w in plan_of("48GB", config=fits).warnings if w.startswith("evaluate")]
    split = run_of(mesh=(8, 1, 1), device_memory="16GB")
    assert "mesh.fsdp=" in advice.too_large_untrained(split)["evaluate"]


def test_arrays_of_cpu_devices_are_in_host_memory():
    needs = inference.needs(run_of())["evaluate"]
    device, host = sum(needs.device.values()), sum(needs.host.values())
    assert needs.on_host(Machine(2, 1e12)) == host
    assert needs.on_host(Machine(2, 1e12, "cpu", False)) == host + 2 * device


def test_run_warns_of_later_stages_that_will_not_fit(monkeypatch, tmp_path):
    lines = []
    context = Context(Config(), tmp_path, lines.append)
    small = Machine(1, 1e6, fused_attention=False, host_memory=1e6)
    monkeypatch.setattr(resources.Machine, "of", lambda: small)
    resources.warn_of_memory(context, {"init", "evaluate/init", "corpus"})
    assert [line.split()[1] for line in lines] == ["init", "evaluate"]
    lines.clear()
    resources.warn_of_memory(context, {"stage2", "export"})
    assert [line.split()[1] for line in lines] == ["stage2", "export"]


# --- Host memory --------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 64 kB\nMemAvailable:      32 kB\n"}
V2 = "sys/fs/cgroup/job/step"
V1 = "sys/fs/cgroup/memory/docker/abc"
HOSTS = {
    "nothing known": ({}, float("inf")),
    "no limit": (
        MEMINFO | {"proc/self/cgroup": "0::/job/step\n", f"{V2}/memory.max": "max\n"},
        32 * 1024,
    ),
    "limit of the job": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/job/step\n",
            f"{V2}/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": "20000\n",
            "sys/fs/cgroup/job/memory.current": "9000\n",
            "sys/fs/cgroup/job/memory.stat": "anon 3000\nfile 5000\n",
        },
        16_000,
    ),
    "first version": (
        MEMINFO
        | {
            "proc/self/cgroup": "5:devices:/\n4:memory:/docker/abc\n",
            f"{V1}/memory.limit_in_bytes": "10000\n",
            f"{V1}/memory.usage_in_bytes": "4000\n",
            f"{V1}/memory.stat": "cache 1\ntotal_cache 1000\n",
        },
        7_000,
    ),
    "mounted as the root": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/host/path\n",
            "sys/fs/cgroup/memory.max": "10000",
            "sys/fs/cgroup/memory.current": "1000",
        },
        9_000,
    ),
}


@pytest.mark.parametrize("case", HOSTS)
def test_host_memory_is_limited_by_system_and_cgroup(case, tmp_path):
    files, expected = HOSTS[case]
    assert available_host_memory(write(tmp_path, files)) == expected


# --- Distilled initialisation -------------------------------------------------------------------


def test_plan_covers_distillation_and_rows_only_needs_less():
    table = plan_of(config=DISTILLED).table()
    assert "writes 1.8M tokens at most; the start is trained on 5.2M, with it as teacher" in table
    needed = inference.needs(run_of(DISTILLED))["init"].device
    rows, lora = (
        replace(DISTILLED, initialization=InitializationConfig(trains=trains))
        for trains in ("rows", "lora")
    )
    less = inference.needs(run_of(rows))["init"].device
    body = 8_030_261_248 - 2 * 128_256 * 4096
    assert needed["body"] == 20 * body and less["body"] == 2 * body
    adapted = inference.needs(run_of(lora))["init"].device
    # Rank 64 on q, o (4096, 4096), k, v (4096, 1024) and gate, up, down (4096, 14336).
    adapters = 32 * 64 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    assert adapted == less | {"adapters": 20 * adapters}
    extended = inference.needs(run_of(replace(DISTILLED, target_tokenizer="extend")))["init"].device
    assert extended["body"] == less["body"], "the body stays the source's"
    extended = inference.needs(run_of(replace(lora, target_tokenizer="extend")))["init"].device
    assert extended == less, "nor are there adapters"
    none = replace(DISTILLED, initialization=InitializationConfig(distillation_tokens=0))
    assert (
        "init" in inference.needs(run_of(none))
        and "teacher" not in inference.needs(run_of(none))["init"].device
    )


def test_merging_adapters_counts_where_it_takes_most():
    """With few new rows, a body in float32 is more than what a frozen one trains beside it."""
    model = replace(LLAMA_8B, vocab_size=1000)
    config = replace(DISTILLED, initialization=InitializationConfig(trains="lora"))
    run = Run(config, Source(1000, 2, "bfloat16"), model, (1, 1, 1), Machine.of(1, "80GB"))
    needed = inference.needs(run)["init"].device
    (merging,) = [value for kind, value in needed.items() if "merged body" in kind]
    kernels = 6_979_321_856
    assert 4 * kernels < merging < 4.3 * kernels


def test_too_small_a_device_for_distillation_is_warned_of():
    (warning,) = [w for w in plan_of("140GB", config=DISTILLED).warnings if w.startswith("init")]
    assert "it would with initialization.trains=lora, or" in warning
    adapted = replace(DISTILLED, initialization=InitializationConfig(trains="lora"))
    assert not [w for w in plan_of("140GB", config=adapted).warnings if w.startswith("init")]
    # Where adapters do not fit either, rows alone may.
    (warning,) = [w for w in plan_of("102GB", config=adapted).warnings if w.startswith("init")]
    assert "it would with initialization.trains=rows, or" in warning
    (warning,) = [w for w in plan_of("102GB", config=DISTILLED).warnings if w.startswith("init")]
    assert "it would with initialization.trains=rows, or" in warning
    (warning,) = [w for w in plan_of("140GB", config=DISTILLED).warnings if w.startswith("init")]
    number = int(warning.partition("mesh.fsdp=")[2].split()[0])
    assert f"mesh.fsdp={number} on {number} devices" in warning

    def fits(parts):
        run = run_of(DISTILLED, (1, parts, 1), "140GB")
        return "init" not in advice.too_large_untrained(run)

    assert fits(number) and not fits(number // 2)


def test_mesh_splits_the_body_as_far_as_a_distilled_start_needs():
    source = Source(128_256, 2, "bfloat16")

    def mesh_of(config, devices=8, memory="80GB"):
        machine = Machine.of(devices, memory)
        sizes = inference.mesh_sizes(config, source, LLAMA_8B, machine, {})
        assert make_plan(config, LLAMA_8B, machine, Speed(), 1, 2, source=source).mesh == sizes
        init = inference.needs(Run(config, source, LLAMA_8B, sizes, machine))["init"]
        return sizes, sum(init.device.values()) <= machine.memory

    rows, lora = (
        replace(DISTILLED, initialization=InitializationConfig(trains=trains))
        for trains in ("rows", "lora")
    )
    assert mesh_of(rows) == mesh_of(lora) == ((8, 1, 1), True)
    assert mesh_of(lora, memory="50GB") == ((4, 2, 1), True)
    assert mesh_of(DISTILLED) == ((2, 4, 1), True)
    assert mesh_of(DISTILLED, memory="300GB") == ((8, 1, 1), True)
    assert mesh_of(DISTILLED, devices=2) == ((2, 1, 1), False)
    assert mesh_of(replace(DISTILLED, mesh=MeshConfig(fsdp=2))) == ((4, 2, 1), False)


def test_plan_covers_token_distillation():
    config = replace(CONFIG, alignment=AlignmentConfig(method="token_distillation"))
    needed = inference.needs(run_of(config))["init"]
    source_rows = run_of(config).source.rows
    assert needed.device["rows of both vocabularies"] >= 24 * (source_rows + 128_256) * 4096
    settings = TokenDistillationConfig(most_snippets=1000)
    few = replace(config, initialization=InitializationConfig(token_distillation=settings))
    assert "reads 51k tokens at most; rows are tuned on 51k" in plan_of(config=few).table()
    assert inference.needs(run_of(few))["init"].host["snippets"] < needed.host["snippets"]


def test_predictions_in_the_docs_are_those_of_the_plan():
    """docs/running.md, Memory of the start."""
    shape = train_throughput.MODELS["llama-8b"] | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "vocab_size": 151_669,
    }
    llama_1b, many = families.config_from_hf(shape), replace(LLAMA_8B, vocab_size=262_144)

    def predicted(model, trains, fsdp=1):
        config = replace(DISTILLED, initialization=InitializationConfig(trains=trains))
        source, mesh = Source(128_256, 2, "bfloat16"), (1, fsdp, 1)
        kinds = inference.needs(Run(config, source, model, mesh, Machine.of(fsdp)))["init"]
        return [round(sum(x.values()) / 1e9, 1) for x in (kinds.device, kinds.host)]

    assert predicted(llama_1b, "all") == [40.3, 7.8] and predicted(llama_1b, "rows") == [20.8, 7.8]
    assert predicted(LLAMA_8B, "all") == [203.2, 18.1]
    assert predicted(llama_1b, "lora") == [21.7, 7.8]
    assert predicted(LLAMA_8B, "lora") == [67.0, 18.1]
    assert predicted(many, "lora") == [96.8, 28.9]
    assert predicted(LLAMA_8B, "rows") == [63.6, 18.1]
    assert predicted(LLAMA_8B, "all", 4) == [61.4, 18.1]
    assert predicted(many, "rows") == [93.4, 28.9]
