"""The order of prompts: each once per epoch, and the same after an interruption."""

import json

import pytest

from opdkit.base.errors import UserError
from opdkit.data import PromptStream
from opdkit.data.stream import permutation


def test_each_once_per_epoch_in_another_order():
    stream = PromptStream(50, seed=1)
    epochs = [stream.take(50) for _ in range(20)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert stream.taken == 1000


def test_steps_do_not_matter():
    whole = PromptStream(7, seed=3).take(40)
    for n in (1, 3, 7, 10, 40):
        stream, parts = PromptStream(7, seed=3), []
        while len(parts) < 40:
            parts += stream.take(n)
        assert parts[:40] == whole
    assert PromptStream(7, seed=4).take(40) != whole


@pytest.mark.parametrize("before", [0, 1, 6, 7, 8, 20])
def test_resumed_equals_uninterrupted(before):
    whole = PromptStream(7, seed=3).take(40)
    first = PromptStream(7, seed=3)
    assert first.take(before) == whole[:before]
    second = PromptStream(7)  # the seed comes with the state
    second.load(json.loads(json.dumps(first.state())))
    assert second.taken == before and second.take(40 - before) == whole[before:]


def test_epochs_end_it():
    stream = PromptStream(5, epochs=2)
    assert len(stream.take(8)) == 8
    resumed = PromptStream(5, epochs=2)
    resumed.load(stream.state())
    for s in (stream, resumed):
        assert len(s.take(8)) == 2
        assert s.take(1) == [] and s.taken == 10
    assert PromptStream(5, epochs=2).take(100) == PromptStream(5).take(10)


def test_the_order_is_the_same_everywhere():
    """Pinned: a checkpoint of another machine or NumPy must continue in the same order."""
    assert permutation(8, 0, 0).tolist() == [5, 6, 2, 4, 3, 7, 0, 1]
    assert permutation(8, 1, 5).tolist() == [5, 6, 4, 0, 7, 1, 3, 2]
    assert permutation(8, -1, 0).tolist() == permutation(8, (1 << 64) - 1, 0).tolist()


def test_orders_are_unbiased():
    """Each index is first, and each pair of neighbours is in order, about as often as chance has
    it: 5 standard deviations.
    """
    orders = [permutation(8, seed, epoch).tolist() for seed in range(50) for epoch in range(40)]
    firsts = [sum(order[0] == i for order in orders) for i in range(8)]
    assert all(abs(n - 250) < 5 * (2000 * 1 / 8 * 7 / 8) ** 0.5 for n in firsts)
    ordered = [sum(order.index(i) < order.index(i + 1) for order in orders) for i in range(7)]
    assert all(abs(n - 1000) < 5 * (2000 / 4) ** 0.5 for n in ordered)


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match="no prompts"):
        PromptStream(0)
    with pytest.raises(UserError, match="epochs=0"):
        PromptStream(3, epochs=0)
    with pytest.raises(UserError, match="written with 3 prompts, and there are 4 now"):
        PromptStream(4).load(PromptStream(3).state())
