"""The order of examples is a function of seed and step alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simvq_moe.data.order import BatchOrder, held_out_by_name

sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=50)
@given(examples=sizes, batch=sizes, seed=st.integers(0, 2**40))
def test_every_epoch_visits_every_example_once(examples, batch, seed):
    order = BatchOrder(examples=examples, batch=batch, seed=seed)
    steps = -(-3 * examples // batch)
    positions = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(3):
        visited = positions[epoch * examples : (epoch + 1) * examples]
        assert sorted(visited) == list(range(examples))


def test_batches_straddle_the_end_of_an_epoch():
    order = BatchOrder(examples=10, batch=4, seed=0)
    first, second = (
        np.concatenate([BatchOrder(examples=10, batch=10, seed=0).indices(epoch)])
        for epoch in range(2)
    )
    np.testing.assert_array_equal(order.indices(2), [*first[8:], *second[:2]])


def test_a_batch_may_be_larger_than_the_data_set():
    indices = BatchOrder(examples=3, batch=8, seed=0).indices(1)
    assert indices.shape == (8,)
    assert indices.dtype == np.int64
    # positions 8 to 15: the end of epoch 2, epochs 3 and 4, the start of epoch 5
    assert sorted(indices[1:4]) == sorted(indices[4:7]) == [0, 1, 2]


@settings(deadline=None, max_examples=50)
@given(examples=sizes, share=st.integers(1, 8), ranks=st.integers(1, 6), step=st.integers(0, 99))
def test_ranks_together_read_the_batch_of_one_rank(examples, share, ranks, step):
    order = BatchOrder(examples=examples, batch=share * ranks, seed=7)
    parts = [order.indices(step, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {share}
    np.testing.assert_array_equal(np.concatenate(parts), order.indices(step))


def test_random_access_equals_sequential_reading():
    sequential = BatchOrder(examples=17, batch=5, seed=3)
    steps = [sequential.indices(step) for step in range(30)]
    for step in (29, 0, 12, 11, 29):
        np.testing.assert_array_equal(sequential.indices(step), steps[step])
        fresh = BatchOrder(examples=17, batch=5, seed=3)
        np.testing.assert_array_equal(fresh.indices(step), steps[step])


def test_changing_a_batch_leaves_the_order_alone():
    order = BatchOrder(examples=9, batch=9, seed=0)
    expected = order.indices(0).copy()
    order.indices(0)[:] = -1
    np.testing.assert_array_equal(order.indices(0), expected)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(BatchOrder(examples=100, batch=100, seed=seed).indices(epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="batch 6 is not divisible by 4 ranks"):
        BatchOrder(examples=10, batch=6, seed=0).indices(0, ranks=4)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="examples 0"):
        BatchOrder(examples=0, batch=6, seed=0)


@settings(deadline=None)
@given(names=st.lists(st.text(), min_size=2, max_size=30, unique=True), share=st.floats(0, 1))
def test_both_sides_of_a_split_have_a_name(names, share):
    assert set(held_out_by_name(names, share)) == {False, True}


def test_a_name_keeps_its_side_when_others_come():
    names = [f"folder/{i}.txt" for i in range(1000)]
    held_out = held_out_by_name(names, 0.1)
    assert 70 < sum(held_out) < 130
    assert held_out_by_name(names[:300], 0.1) == held_out[:300]


def test_the_split_of_names_is_the_same_on_every_machine():
    names = ["abc.py", "argparse.py", "asyncio/base_events.py", "ast.py"]
    assert held_out_by_name(names, 0.5) == [False, False, False, True]
