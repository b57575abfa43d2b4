"""Reading and writing of Hugging Face folders, and refused ones."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.errors import UserError
from tokalign_jax.models import families, hub, huggingface
from tokalign_jax.models.transformer import logits
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import paths

TOKENIZER = tiny_tokenizer(260, TEXTS)
BOTH = pytest.mark.parametrize("family", ["llama", "gpt_neox"])
run_logits = jax.jit(logits, static_argnums=0)


def _folder(tmp_path: Path, family: str = "llama", **settings) -> Path:
    return tiny_model_folder(tmp_path / "source", family, 270, tokenizer=TOKENIZER, **settings)


def _load(folder: Path):
    config, raw = hub.load_config(folder)
    huggingface.check_weights(folder, config)
    return config, raw, huggingface.load_params(folder, config)


def _weights(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: leaf
        for file in sorted(folder.glob("*.safetensors"))
        for name, leaf in load_file(file).items()
    }


def _edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- Reading ------------------------------------------------------------------------------------


@BOTH
def test_sharded_checkpoint_equals_a_single_file(family, tmp_path):
    _, _, one = _load(tiny_model_folder(tmp_path / "one", family, tokenizer=TOKENIZER))
    folder = tiny_model_folder(
        tmp_path / "many", family, tokenizer=TOKENIZER, max_shard_size="30KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    _, _, many = _load(folder)
    jax.tree.map(np.testing.assert_array_equal, one, many)


@BOTH
def test_stored_types_are_kept(family, tmp_path):
    folder = _folder(tmp_path, family, dtype="bfloat16")
    config, _, params = _load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert set(huggingface.stored_dtypes(folder).values()) == {np.dtype(jnp.bfloat16)}
    exact = huggingface.load_params(folder, config, jnp.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b), params, exact
    )


def test_older_config_spellings_are_equivalent(tmp_path):
    for family, old, new in (
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 500, "rotary_pct": 0.5},
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
    ):
        folder = tiny_model_folder(tmp_path / family, family, tokenizer=TOKENIZER, **new)
        raw = json.loads((folder / "config.json").read_text())
        without = {key: value for key, value in raw.items() if key != "rope_parameters"}
        expected = families.config_from_hf(raw)
        assert expected.layer_kinds[0].rope.theta == 500.0
        assert families.config_from_hf(without | old) == expected


@pytest.mark.parametrize("mesh", [None, sharding.make_mesh()], ids=["host", "mesh"])
def test_tensors_of_several_types_and_wide_ones_are_read_as_float32(mesh, tmp_path):
    """Float64 is rounded: there is no other place on an accelerator."""
    folder = _folder(tmp_path)
    config, _, before = _load(folder)
    weights, rounded = _weights(folder), {"0": jnp.bfloat16, "1": np.float16}
    weights = {
        k: v.astype(rounded[n[1]] if (n := re.search(r"layers\.(\d)\.mlp", k)) else np.float64)
        for k, v in weights.items()
    }
    save_file(weights, folder / "model.safetensors")
    after = paths.flatten(huggingface.load_params(folder, config, mesh=mesh))
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype(jnp.float32)}
    for path, leaf in paths.flatten(before).items():
        if "/mlp/" in path:
            leaf = jnp.stack(
                [leaf[0].astype(jnp.bfloat16), leaf[1].astype(np.float16)], dtype=jnp.float32
            )
        np.testing.assert_array_equal(np.asarray(after[path])[: len(leaf)], leaf)


def test_old_checkpoints_may_hold_buffers_and_a_copy_of_a_tied_embedding(tmp_path):
    folder = _folder(tmp_path, "gpt_neox", tied=True)
    weights = _weights(folder)
    buffers = {
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 8, 8), np.bool_),
        "gpt_neox.layers.1.attention.masked_bias": np.full((1,), -1e9, np.float32),
    }
    copy = {"embed_out.weight": weights["gpt_neox.embed_in.weight"]}
    _, _, before = _load(folder)
    save_file({**weights, **buffers, **copy}, folder / "model.safetensors")
    _, _, after = _load(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    save_file(
        {**weights, "embed_out.weight": copy["embed_out.weight"] + 1}, folder / "model.safetensors"
    )
    config, _ = hub.load_config(folder)
    for read in (huggingface.check_weights, huggingface.load_params):
        with pytest.raises(UserError, match=r"embed_out\.weight.*differs"):
            read(folder, config)


def test_checkpoint_of_the_base_model_lacks_the_name_prefix(tmp_path):
    for family, first in (("llama", "model."), ("gpt_neox", "gpt_neox.")):
        folder = _folder(tmp_path / family, family, tied=True)
        weights, (_, _, before) = _weights(folder), _load(folder)
        bare = {name.removeprefix(first): tensor for name, tensor in weights.items()}
        assert not set(bare) & set(weights)
        save_file(bare, folder / "model.safetensors")
        _, _, after = _load(folder)
        jax.tree.map(np.testing.assert_array_equal, before, after)


@BOTH
def test_tied_matrix_may_be_stored_under_the_heads_name(family, tmp_path):
    folder = _folder(tmp_path, family, tied=True)
    weights, (_, _, before) = _weights(folder), _load(folder)
    names = {
        "model.embed_tokens.weight": "lm_head.weight",
        "gpt_neox.embed_in.weight": "embed_out.weight",
    }
    save_file(
        {names.get(name, name): tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
    )
    config, raw, after = _load(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    huggingface.save_checkpoint(
        tmp_path / "out", after, config, raw, TOKENIZER, source_folder=folder
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight
    np.testing.assert_array_equal(
        loaded.detach().numpy(), np.asarray(before["embed_tokens"]["embedding"])
    )


def test_missing_head_falls_back_to_the_embedding(tmp_path):
    folder = _folder(tmp_path, tied=True)
    _edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match='lacks "tie_word_embeddings": true'):
        _load(folder)


# --- Writing ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_equals_the_loaded_one(family, tied, tmp_path):
    source = _folder(
        tmp_path, family, tied=tied, dtype="bfloat16", max_shard_size="40KB", attention_bias=True
    )
    config, raw, params = _load(source)
    target = tmp_path / "target"
    huggingface.save_checkpoint(
        target, params, config, raw, TOKENIZER, source_folder=source, max_shard_bytes=40_000
    )
    before, after = _weights(source), _weights(target)
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.dtype, v.shape) for k, v in after.items()
    }
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight)
    index = json.loads((target / huggingface.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in after.values())
    assert all((target / file).stat().st_size < 50_000 for file in index["weight_map"].values())
    jax.tree.map(np.testing.assert_array_equal, _load(target)[2], params)


@BOTH
def test_new_vocabulary_loads_in_transformers(family, tmp_path):
    source = _folder(tmp_path, family)
    _edit_json(source / "config.json", tokenizer_class="GPTNeoXTokenizer")
    _edit_json(
        source / "generation_config.json",
        max_new_tokens=7,
        suppress_tokens=[3],
        eos_token_id=[0, 5],
    )
    config, raw, params = _load(source)
    tokenizer = tiny_tokenizer(330, TEXTS, "metaspace")
    tokenizer.pad_token = "<unk>"
    rows = np.random.default_rng(0).normal(size=(340, config.hidden_size)).astype(np.float32)
    params["embed_tokens"]["embedding"], params["lm_head"]["kernel"] = (
        jnp.asarray(rows),
        jnp.asarray(rows[::-1]),
    )
    config = dataclasses.replace(config, vocab_size=340)
    target = tmp_path / "target"
    huggingface.save_checkpoint(target, params, config, raw, tokenizer, source_folder=source)

    model, loaded = (
        AutoModelForCausalLM.from_pretrained(target).eval(),
        AutoTokenizer.from_pretrained(target),
    )
    assert model.dtype == torch.float32
    assert loaded.get_vocab() == tokenizer.get_vocab()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert {name: getattr(model.config, name) for name in ids} == ids
    # The source's second stop token is one of text.
    stop = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(5)
    ids["eos_token_id"] = [2, tokenizer.convert_tokens_to_ids(f"<0x{ord(stop):02X}>")]
    assert {name: getattr(model.generation_config, name) for name in ids} == ids
    assert model.config.vocab_size == 340
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.suppress_tokens is None
    tokens = loaded(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).logits.numpy()
        generated = model.generate(**tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == tokens["input_ids"].shape[1] + 5
    ours = run_logits(config, params, tokens["input_ids"].numpy().astype(np.int32))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_export_dtype_can_be_chosen(tmp_path):
    source = _folder(tmp_path)
    config, raw, params = _load(source)
    huggingface.save_checkpoint(
        tmp_path / "target", params, config, raw, TOKENIZER, dtypes="bfloat16"
    )
    assert {weight.dtype for weight in _weights(tmp_path / "target").values()} == {
        np.dtype(jnp.bfloat16)
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == torch.bfloat16
    both = {
        **raw,
        "dtype": "float32",
        "torch_dtype": "float16",
    }  # as older files of a multimodal model end up
    huggingface.save_checkpoint(
        tmp_path / "old", params, config, both, TOKENIZER, dtypes="bfloat16"
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype="auto").dtype == torch.bfloat16
    )
    with pytest.raises(UserError, match="not empty"):
        huggingface.save_checkpoint(
            tmp_path / "target", params, config, raw, TOKENIZER, dtypes="bfloat16"
        )
    with pytest.raises(UserError, match=r"280 tokens.*270 rows"):
        tokenizer = tiny_tokenizer(280, [*TEXTS, *map(str, range(1000))])
        huggingface.save_checkpoint(
            tmp_path / "other", params, config, raw, tokenizer, dtypes="float32"
        )


# --- Refused checkpoints ------------------------------------------------------------------------


def test_errors_name_damaged_files(tmp_path):
    folder = _folder(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b""):
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"model\.safetensors' is not a complete safetensors file"
        ):
            _load(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        _load(folder)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UserError, match=r"config\.json' is not valid JSON"):
        _load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        _load(folder)


def test_error_names_a_missing_shard(tmp_path):
    folder = _folder(tmp_path, max_shard_size="30KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}'.*is missing"):
        _load(folder)


def test_errors_name_weights_of_the_wrong_shape(tmp_path):
    folder = _folder(tmp_path)
    weights = _weights(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        f"no weight '{name}'": {k: v for k, v in weights.items() if k != name},
        r"does not have: model\.layers\.0\.self_attn\.q_norm\.weight": weights
        | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)},
        f"'{name}' has shape .*47, 32.* requires .*48, 32": weights | {name: weights[name][1:]},
        f"'{name}' is stored as I8": weights | {name: weights[name].astype(np.int8)},
    }
    config, _ = hub.load_config(folder)
    for message, stored in cases.items():
        save_file(stored, folder / "model.safetensors")
        for read in (huggingface.check_weights, huggingface.load_params):
            with pytest.raises(UserError, match=message):
                read(folder, config)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ("llama", {"hidden_act": "tanh"}, "'hidden_act' to 'tanh'"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}},
            "'rope_parameters'.*mrope",
        ),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "xpos"}},
            "'rope_scaling'.*xpos",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor'",
        ),
        ("llama", {"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
        ("gpt_neox", {"rope_parameters": None}, "has no 'rotary_pct'"),
        ("gpt_neox", {"hidden_act": "swiglu"}, "'hidden_act' to 'swiglu'"),
    ],
)
def test_errors_name_what_is_not_implemented(family, changes, message, tmp_path):
    folder = _folder(tmp_path, family)
    _edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        hub.load_config(folder)


# --- Non-finite weights -------------------------------------------------------------------------


def _spoil(folder: Path, name: str, index, value: float) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][index] = value
            save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_rows_are_found(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(huggingface, "_BLOCK_BYTES", 5000)
    folder = _folder(tmp_path, dtype=dtype, max_shard_size="30KB")
    config, _ = hub.load_config(folder)
    assert all(not len(rows) for rows in huggingface.non_finite_rows(folder, config).values())
    _spoil(folder, "model.embed_tokens.weight", (269, 3), value)
    _spoil(folder, "lm_head.weight", (slice(7, 9), slice(None)), value)
    found = huggingface.non_finite_rows(folder, config)
    assert {path: rows.tolist() for path, rows in found.items()} == {
        "embed_tokens/embedding": [269],
        "lm_head/kernel": [7, 8],
    }
    _spoil(folder, "model.layers.1.mlp.up_proj.weight", (2, 2), value)
    _spoil(folder, "model.norm.weight", 0, value)
    with pytest.raises(
        UserError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight.*model\.norm\.weight|model\.norm.*up_proj",
    ):
        huggingface.non_finite_rows(folder, config)


def test_tied_model_may_store_a_non_finite_row_twice(tmp_path):
    folder = _folder(tmp_path, tied=True)
    _spoil(folder, "model.embed_tokens.weight", 5, np.nan)
    tensors = load_file(folder / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})
    _load(folder)
    copy[6] = 0
    save_file(tensors | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="differs from the input embedding"):
        _load(folder)
