"""The README's examples run as they stand, and the first prints what stands below it."""

import contextlib
import io

import pytest

from tests.readme import (
    BLOCKS,
    COMPOSER,
    FIRST,
    LATER,
    PIPELINE,
    QUALITY,
    SENSITIVITY,
    STEPS,
    TIMES,
    prints_the_output,
)


def test_the_first_example_prints_what_the_readme_shows() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(FIRST, {})
    assert prints_the_output(printed.getvalue()), printed.getvalue()


def test_the_second_example_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(FIRST, names)
        exec(LATER, names)
    assert (tmp_path / "small.safetensors").exists()


@pytest.mark.slow
def test_the_examples_with_data_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(FIRST, names)
        exec(PIPELINE, names)
        exec(SENSITIVITY, names)
        exec(STEPS, names)
        exec(QUALITY, names)
        exec(TIMES, names)
    assert (tmp_path / "sensitivity.png").exists()
    assert (tmp_path / "quality.png").exists()
    assert "of the original's" in printed.getvalue()
    assert "output error" in printed.getvalue()
    assert "refit: output error" in printed.getvalue()
    assert "distill: output error" in printed.getvalue()


def test_the_example_for_users_of_composer_runs() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("import torch\n" + COMPOSER, {})
    assert printed.getvalue().startswith("8 0.")


def test_every_block_is_run_but_the_sketch_of_a_method() -> None:
    assert set(BLOCKS) - {FIRST, LATER, PIPELINE, SENSITIVITY, STEPS, QUALITY, TIMES, COMPOSER} == {
        block for block in BLOCKS if block.startswith("@tdecomp.register")
    }


def test_an_example_that_needs_a_checkout_says_so() -> None:
    for block in BLOCKS:
        needing = [line for line in block.splitlines() if "import" in line and "benchmarks" in line]
        assert all(line.endswith("# in a checkout") for line in needing)
