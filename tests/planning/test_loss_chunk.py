"""`auto` chooses the tokens whose logits exist at once by the memory that there is."""

import math
from dataclasses import replace

import jax.numpy as jnp
import pytest

from tests.training.toys import LLAMA
from tokalign_jax.config import (
    BatchConfig,
    ComputeConfig,
    StageConfig,
    config_from_dict,
    loss_chunk_of,
)
from tokalign_jax.errors import UserError
from tokalign_jax.planning import memory, resolve
from tokalign_jax.planning.machine import Machine
from tokalign_jax.training.losses import head_of

MODEL = replace(  # whose logits take more than all else
    LLAMA,
    vocab_size=262_144,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=2048,
    num_layers=8,
    max_positions=4096,
    layer_kinds=LLAMA.layer_kinds[:1] * 8,
)


def setup_of(room=math.inf, batch=64, **compute):
    stage = StageConfig(method="full", batch=BatchConfig(size=batch, sequence_length=2048))
    return memory.Setup(
        "stage", stage, ComputeConfig(**compute), MODEL, (1, 1, 1), Machine(1, room)
    )


def resolved(room, **compute):
    found = resolve.resolve(setup_of(room, **compute))
    return found.stage.batch.per_device, found.compute.remat, found.compute.loss_chunk


def needs(batch, policy, chunk):
    setup = setup_of().with_batch(per_device=batch)
    return memory.needed(setup.with_compute(remat=policy, loss_chunk=chunk))


def test_chunks_are_large_while_there_is_room():
    assert resolved(math.inf) == (32, "dots", 4096)


def test_fewer_logits_before_half_as_many_sequences():
    for batch in (32, 8):
        room = needs(batch, "dots", 2048) / resolve.AUTO_MEMORY + 1
        assert needs(batch, "dots", 4096) > resolve.AUTO_MEMORY * room
        assert resolved(room) == (batch, "dots", 2048)


def test_a_quarter_of_them_before_recomputation():
    room = needs(4, "dots", 1024) / resolve.AUTO_MEMORY + 1
    assert needs(8, "dots", 1024) > resolve.AUTO_MEMORY * room  # four have 8,192 tokens
    assert needs(4, "dots", 2048) > resolve.AUTO_MEMORY * room
    assert resolved(room) == (4, "dots", 1024)
    assert needs(4, "layer", 4096) > resolve.AUTO_MEMORY * room
    room = needs(4, "layer", 1024) / resolve.AUTO_MEMORY + 1
    assert resolved(room) == (4, "layer", 1024)


def test_the_least_is_chosen_if_nothing_fits():
    assert resolved(1e9) == (1, "layer", 512)
    assert resolved(1e9, loss_chunk=4096) == (1, "layer", 4096)


@pytest.mark.parametrize("chunk", [300, 4096, 100_000])
def test_a_number_is_left_as_it_is(chunk):
    for room in (1e9, 30e9, math.inf):
        assert resolved(room, loss_chunk=chunk)[2] == chunk


def test_what_is_chosen_fits():
    for room in range(8, 60, 4):
        found = resolve.resolve(setup_of(room * 1e9))
        least = needs(1, "layer", 512) > resolve.AUTO_MEMORY * room * 1e9
        assert memory.needed(found) <= resolve.AUTO_MEMORY * room * 1e9 or least


def test_without_a_plan_auto_is_the_default_number():
    assert loss_chunk_of(ComputeConfig()) == 4096 == head_of(MODEL, ComputeConfig()).chunk
    assert head_of(MODEL, ComputeConfig(loss_chunk=7)).chunk == 7
    assert head_of(MODEL, ComputeConfig()).dtype == jnp.bfloat16


def test_other_words_are_refused():
    assert config_from_dict({"loss_chunk": "auto"}, ComputeConfig).loss_chunk == "auto"
    with pytest.raises(UserError, match="loss_chunk' is 'most'; it must be a number of tokens or"):
        config_from_dict({"loss_chunk": "most"}, ComputeConfig)
    with pytest.raises(UserError, match="at least 1"):
        config_from_dict({"loss_chunk": 0}, ComputeConfig)
