"""The plan against reality: trees of parameters, what XLA says that compiled train steps take, what
steps took on GPUs.

Run as a program, it compiles the steps of `CASES` for simulated devices and prints their memory.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.training.toys import LLAMA, NEOX
from tokalign_jax.config import (
    AlignmentConfig,
    BatchConfig,
    ComputeConfig,
    Config,
    InitializationConfig,
    LoraConfig,
    MeshConfig,
    StageConfig,
)
from tokalign_jax.errors import UserError
from tokalign_jax.main import main
from tokalign_jax.models import families, remat
from tokalign_jax.models.lora import add_lora
from tokalign_jax.models.transformer import init_params
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import machine, memory, resolve
from tokalign_jax.planning.flops import flops_per_token
from tokalign_jax.planning.machine import Machine, MeshSizes, Speed
from tokalign_jax.planning.report import make_plan
from tokalign_jax.training import loop
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import init_state, make_loss, make_train_step
from tokalign_jax.utils import compiling, paths

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import train_throughput

SIZES = {
    "vocab_size": 4000,  # in memory 4,096
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_layers": 4,
    "max_positions": 512,
    "layer_kinds": LLAMA.layer_kinds[:1] * 4,
}
MODELS = {"llama": replace(LLAMA, **SIZES), "neox": replace(NEOX, **SIZES)}
STAGE = StageConfig(
    method="full",
    steps=4,
    lora=LoraConfig(rank=8),
    batch=BatchConfig(size=32, per_device=4, sequence_length=256),
)
COMPUTE = ComputeConfig(dtype="float32", remat="layer", loss_chunk=256)
CASES = [
    # model, method, mesh, sequences of a step, remat
    ("llama", "embedding", (1, 1, 1), 4, "layer"),
    ("neox", "lora", (1, 1, 1), 4, "layer"),
    ("llama", "full", (1, 1, 1), 8, "dots"),
    ("neox", "full", (2, 2, 2), 16, "attention"),
]


def settings(model: str, method: str, sequences: int, remat: str):
    return (
        MODELS[model],
        replace(STAGE, method=method).with_batch(size=sequences),
        replace(COMPUTE, remat=remat),
    )


def compiled_memory(
    name: str, method: str, sizes: MeshSizes, sequences: int, remat: str
) -> dict[str, int]:
    """Bytes on each device of the arguments and of the temporaries of a real step, compiled and not
    run.
    """
    model, stage, compute = settings(name, method, sequences, remat)
    mesh = sharding.make_mesh(
        MeshConfig(*sizes), devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    )

    def placed(tree):
        in_memory = {
            p: jax.ShapeDtypeStruct(sharding.padded_shape(p, x.shape), x.dtype)
            for p, x in paths.flatten(tree).items()
        }
        return lying(paths.unflatten(in_memory))

    def lying(tree):
        where = sharding.shardings(tree, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
        )

    trained, frozen = map(placed, memory.shapes(model, stage))
    optimizer = make_optimizer(stage, paths.label_tree(rules_for(stage.method), trained))
    state = lying(jax.eval_shape(lambda params: init_state(params, optimizer), trained))
    together = loop.micro_batch("stage", stage, mesh)
    batch = jax.ShapeDtypeStruct(
        (sequences // together, together, stage.batch.sequence_length + 1),
        jnp.int32,
        sharding=jax.NamedSharding(mesh, jax.P(None, sharding.BATCH)),
    )
    step = make_train_step(
        make_loss(model, compute, loop.lora_spec(stage)), optimizer, jnp.float32, mesh
    )
    found = (
        step.lower(state, frozen, batch, jax.random.key(0), schedule_of(stage))
        .compile()
        .memory_analysis()
    )
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_NUM_CPU_DEVICES": "8",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_planned_memory_matches_compiled_steps(compiled, case):
    name, method, mesh, sequences, remat = CASES[case]
    model, stage, compute = settings(name, method, sequences, remat)
    kinds = list(memory.stage_memory(setup_of(stage, compute, model, mesh, fused=False)).values())
    state, rest = sum(kinds[:3]), sum(kinds[3:])
    # Besides the state: a batch of token ids, a key and counters.
    batch = 4 * sequences // (mesh[0] * mesh[1]) * (stage.batch.sequence_length + 1)
    assert 0 <= compiled[case]["arguments"] - state - batch < 1000
    assert 0.9 < rest / compiled[case]["temporaries"] < 1.6


# --- Parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["embedding", "lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_planned_parameters_match_real_trees(name, method, tied):
    model = replace((LLAMA if name == "llama" else NEOX), tie_word_embeddings=tied)
    stage = replace(STAGE, method=method, lora=LoraConfig(rank=3))

    def make(key):
        params = init_params(model, key)
        spec = loop.lora_spec(stage)
        return add_lora(params, spec, key) if spec else params

    params = jax.eval_shape(make, jax.random.key(0))
    trained, frozen = memory.shapes(model, stage)
    leaves = paths.flatten(params)
    for tree, trains in ((trained, True), (frozen, False)):
        real = {
            path: leaf.shape for path, leaf in leaves.items() if loop.trains(stage, path) == trains
        }
        assert {path: leaf.shape for path, leaf in paths.flatten(tree).items()} == real
        assert memory.parameters(tree) == sum(leaves[path].size for path in real)


def test_planned_elements_per_device_match_placed_arrays():
    params = init_params(LLAMA, jax.random.key(0))
    placed = jax.tree.leaves(
        sharding.place(params, sharding.make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1]))
    )
    assert memory.elements(memory.shapes(LLAMA, STAGE)[0], (1, 1, 1)) == sum(
        leaf.size for leaf in placed
    )


# --- The whole plan -----------------------------------------------------------------------------


def model_of(name, rows):
    """A shape that the benchmark measures, with a vocabulary of so many rows."""
    return families.config_from_hf(train_throughput.MODELS[name] | {"vocab_size": rows})


PYTHIA_1B = model_of("pythia-1b", 151_936)
CONFIG = Config(
    alignment=AlignmentConfig(method="composed"),
    stage1=StageConfig(
        method="embedding", start_offset=0, steps=100, batch=BatchConfig(size=64, per_device=4)
    ),
    stage2=StageConfig(method="full", steps=200, batch=BatchConfig(size=64, per_device=4)),
    compute=ComputeConfig(remat="dots"),
)


def planned(
    config=CONFIG,
    devices=1,
    device_memory="80GB",
    speed=Speed(),  # noqa: B008
    disk_free=1e15,
    text=5_000_000_000,
):
    return make_plan(
        config, PYTHIA_1B, Machine.of(devices, device_memory), speed, text, 2, disk_free
    )


def setup_of(stage, compute, model=PYTHIA_1B, mesh=(1, 1, 1), device_memory=math.inf, fused=True):
    return memory.Setup(
        "stage", stage, compute, model, mesh, Machine(1, device_memory, fused_attention=fused)
    )


ON_GPUS = [
    # model, rows, method, mesh, sequences of 2,048 tokens, remat, GiB at most in use on an H200
    # (docs/results/throughput.md)
    ("pythia-1b", 151_936, "embedding", (1, 1, 1), 8, "dots", 22.99),
    ("pythia-1b", 151_936, "full", (1, 1, 1), 8, "dots", 33.09),
    ("pythia-1b", 151_936, "full", (1, 1, 1), 8, "layer", 25.01),
    ("pythia-1b", 262_144, "full", (1, 1, 1), 32, "dots", 70.52),
    ("pythia-1b", 151_936, "embedding", (1, 1, 1), 32, "dots", 50.72),
    ("pythia-1b", 151_936, "embedding", (1, 1, 1), 64, "dots", 88.23),
    ("pythia-1b", 151_936, "full", (1, 1, 1), 16, "dots", 42.35),
    ("pythia-1b", 151_936, "full", (1, 1, 1), 32, "dots", 60.86),
    ("pythia-1b", 151_936, "embedding", (1, 2, 1), 16, "dots", 20.74),
    ("pythia-1b", 151_936, "full", (1, 2, 1), 16, "dots", 24.87),
    ("pythia-1b", 151_936, "full", (1, 2, 1), 8, "dots", 20.29),
    ("pythia-1b", 151_936, "full", (2, 1, 1), 16, "dots", 35.91),
    ("pythia-1b", 151_936, "full", (1, 1, 2), 16, "dots", 21.98),
    ("pythia-1b", 151_936, "full", (1, 2, 1), 16, "attention", 20.87),
    ("pythia-1b", 151_936, "full", (1, 2, 1), 16, "layer", 17.18),
    ("llama-8b", 151_936, "full", (1, 2, 1), 8, "layer", 65.69),
    ("pythia-1b", 151_936, "embedding", (1, 4, 1), 32, "dots", 18.54),
    ("pythia-1b", 151_936, "full", (1, 4, 1), 32, "dots", 20.58),
    ("pythia-1b", 151_936, "full", (4, 1, 1), 32, "dots", 35.92),
    ("pythia-1b", 151_936, "lora", (1, 1, 1), 8, "dots", 24.64),
    ("llama-8b", 128_256, "full", (1, 4, 1), 16, "layer", 36.49),
    ("llama-8b", 128_256, "lora", (1, 4, 1), 16, "dots", 38.18),
]


@pytest.mark.parametrize("model, rows, method, mesh, sequences, remat, found", ON_GPUS)
def test_planned_memory_matches_measurements_on_gpus(
    model, rows, method, mesh, sequences, remat, found
):
    held = sequences // (mesh[0] * mesh[1])
    stage = StageConfig(
        method=method, batch=BatchConfig(size=sequences, per_device=held, sequence_length=2048)
    )
    kinds = memory.stage_memory(
        setup_of(stage, ComputeConfig(remat=remat), model_of(model, rows), mesh)
    )
    assert 0.98 < sum(kinds.values()) / 2**30 / found < 1.25


def test_plan_of_a_model_that_fits_states_sizes_without_warning():
    found = planned(devices=8)
    one, two = found.stages
    # Pythia-1B has 805,736,448 parameters beside its two matrices.
    assert (one.trained, one.frozen) == (2 * 151_936 * 2048, 805_736_448)
    assert (two.trained, two.frozen) == (one.trained + one.frozen, 0)
    assert (one.tokens, two.tokens) == (100 * 64 * 2048, 200 * 64 * 2048)
    assert found.mesh == (8, 1, 1) and one.accumulation == 2 and not found.warnings
    assert one.memory["Adam's two moments (float32)"] == 8 * (-(-151_936 // 256) * 256) * 2 * 2048
    assert found.disk["init"] == 4 * two.trained and found.disk["export"] == 2 * two.trained
    assert found.disk["stage2"] == 3 * 12 * two.trained, (
        "two checkpoints are kept, and a third is on its way"
    )
    for words in (
        "stage1 (embedding): 622M parameters train",
        "806M are frozen",
        "13.1M tokens",
        "time unknown",
        "disk",
    ):
        assert words in found.table(), found.table()


def test_plan_includes_validation():
    fast = Speed.of(1e5, "", 0.4, "")
    plain = planned(speed=fast)
    stage = replace(CONFIG.stage2, validation_every=30, validation_sequences=5)
    found = planned(replace(CONFIG, stage2=stage), speed=fast)
    assert "  7 validations on at most 5 held-out sequences" in found.table()
    assert "validation" not in plain.table()
    assert found.disk["stage2"] == plain.disk["stage2"] / 3 * 4  # the best one stays
    one, two = (plan.stages[1] for plan in (plain, found))
    assert two.memory["held-out sequences (int32)"] == 5 * 2049 * 4
    # A forward pass takes a third of a training step's operations where all parameters train.
    assert two.seconds == pytest.approx(one.seconds + 7 * 5 * 2048 / 3 / 1e5, rel=1e-6)
    assert found.stages[0] == plain.stages[0]


def test_plan_suggests_settings_that_fit():
    (warning,) = [w for w in planned(device_memory="24GB").warnings if w.startswith("stage2")]
    assert "it would with stage2.method=lora (" in warning, "the state alone is too large"
    fixed = replace(CONFIG, compute=replace(CONFIG.compute, loss_chunk=4096))
    warnings = planned(fixed, device_memory="24GB").warnings
    (warning,) = [w for w in warnings if w.startswith("stage2")]
    assert "stage2.method=lora together" in warning, "adapters alone do not do"
    settings = dict(
        part.split("=")
        for part in warning.partition("it would with ")[2].split(" together")[0].split(", ")
    )
    lean = replace(
        CONFIG,
        stage2=replace(CONFIG.stage2, method="lora").with_batch(
            per_device=int(settings["stage2.batch.per_device"])
        ),
        compute=replace(
            CONFIG.compute,
            remat=settings["compute.remat"],
            loss_chunk=int(settings["compute.loss_chunk"]),
        ),
    )
    assert not [w for w in planned(lean, device_memory="24GB").warnings if w.startswith("stage2")]
    assert "no settings change that" in planned(device_memory="4GB").table()
    # More sequences than fit: fewer at once, or less kept of each.
    crowded = replace(CONFIG, stage1=CONFIG.stage1.with_batch(per_device=64))
    (warning,) = [w for w in planned(crowded).warnings if w.startswith("stage1")]
    assert "stage1.batch.per_device=" in warning and "compute.remat=" in warning
    at_once = int(warning.partition("stage1.batch.per_device=")[2].split()[0])
    fits = replace(CONFIG, stage1=CONFIG.stage1.with_batch(per_device=at_once))
    assert not [w for w in planned(fits).warnings if w.startswith("stage1")]
    copies = replace(CONFIG, mesh=MeshConfig(data=8))
    assert "mesh.fsdp=" in planned(copies, devices=8, device_memory="24GB").table()
    assert planned(devices=8, device_memory="24GB").mesh[1] > 1, (
        "chosen so, where the mesh is left open"
    )


def test_auto_remat_saves_the_most_that_fits():
    auto = replace(CONFIG, compute=ComputeConfig())
    kept = lambda found: [kind for stage in found.stages for kind in stage.memory if "kept" in kind]  # noqa: E731
    assert kept(planned(auto)) == ["activations kept (remat=dots)"] * 2
    crowded = replace(
        auto,
        stage1=CONFIG.stage1.with_batch(per_device=16),
        stage2=replace(CONFIG.stage2, steps=0),
    )
    needs = [
        planned(replace(crowded, compute=ComputeConfig(remat=p))).stages[0].total
        for p in remat.POLICIES
    ]
    assert needs[0] > needs[1] > needs[2]
    for policy, enough in zip(remat.POLICIES, needs):
        assert kept(planned(crowded, device_memory=f"{enough / machine.USABLE + 1:.0f}")) == [
            f"activations kept (remat={policy})"
        ]
    found = planned(crowded, device_memory=f"{needs[2] / 2:.0f}")
    assert kept(found) == ["activations kept (remat=layer)"] and found.warnings


def chosen(device_memory, method="full", sequences=64, length=2048, remat="auto", fused=True):
    """Sequences at once and policy, and whether so much fits by the estimate."""
    stage = StageConfig(method=method, batch=BatchConfig(size=sequences, sequence_length=length))
    setup = resolve.resolve(
        setup_of(stage, ComputeConfig(remat=remat), device_memory=device_memory, fused=fused)
    )
    return (
        setup.stage.batch.per_device,
        setup.compute.remat,
        needed(setup.stage, setup.compute) <= device_memory,
    )


def needed(stage, compute):
    return memory.needed(setup_of(stage, compute))


@pytest.mark.parametrize("method", ["embedding", "lora", "full"])
def test_auto_batch_is_the_largest_that_fits_and_gains_speed(method):
    assert chosen(130e9, method) == (32, "dots", True), "65,536 tokens: more are no faster"
    assert chosen(130e9, method, sequences=48)[0] == 24, "rounds of as many make a step"
    assert chosen(130e9, method, sequences=2, length=131_072)[0] == 1, "one sequence is the least"
    assert chosen(math.inf, method, fused=False)[0] == 2, "4,096 tokens on a CPU"
    assert chosen(10e9, method) == (1, "layer", False), (
        "the least there is, of which the plan then warns"
    )
    for device_memory in (45e9, 60e9, 74e9):
        n, policy, fits = chosen(device_memory, method)
        more = StageConfig(method=method, batch=BatchConfig(size=64, per_device=2 * n))
        assert (
            fits and needed(more, ComputeConfig(remat=policy)) > resolve.AUTO_MEMORY * device_memory
        ) or n == 32


def test_auto_reduces_the_batch_before_recomputing_more():
    choices = [chosen(device_memory * 1e9)[:2] for device_memory in (40, 45, 60, 74, 130)]
    assert choices == [(4, "attention"), (4, "dots"), (8, "dots"), (16, "dots"), (32, "dots")]
    assert resolve.SATURATING_TOKENS == 4 * 2048


def test_plan_counts_attention_logits_without_a_fused_kernel():
    capped = replace(PYTHIA_1B, attention_softcap=50.0)
    here = Machine(1, 80e9, "NVIDIA H100 80GB HBM3")
    with pytest.MonkeyPatch.context() as patch:
        for capability, fuses in (("9.0", True), ("8.0", False)):  # heads of 256
            hopper = type("Device", (), {"platform": "gpu", "compute_capability": capability})
            patch.setattr(jax, "devices", lambda device=hopper: [device])
            assert here.fuses(PYTHIA_1B, ComputeConfig()) == fuses
            assert not here.fuses(capped, ComputeConfig()) and not here.fuses(
                PYTHIA_1B, ComputeConfig(dtype="float32")
            )
    there = Machine(1, 100e9)
    assert there.fuses(PYTHIA_1B, ComputeConfig()) and not there.fuses(capped, ComputeConfig())
    many = replace(PYTHIA_1B, num_heads=64, num_kv_heads=64, head_dim=32)
    setups = [
        setup_of(StageConfig(method="full"), ComputeConfig(), model, device_memory=100e9)
        for model in (many, replace(many, attention_softcap=50.0))
    ]
    held = [resolve.resolve(setup).stage.batch.per_device for setup in setups]
    assert held == [32, 16]


def test_auto_keeps_explicit_settings():
    assert chosen(130e9, remat="layer")[:2] == (32, "layer")
    stage, compute = CONFIG.stage1.with_batch(per_device=2), ComputeConfig(remat="attention")
    setup = setup_of(stage, compute, device_memory=130e9)
    assert resolve.resolve(setup) == setup.with_compute(loss_chunk=4096)
    with pytest.raises(ValueError, match=r"batch\.per_device=auto is not resolved"):
        memory.stage_memory(setup_of(StageConfig(), compute))


def test_plan_checks_disk_and_batch_size():
    assert "--workdir" in planned(disk_free=1e9).warnings[-1]
    with pytest.raises(
        UserError, match=r"stage1.batch.size=64 is not divisible by the 7 .* multiple of 7"
    ):
        planned(replace(CONFIG, mesh=MeshConfig(data=7)), devices=7)


def test_time_follows_given_measured_or_assumed_speed(tmp_path):
    tokens = 100 * 64 * 2048
    assert planned(speed=Speed.of(1e5, "", 0.4, "")).stages[0].seconds == pytest.approx(
        tokens / 1e5
    )
    rows = [{"method": "embedding", "tokens_per_second": 4e4, "devices": 2}]
    (tmp_path / "throughput.json").write_text(json.dumps(rows))
    measured = planned(devices=4, speed=Speed.of(0, str(tmp_path / "throughput.json"), 0.4, ""))
    assert (
        measured.stages[0].seconds == pytest.approx(tokens / (4 * 2e4))
        and measured.stages[1].seconds is None
    )
    # A speed in float8 is that of stages in float8 alone.
    rows += [{**rows[0], "matmul": "float8", "tokens_per_second": 6e4}]
    rows += [{**rows[0], "method": "lora", "frozen": "nf4"}]
    (tmp_path / "throughput.json").write_text(json.dumps(rows))
    in_float8 = replace(CONFIG, compute=replace(CONFIG.compute, matmul="float8"))
    for config, rate in ((CONFIG, 2e4), (in_float8, 3e4)):
        speed = Speed.of(0, str(tmp_path / "throughput.json"), 0.4, "")
        found = planned(config, devices=4, speed=speed).stages[0].seconds
        assert found == pytest.approx(tokens / (4 * rate))
        assert set(speed.measured) == {"embedding", "embedding, float8", "lora, nf4"}
    assumed = planned(speed=Speed.of(0, "", 0.5, "1 PFLOPS")).stages[1]
    assert assumed.seconds == pytest.approx(
        assumed.tokens * flops_per_token(PYTHIA_1B, CONFIG.stage2) / 5e14
    )
    assert "assuming 50%" in assumed.speed and "not measured" in assumed.speed
    with pytest.raises(UserError, match="--throughput"):
        Speed.of(0, str(tmp_path / "none.json"), 0.4, "")


def test_plan_includes_initialisation():
    """4 for each parameter of a layer and 6 for each of the head where rows are tuned; 2 where text
    is only read, without the head.
    """
    layers, head, attention = 16 * 12 * 2048**2, 151_936 * 2048, 4 * 16 * 2048 * 512
    found = planned(speed=Speed.of(0, "", 0.5, "1 PFLOPS")).init
    assert found and (found.read, found.tuned) == (20_000_000, 4_000_000)
    operations = 4e6 * (4 * layers + 6 * head + 3 * attention) + 20e6 * (2 * layers + attention)
    assert found.seconds == pytest.approx(operations / 5e14)
    # Text of another language than the source's may be a token a byte to it: what it reads is said
    # as the most.
    little = planned(text=8_000_000).init
    assert little and (little.read, little.tuned) == (8_000_000, 2_000_000)
    short = replace(CONFIG, initialization=InitializationConfig(tokens=5_000, tuning=0))
    assert planned(short).init == (5_000, 0, None, "", False)
    table = planned(short).table()
    assert "reads 5000 tokens at most\n" in table and "time unknown" in table
    for without in (
        replace(CONFIG, initialization=InitializationConfig(tokens=0)),
        replace(CONFIG, alignment=AlignmentConfig(method="pieces")),
    ):
        assert planned(without).init is None and "init:" not in planned(without).table()


def test_flops_follow_the_usual_formula():
    """6 for each parameter of a product that trains, 4 for each that does not, 12 L N H T for
    attention.
    """
    matrices = 16 * 12 * 2048**2
    head, attention = 151_936 * 2048, 12 * 16 * 2048 * 2048
    full = flops_per_token(PYTHIA_1B, CONFIG.stage2)
    assert full == 6 * (matrices + head) + attention
    assert flops_per_token(PYTHIA_1B, CONFIG.stage1) == 4 * matrices + 6 * head + attention


@pytest.mark.parametrize("text", ["80", "80GB", "80 gb", "74.5GiB"])
def test_memory_flag_takes_a_number_with_a_unit(text):
    expected = {"80": 80.0, "74.5GiB": 74.5 * 2**30}.get(text, 80e9)
    assert Machine.of(8, text).memory == pytest.approx(machine.USABLE * expected)


@pytest.mark.parametrize("text", ["much", "80XB", "1.2.3GB"])
def test_invalid_memory_flag_is_refused(text):
    with pytest.raises(UserError, match="--device-memory"):
        Machine.of(8, text)


def test_plan_command_writes_nothing(tmp_path, capsys):
    flags = ["--plan_devices=4", "--plan_device_memory=16GB", "--plan_tokens_per_second=1e6"]
    assert main(["main", "--plan", "--workdir", str(tmp_path / "run"), *flags]) == 0
    printed = capsys.readouterr().out
    assert (
        "4 devices, mesh data=4" in printed
        and "stage2 (full)" in printed
        and "warning" not in printed
    )
    assert not list(tmp_path.iterdir())
    assert main(["main", "--plan", "--plan_devices=1", "--plan_device_memory=5MB"]) == 0
    assert "warning: stage1 will not fit" in capsys.readouterr().out


def test_plan_uses_the_devices_of_this_machine(monkeypatch, capsys):
    """JAX is prepared, which preallocates more memory; for `--plan_devices` it is not started."""
    prepared = []
    monkeypatch.setattr(compiling, "prepare", lambda: prepared.append(True))
    assert main(["main", "--plan", "--plan_devices=1"]) == 0 and not prepared
    assert main(["main", "--plan"]) == 0 and prepared
    assert "1 device" in capsys.readouterr().out


if __name__ == "__main__":
    print(json.dumps([compiled_memory(*case) for case in CASES]))
