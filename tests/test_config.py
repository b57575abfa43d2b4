"""Config files, overrides and refused values."""

import dataclasses
import math
import re
import runpy
from pathlib import Path

import pytest

from tokalign_jax import config_files
from tokalign_jax.config import (
    AFTER_PREVIOUS,
    REMOVED,
    RENAMED,
    Config,
    config_from_dict,
    config_to_dict,
    default_config,
    products_of,
    settings_of,
)
from tokalign_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {
    # name: (stage 1 rate, stage 2 rate, steps, method, sequences, batch, length, threshold, offset,
    # budget)
    "research": (6.4e-4, 5e-5, (2500, 2500), "full", 1024, 4, 2048, 0.3, 2_560_000, 5e9),
    "optimal": (2e-5, 5e-5, (2500, 2500), "lora", 64, 4, 2048, 0.4, 0.2, 5e9),
    "three_hour_eval": (5e-4, 5e-5, (600, 1400), "lora", 32, 2, 1024, 0.3, 0, 1e9),
}


def load(name: str) -> Config:
    return config_from_dict(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_their_documented_settings(name):
    rate1, rate2, steps, method, sequences, batch, length, threshold, offset, budget = RECIPES[name]
    config = load(name)
    assert (config.stage1.learning_rate, config.stage2.learning_rate) == (rate1, rate2)
    assert (config.stage1.steps, config.stage2.steps) == steps
    assert (config.stage1.method, config.stage2.method) == ("embedding", method)
    assert (config.stage2.start_offset, config.text.budget_bytes) == (offset, budget)
    assert config.alignment.similarity_threshold == threshold
    for stage in (config.stage1, config.stage2):
        assert (stage.batch.size, stage.batch.per_device, stage.batch.sequence_length) == (
            sequences,
            batch,
            length,
        )
        assert (stage.optimizer.weight_decay, stage.warmup_fraction) == (0.01, 0.03)
    if method == "lora":
        assert dataclasses.astuple(config.stage2.lora) == (64, 16.0, 0.1, "dtype")
    assert (
        config.alignment.vector_size,
        config.alignment.window,
        config.alignment.glove.iterations,
    ) == (
        300,
        15,
        15,
    )
    assert config.compute.dtype == "bfloat16"


def test_demo_uses_embedded_inputs_only():
    config = load("ultra_quick_demo")
    assert (config.source_model, config.target_tokenizer, config.corpus) == ("embedded",) * 3
    assert (config.compute.dtype, config.stage2.method) == ("float32", "full")
    assert config.stage2.start_offset == AFTER_PREVIOUS


def test_round_trip_and_partial_groups_keep_defaults():
    assert (
        config_from_dict(default_config()) == Config() == config_from_dict(config_to_dict(Config()))
    )
    partial = config_from_dict({"stage2": {"steps": 7}, "stage1": {"lora": {"rank": 3}}})
    assert (partial.stage2.steps, partial.stage2.method) == (7, Config().stage2.method)
    assert (partial.stage1.lora.rank, partial.stage1.start_offset) == (
        3,
        Config().stage1.start_offset,
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stage1": {"learning_rat": 1.0}}, ("stage1.learning_rat", "stage1.learning_rate")),
        ({"source": "x"}, ("'source'", "source_model")),
        ({"stage1": 3}, ("'stage1'", "group")),
        ({"stage1": {"steps": "many"}}, ("stage1.steps", "many", "int")),
        ({"stage1": {"steps": 1.5}}, ("stage1.steps", "1.5")),
        ({"stage2": {"method": "half"}}, ("stage2.method", "half", "lora")),
        ({"stage1": {"learning_rate": "2e-5"}}, ("stage1.learning_rate", "2e-5", "float")),
        ({"compute": {"remat": True}}, ("compute.remat", "layer")),
        ({"stage1": {"steps": -1}}, ("stage1.steps", "-1")),
        ({"stage1": {"batch": {"per_device": 0}}}, ("stage1.batch.per_device", "0")),
        (
            {"stage1": {"batch": {"per_device": "most"}}},
            ("stage1.batch.per_device", "most", "auto"),
        ),
        ({"text": {"held_out_fraction": 1.5}}, ("text.held_out_fraction", "1.5")),
        ({"stage2": {"lora": {"dropout": 1.0}}}, ("stage2.lora.dropout", "1.0")),
        ({"stage1": {"learning_rate": float("inf")}}, ("stage1.learning_rate", "inf", "finite")),
        ({"stage2": {"embedding_learning_rate": -1.0}}, ("stage2.embedding_learning_rate", "-1.0")),
        ({"stage1": {"optimizer": {"beta2": 1.0}}}, ("stage1.optimizer.beta2", "1.0")),
        ({"stage1": {"start_offset": -1}}, ("stage1.start_offset", "-1", "number of sequences")),
        ({"stage1": {"start_offset": 1.5}}, ("stage1.start_offset", "1.5", "below 1.0")),
        (
            {"stage2": {"start_offset": "after_prevous"}},
            ("stage2.start_offset", "after_prevous", AFTER_PREVIOUS),
        ),
        ({"seed": -1}, ("'seed'", "-1")),
        ({"evaluation": {"prompts": [["a"]]}}, ("evaluation.prompts", "string")),
        ({"corpus": (3, None)}, ("'corpus'", "string")),
        ({"stage1": {"learning_rate": 10**400}}, ("stage1.learning_rate", "finite")),
        ({"alignment": {"similarity_threshold": 7.0}}, ("alignment.similarity_threshold", "7.0")),
        ({"stage1": {"learning_rate": 1e300}}, ("stage1.learning_rate", "1e+300", "at most 10")),
        (
            {"stage2": {"embedding_learning_rate": 1e30}},
            ("stage2.embedding_learning_rate", "at most 10"),
        ),
        ({"stage2": {"lora": {"alpha": 1e200, "rank": 8}}}, ("stage2.lora.alpha", "1e+200")),
        ({"stage1": {"steps": 10**30}}, ("stage1.steps", "at most")),
        ({"stage1": {"start_offset": 10**30}}, ("stage1.start_offset", "number of sequences")),
        ({"compute": {"loss_chunk": 2**40}}, ("compute.loss_chunk", "at most")),
        ({"text": {"max_broken_share": -0.5}}, ("text.max_broken_share", "at least 0")),
    ],
)
def test_errors_name_bad_values(values, words):
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    for word in words:
        assert word in str(error.value)


