import numpy as np

from tdecomp.timing.stopwatch import Time, by_turns, ratio


def test_quartiles_and_spread():
    time = Time.over(np.array([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (time.low, time.median, time.high) == (2.0, 3.0, 4.0)
    assert time.spread == 2 / 3


def test_a_ratio_is_taken_within_each_round():
    # A machine that is twice as slow in every other round: the ratio does not scatter at all.
    seconds = np.array([[1.0, 3.0], [2.0, 6.0], [1.0, 3.0], [2.0, 6.0]])
    assert ratio(seconds, 1, 0) == Time(3.0, 3.0, 3.0)


def test_every_function_has_its_turn_in_every_round():
    order = []
    seconds = by_turns([lambda i=i: order.append(i) for i in range(3)], rounds=4, min_block=1e-9)
    assert seconds.shape == (4, 3)
    assert (seconds > 0).all()
    # Whole runs of one function, forwards and backwards by turns.
    turns = [i for i, before in zip(order, [None, *order], strict=False) if i != before]
    assert turns == [0, 1, 2, 0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_what_does_more_takes_longer():
    small, large = np.ones((8, 8)), np.ones((400, 400))
    seconds = by_turns([lambda: small @ small, lambda: large @ large], rounds=3, min_block=1e-3)
    assert ratio(seconds, 1, 0).median > 1
