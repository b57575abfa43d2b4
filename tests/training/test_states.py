"""Models after training stages: bit-exact exports, with less memory than training took."""

import functools
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tests.models import parity_cases
from tests.training.toys import LLAMA, STAGE
from tokalign_jax.config import LoraConfig, StageConfig
from tokalign_jax.models import hub, huggingface, lora, quantized
from tokalign_jax.models.transformer import abstract_params, init_params
from tokalign_jax.parallel import sharding
from tokalign_jax.training import loop, states
from tokalign_jax.training.checkpoints import Checkpoints, Position
from tokalign_jax.training.optimizer import make_optimizer, rules_for
from tokalign_jax.training.step import init_state
from tokalign_jax.utils import paths

EMBEDDING, FULL = (StageConfig(method=method, steps=3) for method in ("embedding", "full"))
LORA = StageConfig(method="lora", steps=3, lora=LoraConfig(rank=3, alpha=4.0))
"""A scale that is no power of two: fused multiply-adds would give other digits."""
MESH = sharding.make_mesh(devices=jax.devices()[:1])


def write_stage(folder, stage, model, seed):
    """A finished stage's last checkpoint, of random parameters; returns these by path."""
    shapes, _ = loop.split(stage, abstract_params(model, loop.lora_spec(stage)))
    random = np.random.default_rng(seed)
    arrays = {
        p: random.normal(size=x.shape).astype(np.float32) for p, x in paths.flatten(shapes).items()
    }
    params = sharding.place(paths.unflatten(arrays), MESH)
    state = init_state(
        params, make_optimizer(stage, paths.label_tree(rules_for(stage.method), params))
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(stage.steps, state, Position({}, 0, 1, ""))
    return arrays


def write_stages(folder, stages, model):
    """Folders and settings of finished stages, and what each has trained."""
    folders = [(folder / f"stage{i}", stage) for i, stage in enumerate(stages)]
    return folders, [write_stage(*place, model, i) for i, place in enumerate(folders)]


def merged_at_once(params, stages, trained):
    """The reference: whole trees in float32, one stage after the other."""
    leaves = paths.flatten(jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    for stage, arrays in zip(stages, trained):
        adapters = {p.removesuffix("/lora_a") for p in arrays if p.endswith("/lora_a")}
        leaves |= {path: x for path, x in arrays.items() if "/lora_" not in path}
        for name in adapters:
            a, b = jnp.asarray(arrays[f"{name}/lora_a"]), jnp.asarray(arrays[f"{name}/lora_b"])
            update = stage.lora.alpha / stage.lora.rank * jnp.matmul(a, b, precision="highest")
            leaves[f"{name}/kernel"] = np.asarray(jnp.asarray(leaves[f"{name}/kernel"]) + update)
    return paths.unflatten(leaves)


def source(family, folder):
    if family.startswith("qwen3_moe"):
        apart = family != "qwen3_moe, packed"
        parity_cases.model(parity_cases.cases_of("qwen3_moe")[0]).save_pretrained(
            folder, save_original_format=apart
        )
        parity_cases.TOKENIZER.save_pretrained(folder)
        return folder, parity_cases.TOKENIZER
    tokenizer = tiny_tokenizer(300, TEXTS)
    return tiny_model_folder(folder, family, tokenizer=tokenizer, dtype="bfloat16"), tokenizer


SEQUENCES = {
    "embedding, lora": (EMBEDDING, LORA),
    "full, lora, lora": (FULL, LORA, LORA),
    "lora, full": (LORA, FULL),
    "none trained": (replace(EMBEDDING, steps=0),),
}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe", "qwen3_moe, packed"])
@pytest.mark.parametrize("stages", SEQUENCES.values(), ids=SEQUENCES)
def test_export_equals_a_float32_merge_bit_for_bit(family, stages, tmp_path):
    """One tensor of each layer, fused projections, experts one by one and all in one tensor."""
    original, tokenizer = source(family, tmp_path / "source")
    model, raw = hub.load_config(original)
    base = tmp_path / "init"
    stored = huggingface.load_params(original, model)
    huggingface.save_checkpoint(
        base, stored, model, raw, tokenizer, dtypes="float32", source_folder=original
    )
    folders, trained = write_stages(tmp_path, [stage for stage in stages if stage.steps], model)

    read = states.reader(base, model, states.load_changes(model, folders, MESH))
    whole = merged_at_once(huggingface.load_params(base, model), stages, trained)
    for name, params in (("whole", whole), ("read", read)):
        out = tmp_path / name
        huggingface.save_checkpoint(
            out, params, model, raw, tokenizer, source_folder=original, max_shard_bytes=60_000
        )
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "read").iterdir()) and len(files) > 5
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "read" / name
        ).read_bytes(), name


