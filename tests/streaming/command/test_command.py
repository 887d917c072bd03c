"""The command, called as a function: what it prints, writes and returns."""

import os
import shlex
import subprocess
import sys

import pytest
from torch import nn

import tdecomp
from tdecomp.__main__ import main
from tdecomp.decomposers.svd import SVD
from tdecomp.plans.plan import Plan
from tdecomp.streaming.command.parser import EXAMPLES, parser
from tdecomp.streaming.command.show import contents_of
from tests.docs.pages import ROOT
from tests.streaming.folders import perceptron, unknown

PAGE = ROOT / "docs/reference/command-line.md"


@pytest.fixture
def plan():
    return tdecomp.plan(perceptron(), "svd", rank=0.25, progress=False)


@pytest.fixture
def here(tmp_path, monkeypatch, plan):
    """An empty folder but for the plan that examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    return tmp_path


def helped(capsys, *words):
    """What the help says."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    """What is said of a call that cannot be read."""
    with pytest.raises(SystemExit) as caught:
        main([*words])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_it_runs_as_a_module_and_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tdecomp", "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == parser().format_help()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_can_be_read(name, capsys):
    text = helped(capsys, name)
    for example in EXAMPLES[name]:
        command, *words = shlex.split(example)
        assert command == "tdecomp"
        assert words[0] == name
        parser().parse_args(words)
        assert f"\n  {example}\n" in text


@pytest.mark.parametrize("words", [(), *((name,) for name in EXAMPLES)])
def test_the_page_has_the_help_as_it_is(words, capsys):
    title = " ".join(("tdecomp", *words, "--help"))
    shown = PAGE.read_text().partition(f'```text title="{title}"\n')[2].partition("```")[0]
    # Word by word: the widths of columns differ between versions of Python.
    assert shown.split() == helped(capsys, *words).split()


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tdecomp {tdecomp.__version__}\n"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "words, said",
    [
        ("", "COMMAND"),
        ("decompose llama", "invalid choice: 'decompose'"),
        ("plan", "SOURCE"),
        ("plan llama", "expected --rank, or --layer-rank"),
        ("plan llama --rank 1.0", "argument --rank: rank '1.0': a share is above 0 and below 1"),
        ("plan llama --rank 4 --methods none", "argument --methods: unknown method 'none'"),
        ("plan llama --layer-rank '*.up'", "argument --layer-rank: expected a layer's name"),
        ("plan llama --rank 4 --save none/plan.json", "in a folder that exists"),
        ("plan llama --rank 4 --workers 0", "argument --workers: expected a whole number"),
        ("plan llama --rank 4 --workers 2 --scheduler tcp://a:1", "not allowed with"),
        ("stream llama", "TARGET"),
        ("stream llama small", "expected --rank, or --layer-rank"),
        ("stream llama small --rank 4 --max-memory 4", "such as 500MB, 4GB or 4GiB, got '4'"),
        ("stream llama small --rank 4 --device none", "device 'none' cannot be used here: "),
        ("stream llama small --plan none.json", "no such file: none.json"),
        ("stream llama small --plan plan.json --rank 4", "expected no other choice"),
        ("stream llama small --plan plan.json --exclude lm_head", "expected no other choice"),
        ("show", "PATH"),
    ],
)
def test_calls_that_cannot_be_read(words, said, capsys):
    text = refused(capsys, *shlex.split(words))
    assert text.startswith("usage: tdecomp")
    assert said in text


def test_show(here, plan, capsys):
    assert main(["show", "plan.json", "--save", "copy.json", "--html", "plan.html"]) == 0
    assert capsys.readouterr().out == f"plan.json: a plan\n\n{plan}\n"
    copy = Plan.from_json((here / "copy.json").read_text(encoding="utf-8"))
    assert copy.rows == plan.rows
    assert "3 of 3 layers" in (here / "plan.html").read_text(encoding="utf-8")


def test_what_has_no_plan_writes_none(here, capsys):
    from safetensors.torch import save_file

    save_file(nn.Linear(4, 4).state_dict(), "layer.safetensors")
    assert main(["show", "layer.safetensors"]) == 0
    capsys.readouterr()
    assert main(["show", "layer.safetensors", "--save", "copy.json"]) == 1
    assert "an ordinary checkpoint, nothing is decomposed" in capsys.readouterr().err
    assert not (here / "copy.json").exists()


@pytest.mark.usefixtures("here")
def test_an_error_is_one_line(capsys):
    assert main(["show", "none.safetensors"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "tdecomp: error: no such file or folder: none.safetensors\n"
    assert main(["show", "none.safetensors", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_reader_who_has_seen_enough(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=True) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["show", "plan.json"]) == 1
        print("what follows goes nowhere, without an error", flush=True)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("here")
def test_a_plan_is_kept_whoever_reads(here, monkeypatch):
    unknown(here / "folder")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=True) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        words = "plan folder --include * --rank 4 --save made.json --no-progress"
        assert main(words.split()) == 1
    assert Plan.from_json((here / "made.json").read_text(encoding="utf-8"))["0"].rank == 4


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_some_characters(here, plan, monkeypatch, encoding):
    with (here / "said").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["show", "plan.json"]) == 0
    expected = f"plan.json: a plan\n\n{plan}\n".encode(encoding, "replace")
    assert (here / "said").read_bytes() == expected
    assert b"Linear(24?32)" in expected


@pytest.mark.usefixtures("here")
def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as where it is closed
    assert main(["show", "plan.json"]) == 0


def test_plan(here, capsys):
    model = unknown(here / "folder", shards=2)
    words = "plan folder --include * --rank ratio:0.5,of=params --layer-rank 4=2 --exclude 0"
    rank = {"4": 2, "*": tdecomp.Ratio(0.5, of="params")}
    expected = tdecomp.plan(model, "svd", rank=rank, include="*", exclude="0", progress=False)
    assert main([*words.split(), "--save", "made.json", "--no-progress"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{expected}\n"
    assert said.err == ""
    assert Plan.from_json((here / "made.json").read_text(encoding="utf-8")).rows == expected.rows


def test_stream_and_show(here, capsys):
    model = unknown(here / "folder", shards=2)
    options = "--include * --rank energy:0.8 --exclude 0 --max-memory 1MB --no-progress"
    assert main(["stream", "folder", "small", *options.split()]) == 0
    chosen = {"rank": tdecomp.Energy(0.8), "include": "*", "exclude": "0", "progress": False}
    result = tdecomp.decompose(model, "svd", **chosen)
    assert capsys.readouterr().out == f"{result.report}\n"
    found = contents_of("small")
    assert found.plan.rows == result.plan.rows
    assert f"\n\n{result.report}\n\n" in str(found)
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(value.shape) for name, value in result.model.state_dict().items()
    }
    assert main(["show", "small"]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert main(["stream", "folder", "small", *options.split(), "--no-resume"]) == 1
    assert "small is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["plan folder --rank 4", "stream folder small --plan plan.json"]
)
def test_a_scheduler_needs_dask(here, monkeypatch, capsys, command):
    unknown(here / "folder")
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    assert main([*command.split(), "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert "pip install 'tdecomp-torch[dask]'" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "options, said", [("--max-memory 1KB", "max_memory is 1.00kB"), ("--device meta", "meta")]
)
def test_what_the_stream_is_told(here, capsys, options, said):
    unknown(here / "folder")
    words = f"stream folder small --include * --rank 4 --no-progress {options}"
    assert main(words.split()) == 1
    assert said in capsys.readouterr().err


def test_stream_of_a_plan(here, plan, capsys):
    unknown(here / "folder")
    assert main(["stream", "folder", "small", "--plan", "plan.json", "--no-progress"]) == 0
    assert contents_of("small").plan.rows == plan.rows
    assert "3 of 3 layers decomposed" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_methods_and_expansion(here, capsys):
    model = unknown(here / "folder")
    words = "plan folder --include * --rank 7 --methods cp,svd --allow-expansion --no-progress"
    assert main(words.split()) == 0
    options = {"rank": 7, "include": "*", "allow_expansion": True, "progress": False}
    assert capsys.readouterr().out == f"{tdecomp.plan(model, ['cp', 'svd'], **options)}\n"


@pytest.mark.usefixtures("here", "own_methods")
def test_an_interrupt_says_how_to_go_on(here, capsys):
    @tdecomp.register
    class Interrupted(SVD):
        name = "interrupted"

        def refusal(self, spec):
            del spec
            raise KeyboardInterrupt

    unknown(here / "folder")
    for command, words in (
        ("plan folder", ""),
        ("stream folder small", "; the same command goes on"),
    ):
        options = "--include * --rank 4 --methods interrupted --no-progress"
        assert main([*command.split(), *options.split()]) == 130
        assert capsys.readouterr().err.startswith(f"tdecomp: interrupted{words}")
