"""Objectives with further arrays in their batches and arrays of their own."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import STAGE, train
from tokalign_jax.errors import UserError
from tokalign_jax.training.batches import TokenSource
from tokalign_jax.training.step import NEXT_TOKEN, Objective, make_loss
from tokalign_jax.utils import paths


class WithFirst(TokenSource):
    """Sequences with their first token beside them."""

    def __getitem__(self, index):
        tokens = super().__getitem__(index)
        return {"tokens": tokens, "first": tokens[0]}


def next_token_and(beside, facts):
    """The loss of the next token, and `beside` for each sequence that does not come with its own
    first token.
    """

    def make(model, compute, lora):
        plain = make_loss(model, compute, lora)

        def loss(trainable, frozen, batch, keys):
            frozen, beside = frozen
            strange = jnp.sum(batch["first"] != batch["tokens"][:, 0])
            total, count = plain(trainable, frozen, batch["tokens"], keys)
            return total + beside["penalty"] * strange, count

        return loss

    return Objective(make, {"penalty": jnp.float32(beside)}, facts, WithFirst)


def test_objective_supplies_its_own_arrays_and_sequences(tmp_path):
    stage = replace(STAGE, method="embedding", steps=4)
    plain = train(tmp_path / "plain", stage)
    given = train(tmp_path / "given", stage, objective=next_token_and(100.0, {"penalty": 100}))
    # Another program, in which XLA may fuse and round otherwise.
    np.testing.assert_allclose(
        [record["loss"] for record in given.history],
        [record["loss"] for record in plain.history],
        rtol=1e-6,
    )
    assert [record["tokens"] for record in given.history] == [
        record["tokens"] for record in plain.history
    ]
    for path, leaf in paths.flatten(plain.params).items():
        np.testing.assert_allclose(
            paths.flatten(given.params)[path], leaf, atol=1e-6, rtol=0, err_msg=path
        )
    # Its facts are those of the run: a checkpoint made under others is of another.
    for other in (next_token_and(100.0, {"penalty": 1}), NEXT_TOKEN):
        with pytest.raises(UserError, match="other settings"):
            train(tmp_path / "given", stage, objective=other)