@pytest.mark.parametrize("stages", SEQUENCES.values(), ids=SEQUENCES)
def test_evaluation_reads_the_export_in_the_compute_type(stages, tmp_path):
    """Weights that the compute type represents exactly are read as they would be exported."""
    folder, _ = source("llama", tmp_path / "source")
    model, _ = hub.load_config(folder)
    folders, trained = write_stages(tmp_path, [stage for stage in stages if stage.steps], model)
    changes = states.load_changes(model, folders, MESH)
    params = paths.flatten(
        states.assemble(folder, model, changes, states.inference_dtype("bfloat16"), MESH)
    )
    whole = paths.flatten(merged_at_once(huggingface.load_params(folder, model), stages, trained))
    rounded_twice = (
        stages == SEQUENCES["full, lora, lora"]
    )  # a trained kernel, then with its adapters
    assert params.keys() == whole.keys()
    for path, leaf in params.items():
        stored = "norm/" in path
        assert leaf.dtype == (jnp.bfloat16 if not stored or FULL not in stages else jnp.float32), (
            path
        )
        found, expected = np.asarray(leaf)[: len(whole[path])], whole[path].astype(leaf.dtype)
        if rounded_twice:
            np.testing.assert_allclose(
                found.astype(np.float32), expected.astype(np.float32), rtol=0.02, atol=0.02
            )
        else:
            np.testing.assert_array_equal(found, expected, err_msg=path)
    assert not changes.leaves and not changes.adapters


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe, packed"])
def test_a_stage_begins_with_quantized_merges_and_exports_none_of_it(family, kind, tmp_path):
    """Adapters of stages before are merged first; those of a stage with quantized weights are
    merged into the stored ones.
    """
    folder, _ = source(family, tmp_path / "source")
    model, _ = hub.load_config(folder)
    on_quantized = replace(LORA, lora=replace(LORA.lora, frozen=kind))
    folders, trained = write_stages(tmp_path, (FULL, LORA, on_quantized), model)
    load = functools.partial(states.load_changes, model, mesh=MESH)

    dtype = states.training_dtype(LORA, jnp.dtype("bfloat16"))
    before = states.assemble(folder, model, load(folders[:2]), dtype, MESH)
    expected = paths.flatten(quantized.quantize_tree(before, kind, MESH))
    found = paths.flatten(
        states.assemble(folder, model, load(folders[:2]), dtype, MESH, on_quantized.lora.frozen)
    )
    assert found.keys() == expected.keys()
    assert jax.tree.structure(found) == jax.tree.structure({p: expected[p] for p in found})
    for path, leaf in expected.items():
        for one, other in zip(jax.tree.leaves(found[path]), jax.tree.leaves(leaf)):
            np.testing.assert_array_equal(one, other, path)
    assert sum(isinstance(leaf, quantized.QuantizedKernel) for leaf in found.values()) >= 6

    read = states.reader(folder, model, load(folders))
    stages = FULL, LORA, on_quantized
    whole = merged_at_once(huggingface.load_params(folder, model), stages, trained)
    for path, leaf in paths.flatten(whole).items():
        if path.endswith("_proj/kernel"):
            np.testing.assert_array_equal(read(path, 0), leaf[0], path)


def test_overwritten_stages_are_not_read(tmp_path):
    model, read = LLAMA, []
    folders, trained = write_stages(tmp_path, (EMBEDDING, LORA, FULL, LORA), model)
    with pytest.MonkeyPatch.context() as patch:
        load = loop.load_trained
        patch.setattr(
            loop,
            "load_trained",
            lambda folder, *rest: (read.append(folder.name), load(folder, *rest))[1],
        )
        changes = states.load_changes(model, folders, MESH)
    assert read == ["stage2", "stage3"]
    np.testing.assert_array_equal(
        changes.leaves["lm_head/kernel"][: model.vocab_size], trained[3]["lm_head/kernel"]
    )
    path = "layers/attention/q_proj/kernel"
    np.testing.assert_array_equal(changes.leaves[path], trained[2][path])
    assert {len(adapters) for adapters in changes.adapters.values()} == {1}


