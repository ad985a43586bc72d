from __future__ import annotations

from itertools import chain, islice

import pytest
import torch

from lit_unlearn.data.example import IGNORED, Example
from lit_unlearn.data.streams import BatchStream, FiniteStream

KINDS = [BatchStream, FiniteStream]


def make_rows(count):
    """Rows that their first token tells apart, of lengths 2 to 4, the last two tokens supervised."""
    return [Example([i, *[500 + i] * (1 + i % 3)], [IGNORED, *[500 + i] * (1 + i % 3)]) for i in range(count)]


def make(kind=BatchStream, count=7, batch_size=2, **settings):
    return kind(make_rows(count), batch_size, **{"name": "retain", **settings})


def real_rows(batch):
    """The rows of a batch that have supervised tokens."""
    return [example.input_ids[0] for example in batch if set(example.labels) != {IGNORED}]


def take(stream, number):
    """So many batches, over as many passes as it takes."""
    batches = []
    while len(batches) < number:
        batches += islice(stream, number - len(batches))
    return batches


def test_a_batch_is_the_examples_as_they_are():
    assert make(seed=None, batch_size=3).batch(0) == make_rows(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_resume_from_any_cursor_equals_the_uninterrupted_run(kind, rank, world_size):
    place = {"rank": rank, "world_size": world_size}
    whole = take(make(kind, **place), 11)
    assert whole[:4] != whole[4:8]
    for cursor in range(11):
        resumed = make(kind, **place)
        resumed.cursor = cursor
        assert take(resumed, 11 - cursor) == whole[cursor:]
        assert resumed.cursor == 11


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_what_was_asked_before(kind):
    whole = take(make(kind), 9)
    stream = make(kind)
    assert [stream.batch(k) for k in reversed(range(9))] == whole[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_random_state_is_left_alone(kind):
    state = torch.random.get_rng_state()
    batches = take(make(kind), 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert take(make(kind), 5) == batches


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_seed_name_and_pass(kind):
    def passes(**settings):
        stream = make(kind, count=20, batch_size=10, **settings)
        return [[*stream.example_indices(2 * number), *stream.example_indices(2 * number + 1)] for number in range(3)]

    same, other_seed, other_name = passes(seed=3), passes(seed=4), passes(seed=3, name="forget")
    assert same == passes(seed=3)
    orders = [*same, *other_seed, *other_name, list(range(20))]
    assert len({tuple(order) for order in orders}) == 10
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert passes(seed=None) == [list(range(20))] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(kind, world_size):
    """6 rows per step, however many processes: disjoint parts of the same rows."""
    one = make(kind, count=20, batch_size=6)
    many = [make(kind, count=20, batch_size=6, rank=r, world_size=world_size) for r in range(world_size)]
    for number in range(9):  # over the end of two passes
        parts = [stream.example_indices(number) for stream in many]
        together = one.example_indices(number)
        assert [part == together[rank::world_size] for rank, part in enumerate(parts)] == [True] * world_size
        assert sorted(chain(*parts)) == sorted(together)
        assert [real_rows(stream.batch(number)) for stream in many] == parts
    assert len(set(chain(*(stream.example_indices(0) for stream in many)))) == 6


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(7, 2), (20, 3), (3, 4), (1, 2)])
def test_endless_passes_are_without_replacement(count, batch_size, world_size):
    """Also where one step takes more rows than there are."""
    streams = [make(BatchStream, count, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    drawn = []
    for number in range(4 * count):
        parts = [stream.example_indices(number) for stream in streams]
        assert sum(map(len, parts)) == batch_size  # never a short batch
        drawn += [parts[place % world_size][place // world_size] for place in range(batch_size)]
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 13])
def test_a_finite_pass_has_every_row_once_on_any_number_of_processes(count, world_size):
    streams = [make(FiniteStream, count, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        passes = [list(stream) for stream in streams]
        assert {len(batches) for batches in passes} == {len(stream) for stream in streams} == {-(-count // 2)}
        rows = [row for batches in passes for batch in batches for row in real_rows(batch)]
        assert sorted(rows) == list(range(count))


def test_every_process_has_as_many_rows_as_the_others():
    """7 rows in batches of 5 on 3 processes: 2, 2 and 1 row, then 1, 1 and none; the gaps weigh nothing."""
    streams = [make(FiniteStream, batch_size=5, seed=None, rank=r, world_size=3) for r in range(3)]
    assert [stream.example_indices(0) for stream in streams] == [[0, 3], [1, 4], [2]]
    assert [stream.example_indices(1) for stream in streams] == [[5], [6], []]
    assert [[len(stream.batch(k)) for stream in streams] for k in (0, 1)] == [[2, 2, 2], [1, 1, 1]]
    assert [real_rows(stream.batch(0)) for stream in streams] == [[0, 3], [1, 4], [2]]
    assert streams[2].batch(1) == [Example([0, 500], [IGNORED, IGNORED])]


def test_a_finite_stream_goes_pass_by_pass():
    stream = make(FiniteStream)
    first, second = list(stream), list(stream)
    assert (len(first), len(second), stream.cursor) == (4, 4, 8)
    assert first != second
    stream.cursor = 6
    assert list(stream) == second[2:]  # the rest of the pass it stands in
    stream.cursor = 8
    assert len(list(stream)) == 4  # at the end of one pass the next begins
