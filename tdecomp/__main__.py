"""The command: plan, decompose and look at checkpoints in folders, without writing Python."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

import torch

from tdecomp import api
from tdecomp.files.whole_file import whole_file
from tdecomp.plans.plan import Plan
from tdecomp.runtime.workers import executor_of
from tdecomp.streaming.command import arguments
from tdecomp.streaming.command.parser import parser
from tdecomp.streaming.command.show import contents_of
from tdecomp.streaming.stream import stream

# What is wrong with what was asked for, or with what there is to do it; other errors are faults.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, by default with the arguments of this process; the exit status."""
    given = parser().parse_args(argv)
    try:
        _COMMANDS[given.command](given)
    except KeyboardInterrupt:
        how = "; the same command goes on where this one stopped"
        _say(f"tdecomp: interrupted{how * (given.command == 'stream')}", sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _EXPECTED as error:
        if given.traceback:
            traceback.print_exc()
        words = " ".join(str(error).split()) or type(error).__name__
        _say(f"tdecomp: error: {words}", sys.stderr)
        return 1
    return 0


def _say(text: str, where: TextIO | None = None) -> None:
    """Print a text, with ? for what the encoding of a terminal or a pipe does not have."""
    where = sys.stdout if where is None else where
    encoding = getattr(where, "encoding", None) or "utf-8"
    words = text.encode(encoding, "replace").decode(encoding)
    print(words, file=where, flush=True)  # while an error of it can still be told


def _plan(given: argparse.Namespace) -> None:
    choice = _choice(given)
    with executor_of(given.workers, given.scheduler) as executor:
        plan = api.plan(
            given.source, **choice, allow_expansion=given.allow_expansion,
            executor=executor, progress=given.progress,
        )  # fmt: skip
    _write(given, plan)  # before a reader such as `head` has seen enough
    _say(str(plan))


def _stream(given: argparse.Namespace) -> None:
    choice = _choice(given) if given.plan is None else _planned(given)
    with executor_of(given.workers, given.scheduler) as executor:
        report = stream(
            given.source, given.target, **choice, max_memory=given.max_memory,
            device=given.device, executor=executor, resume=given.resume, progress=given.progress,
        )  # fmt: skip
    _say(str(report))


def _show(given: argparse.Namespace) -> None:
    contents = contents_of(given.path)
    if contents.plan is None and (given.save or given.html):
        raise ValueError(f"{contents.title}, so that there is no plan to write")
    if contents.plan is not None:
        _write(given, contents.plan)
    _say(str(contents))


def _choice(given: argparse.Namespace) -> dict[str, Any]:
    if given.rank is None and not given.layer_rank:
        given.refuse("expected --rank, or --layer-rank for some layers")
    rank = given.rank
    if given.layer_rank:
        rank = {**dict(given.layer_rank), **({} if rank is None else {"*": rank})}
    methods = given.methods or arguments.methods("svd")
    return {"methods": methods, "rank": rank, "include": given.include, "exclude": given.exclude}


def _planned(given: argparse.Namespace) -> dict[str, Any]:
    if any((given.rank, given.layer_rank, given.methods, given.include, given.exclude)):
        given.refuse(
            "--plan says which layers get which methods and ranks; expected no other choice"
        )
    return {"methods": given.plan}


def _write(given: argparse.Namespace, plan: Plan) -> None:
    if given.save is not None:
        with whole_file(given.save) as draft:
            draft.write_text(plan.to_json(), encoding="utf-8")
    if given.html is not None:
        plan.to_html(given.html)


_COMMANDS = {"plan": _plan, "stream": _stream, "show": _show}

if __name__ == "__main__":
    sys.exit(main())