def test_stage_starts_in_float32_only_where_it_trains(tmp_path):
    folder, _ = source("llama", tmp_path / "source")
    model, _ = hub.load_config(folder)
    folders, _ = write_stages(tmp_path, (FULL, LORA), model)
    changes = states.load_changes(model, folders, MESH)
    stage = replace(STAGE, method="embedding")
    params = states.assemble(
        folder, model, changes, states.training_dtype(stage, jnp.bfloat16), MESH
    )
    for path, leaf in paths.flatten(params).items():
        assert leaf.dtype == (jnp.float32 if sharding.is_vocabulary(path) else jnp.bfloat16), path


# --- Memory: Llama-3.1-8B with 151,669 rows and adapters of rank 64, all sizes divided by 16 or 8 ---

SMALL_8B = replace(
    LLAMA,
    vocab_size=9472,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=896,
    num_layers=4,
    layer_kinds=LLAMA.layer_kinds[:1] * 4,
)
ADAPTERS = StageConfig(method="lora", steps=3, lora=LoraConfig(rank=4))
LAYER = 4 * 256 * 896
"""Bytes of the largest matrix of a layer in float32."""


@pytest.fixture(scope="module")
def small_8b(tmp_path_factory):
    """Weights in float32, as in `init/`, and stages that trained adapters, embedding and head."""
    folder = tmp_path_factory.mktemp("small_8b")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    params = init_params(SMALL_8B, jax.random.key(0))
    huggingface.write_weights(folder, params, SMALL_8B, "float32", {}, 5_000_000_000)
    folders, _ = write_stages(folder, (EMBEDDING, ADAPTERS), SMALL_8B)
    return folder, folders


def parameters():
    """Numbers of trainable and of frozen parameters in the stage."""
    shapes = loop.split(ADAPTERS, abstract_params(SMALL_8B, loop.lora_spec(ADAPTERS)))
    return (sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in shapes)


class Peak:
    """The most bytes of new live arrays, looked at around each merge and each block read."""

    def __init__(self, patch):
        self.before, self.bytes = self._live(), 0
        for module, name in (
            (lora, "merged"),
            (lora, "_put"),
            (huggingface, "_from_bits"),
            (huggingface, "_update"),
        ):
            patch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, function):
        def call(*arguments):
            self.look()
            result = function(*arguments)
            self.look()
            return result

        return call

    def look(self):
        self.bytes = max(self.bytes, self._live() - self.before)

    @staticmethod
    def _live():
        buffers = {
            array.unsafe_buffer_pointer(): array.nbytes
            for array in jax.live_arrays()
            if array.nbytes
        }
        return sum(buffers.values())


def test_evaluation_holds_one_copy_of_the_model_in_the_compute_type(small_8b, monkeypatch):
    folder, folders = small_8b
    trained, frozen = parameters()
    peak = Peak(monkeypatch)
    changes = states.load_changes(SMALL_8B, folders, MESH)
    peak.look()
    params = states.assemble(folder, SMALL_8B, changes, states.inference_dtype("bfloat16"), MESH)
    peak.look()
    matrix = SMALL_8B.vocab_size * SMALL_8B.hidden_size
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    adapters, casting = 4 * (trained - 2 * matrix), 4 * trained + 2 * matrix
    assert model < 2.01 * (trained + frozen)
    assert peak.bytes <= max(model + adapters, casting) + 5 * LAYER
    assert peak.bytes < 16 * trained + 2 * frozen, (
        "what training has of parameters, gradients and moments"
    )


def test_export_holds_trained_parameters_and_one_tensor_in_memory(small_8b, monkeypatch, tmp_path):
    folder, folders = small_8b
    trained, frozen = parameters()
    peak = Peak(monkeypatch)
    changes = states.load_changes(SMALL_8B, folders, MESH)
    read = states.reader(folder, SMALL_8B, changes)
    monkeypatch.setattr(huggingface, "_BLOCK_BYTES", 1 << 18)
    tracemalloc.start()
    huggingface.write_weights(tmp_path, read, SMALL_8B, "bfloat16", {}, 5_000_000_000)
    _, on_host = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak.bytes <= 4 * trained + 6 * LAYER < 16 * trained + 2 * frozen
    assert on_host < 6 * LAYER, on_host
