"""The training stream: a permutation per pass, exact offsets and states, independence of hosts."""

import itertools

import numpy as np
import pytest

from tests.training.toys import ToyShards
from tokalign_jax.config import AFTER_PREVIOUS
from tokalign_jax.errors import UserError
from tokalign_jax.training.batches import TokenSource, make_stream, resolve_offset

T, N = 4, 50
SOURCE = TokenSource(ToyShards(np.arange(N * T + 3, dtype=np.uint16)), T)


def stream(seed=0, epochs=2, offset=0, accumulation=1, micro_batch=1, **hosts):
    return make_stream(
        SOURCE,
        seed=seed,
        epochs=epochs,
        offset=offset,
        accumulation=accumulation,
        micro_batch=micro_batch,
        **hosts,
    )


def sequence_ids(batches):
    """Sequences that a stream read, by their first token, in order [steps, accumulation,
    micro-batch].
    """
    return np.stack([batch[..., 0] // T for batch in batches])


def test_sequence_has_t_plus_one_tokens():
    assert len(SOURCE) == N
    np.testing.assert_array_equal(SOURCE[3], [12, 13, 14, 15, 16])
    assert SOURCE[3].dtype == np.int32
    assert len(TokenSource(ToyShards(np.arange(2 * T)), T)) == 1  # the second lacks its last label
    assert len(TokenSource(ToyShards(np.arange(0)), T)) == 0


def test_opening_token_begins_every_sequence():
    opened = TokenSource(ToyShards(np.arange(N * T + 3, dtype=np.uint16), opening=7), T)
    np.testing.assert_array_equal(opened[3], [7, 13, 14, 15, 16])


def test_every_pass_is_a_new_permutation_of_all_sequences():
    first, second = sequence_ids(stream()).reshape(2, N)
    assert sorted(first) == sorted(second) == list(range(N))
    assert list(first) != list(second) and list(first) != list(range(N))


def test_seeds_give_unrelated_orders():
    orders = [sequence_ids(stream(seed=seed)).reshape(2, N) for seed in range(3)]
    for a, b in itertools.permutations(orders, 2):
        assert (a != b).any(1).all()
        assert (a[1] != b[0]).any()  # seed + 1 is not merely the next pass of seed
    np.testing.assert_array_equal(orders[1], sequence_ids(stream(seed=1)).reshape(2, N))


def test_offset_continues_the_stream_exactly():
    whole = sequence_ids(stream()).ravel()
    for offset in (7, N - 1, N, N + 3):
        np.testing.assert_array_equal(sequence_ids(stream(offset=offset)).ravel(), whole[offset:])


def test_epochs_bound_the_stream_unless_zero():
    assert len(list(stream(epochs=3, accumulation=2, micro_batch=5))) == 3 * N // 10
    endless = sequence_ids(itertools.islice(stream(epochs=0), 5 * N)).reshape(5, N)
    assert (np.sort(endless) == np.arange(N)).all()
    np.testing.assert_array_equal(endless[:2], sequence_ids(stream(epochs=2)).reshape(2, N))


def test_hosts_share_each_step_and_make_the_same_global_batch():
    shape = dict(accumulation=3, micro_batch=4, offset=5)
    whole = list(stream(**shape))
    assert whole[0].shape == (3, 4, T + 1) and len(whole) == (2 * N - 5) // 12
    parts = [list(stream(**shape, host=host, hosts=2)) for host in range(2)]
    for step, batch in enumerate(whole):
        assert parts[0][step].shape == (3, 2, T + 1)
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts], axis=1), batch)
    with pytest.raises(ValueError, match="divide"):
        stream(micro_batch=3, hosts=2)


def test_saved_state_continues_exactly_on_any_number_of_hosts():
    shape = dict(accumulation=2, micro_batch=2, offset=9)
    reader = stream(**shape)
    for _ in range(4):
        next(reader)
    state, rest = reader.get_state(), list(reader)
    restored = stream(**shape)
    next(restored)
    restored.set_state(state)
    np.testing.assert_array_equal(list(restored), rest)
    halves = []
    for host in range(2):
        half = stream(**shape, host=host, hosts=2)
        half.set_state(state)
        halves.append(next(half))
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), rest[0])


@pytest.mark.parametrize(
    "offset, epochs, expected",
    [(0, 0, 0), (7, 0, 7), (0.2, 0, 200), (0.2, 3, 200), (AFTER_PREVIOUS, 0, 640), (2999, 3, 2999)],
)
def test_start_offsets_are_resolved(offset, epochs, expected):
    assert resolve_offset(offset, 1000, epochs, previous_end=640) == expected


def test_after_previous_may_pass_the_corpus_only_in_an_unbounded_stream():
    assert resolve_offset(AFTER_PREVIOUS, 1000, 0, previous_end=1640) == 1640
    with pytest.raises(UserError, match="1,000 sequences"):
        resolve_offset(AFTER_PREVIOUS, 1000, 1, previous_end=1640)


@pytest.mark.parametrize(
    "offset, epochs, message",
    [
        (1000, 0, "1,000 sequences"),
        (2_560_000, 2, r"2,000 sequences \(2 passes over a corpus of 1,000\)"),
    ],
)
def test_errors_on_offsets_state_the_range(offset, epochs, message):
    with pytest.raises(UserError, match=message):
        resolve_offset(offset, 1000, epochs, previous_end=0)
