"""The command runs, part by part, and its table says what is within its bound."""

import re

import pytest

from benchmarks.scale.__main__ import main, table
from benchmarks.scale.generation import Speed, in_words
from benchmarks.scale.row import ScaleRow


def test_large_layers(capsys):
    main(["large_layers", "--quick"])
    shown = capsys.readouterr().out
    assert len(re.findall(r"by the clock\), \d+\.\d times the weights", shown)) == 8
    assert "tdecomp" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, words",
    [("calibration", "plain passes (one takes"), ("generation", "tokens/s")],
)
def test_parts_with_transformers(part, words, capsys):
    main([part, "--quick"])
    assert words in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["small_layers"])
    assert "no such part: small_layers; expected some of" in capsys.readouterr().err


def test_what_is_beyond_its_bound_is_seen():
    rows = [ScaleRow("a", "1 s", "2 s", within=False), ScaleRow("b", "1 s", "1 s", within=True)]
    *_, first, second = table(rows).splitlines()
    assert (first.split()[-1], second.split()[-1]) == ("NO", "yes")


def test_what_bounds_generation_follows_from_the_numbers():
    whole, half = Speed(1.0, 0.8, 0.4, 4 * 10**9), Speed(0.5, 0.4, 0.2, 2 * 10**9)
    assert "bound by the products' arithmetic, in 80%" in in_words(whole, half)
    fast = Speed(0.5, 0.21, 0.2, 2 * 10**9)
    assert "bound by memory, in 42%" in in_words(whole, fast)