def groups(kind=Config):
    """The dataclasses of a config."""
    yield kind
    for declared in dataclasses.fields(kind):
        if declared.default_factory is not dataclasses.MISSING:
            yield from groups(type(declared.default_factory()))


def test_every_number_has_bounds_that_include_its_default():
    numbers = 0
    for declared in (declared for group in groups() for declared in dataclasses.fields(group)):
        if isinstance(declared.default, bool) or not re.search(
            r"\b(int|float)\b", str(declared.type)
        ):
            continue
        if declared.name == "start_offset":  # of several kinds, each with bounds of its own
            continue
        low, high = declared.metadata["within"]
        assert math.isfinite(low) and math.isfinite(high), declared.name
        assert not isinstance(declared.default, int | float) or low <= declared.default <= high, (
            declared.name
        )
        numbers += 1
    assert numbers > 50


def test_integers_convert_to_floats_and_lists_to_tuples():
    config = config_from_dict({"stage1": {"learning_rate": 1}, "corpus": ["a", "b"]})
    assert isinstance(config.stage1.learning_rate, float) and config.corpus == ("a", "b")


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("stage1.weight_decay", "stage1.optimizer.weight_decay", 0.5),
        ("stage2.row_damping", "stage2.optimizer.row_damping", 0.0),
        ("stage3.checkpoint_every", "stage3.checkpoints.every", 7),
        ("stage2.keep_checkpoints", "stage2.checkpoints.keep", 9),
        ("alignment.iterations", "alignment.glove.iterations", 3),
        ("alignment.weight_power", "alignment.glove.alpha", 0.5),
    ],
)
def test_renamed_key_is_accepted_with_a_warning(old, new, value, tmp_path):
    def read(config):
        for key in new.split("."):
            config = getattr(config, key)
        return config

    group, key = old.split(".")
    warns = f"'{old}' is now '{new}'"
    with pytest.warns(FutureWarning, match=warns):
        assert read(config_from_dict({group: {key: value}})) == value
    with pytest.warns(FutureWarning, match=warns):
        assert read(config_files.load("configs/best.py", [f"--config.{old}={value}"])) == value
    file = tmp_path / "mine.py"
    file.write_text(
        "from tokalign_jax.config import default_config\n\ndef get_config():\n"
        f"    config = default_config()\n    config.{old} = {value}\n    return config\n"
    )
    with pytest.warns(FutureWarning, match=warns):
        assert read(config_from_dict(config_files.load(str(file)))) == value
    other = config_files.load(str(file), [f"--config.{new}={value + 1}"])
    assert read(config_from_dict(other)) == value + 1


@pytest.mark.parametrize(
    ("key", "value"), [("alignment.bleu_lines", 5), ("export.max_shard_bytes", 10**9)]
)
def test_removed_key_is_accepted_with_a_warning(key, value, tmp_path):
    group, name = key.split(".")
    warns = f"'{key}' has no effect: it is always {REMOVED[type(getattr(Config(), group))][name]}"
    with pytest.warns(FutureWarning, match=warns):
        assert config_from_dict({group: {name: value}}) == Config()
    for flags in ([f"--config.{key}={value}"], [f"--config.{key}", str(value)]):
        with pytest.warns(FutureWarning, match=warns):
            values = config_files.load("configs/best.py", [*flags, "--config.seed=3"])
        assert config_from_dict(values).seed == 3
    file = tmp_path / "mine.py"
    file.write_text(
        "from tokalign_jax.config import default_config\n\ndef get_config():\n"
        f"    config = default_config()\n    config.{key} = {value}\n    return config\n"
    )
    with pytest.warns(FutureWarning, match=warns):
        assert config_from_dict(config_files.load(str(file))) == Config()


def test_renamed_keys_lead_to_existing_fields():
    for kind, names in RENAMED.items():
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for old, new in names.items():
            group, name = new.split(".")
            assert old not in fields
            assert hasattr(fields[group].default_factory(), name)


def test_fingerprints_exclude_settings_without_effect():
    one, other = (
        config_from_dict({"stage1": changes}).stage1
        for changes in (
            {},
            {"log_every": 3, "batch": {"per_device": 2}, "checkpoints": {"every": 4, "keep": 5}},
        )
    )
    assert one != other and settings_of(one) == settings_of(other)
    assert settings_of(config_from_dict({"stage1": {"optimizer": {"beta1": 0.5}}}).stage1) != (
        settings_of(one)
    )


def test_training_depends_on_how_products_are_computed_and_on_nothing_more_by_default():
    assert products_of(Config().compute) == {"dtype": "bfloat16"}
    compute = config_from_dict({"compute": {"matmul": "float8", "remat": "layer"}}).compute
    assert products_of(compute) == {"dtype": "bfloat16", "matmul": "float8"}
