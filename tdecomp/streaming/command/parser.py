"""The words that the command line takes, and its help."""

import argparse
from functools import partial

from tdecomp._distribution import VERSION
from tdecomp.decomposers.registry import registered
from tdecomp.ranks.spelled import FORMS, spelled_rank
from tdecomp.streaming.command import arguments

_SOURCE = "a folder of safetensors with its config.json, as save_pretrained writes it"
_CHOICE = (
    "how RANK is written:\n"
    + "\n".join(f"  {written:<21} {words}" for written, words in FORMS.items())
    + f"\n\nMETHODS are some of\n  {','.join(registered())}\n"
    "or auto, which is all of them, or dense, those whose chains are of ordinary dense layers"
)
_LOADED = (
    "TARGET is loaded as other models are: its README.md says how. Interrupted or killed, the\n"
    "same command goes on where it stopped."
)
EXAMPLES = {
    "plan": (
        "tdecomp plan llama --rank energy:0.9",
        "tdecomp plan llama --rank budget:params=0.6 --exclude lm_head --save plan.json",
        "tdecomp plan llama --rank 0.25 --layer-rank '*.down_proj=0.5' --methods svd,lowrank",
    ),
    "stream": (
        "tdecomp stream llama llama-small --rank budget:params=0.6 --max-memory 4GB",
        "tdecomp stream llama llama-small --plan plan.json --workers 2",
        "tdecomp stream llama llama-small --rank 0.5 --scheduler tcp://10.0.0.1:8786",
    ),
    "show": (
        "tdecomp show llama-small",
        "tdecomp show small.safetensors --save plan.json --html plan.html",
    ),
}


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    form = partial(argparse.RawDescriptionHelpFormatter, width=96)
    whole = argparse.ArgumentParser(
        "tdecomp", formatter_class=form,
        description="Decompose the layers of checkpoints that may be larger than memory.",
        epilog="tdecomp COMMAND --help says more, with examples.\n\nexit status: 0 done, 1 what "
        "is asked for cannot be done, 2 the call cannot be read, 130 interrupted",
    )  # fmt: skip
    whole.add_argument("--version", action="version", version=f"tdecomp {VERSION}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, purpose: str, note: str = "") -> argparse.ArgumentParser:
        examples = "examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[name])
        made = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.",
            formatter_class=form, epilog="\n\n".join(filter(None, (note, examples))),
        )  # fmt: skip
        made.set_defaults(command=name, refuse=made.error)
        return made

    _fill_plan(command("plan", "choose a method and a rank for each layer", _CHOICE))
    words = "write a folder with its layers decomposed, tensor by tensor"
    _fill_stream(command("stream", words, f"{_LOADED}\n\n{_CHOICE}"))
    _fill_show(command("show", "say what a file or a folder holds, decomposed or not"))
    return whole


def _fill_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("source", metavar="SOURCE", help=_SOURCE)
    _add_choice(plan)
    plan.add_argument(
        "--allow-expansion",
        action="store_true",
        help="also decompose layers whose chains save nothing",
    )
    _add_work(plan)
    _add_outputs(plan)


def _fill_stream(stream: argparse.ArgumentParser) -> None:
    stream.add_argument("source", metavar="SOURCE", help=_SOURCE)
    stream.add_argument("target", metavar="TARGET", help="the folder to write")
    _add_choice(stream)
    stream.add_argument(
        "--plan", metavar="FILE", type=arguments.readable(arguments.plan_in),
        help="methods and ranks as planned; `tdecomp plan SOURCE --save FILE` writes it",
    )  # fmt: skip
    stream.add_argument(
        "--max-memory", metavar="SIZE", type=arguments.readable(arguments.memory_size),
        help="the most that layers take at a time in each process, such as 4GB (default: no limit)",
    )  # fmt: skip
    stream.add_argument(
        "--device", type=arguments.readable(arguments.device),
        help="where layers are fitted, such as cuda (default: cpu)",
    )  # fmt: skip
    stream.add_argument(
        "--no-resume", action="store_false", dest="resume",
        help="refuse a TARGET that exists; by default the same job goes on where it stopped",
    )  # fmt: skip
    _add_work(stream)


def _fill_show(show: argparse.ArgumentParser) -> None:
    show.add_argument(
        "path", metavar="PATH",
        help="a decomposed file or folder, a plan, or an ordinary checkpoint; no weights are read",
    )  # fmt: skip
    _add_outputs(show)
    _add_traceback(show)


def _add_choice(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--rank",
        type=arguments.readable(spelled_rank),
        help="the rank of every layer, in one of the forms below",
    )
    made.add_argument(
        "--layer-rank", metavar="GLOB=RANK", type=arguments.readable(arguments.layer_rank),
        action="append", default=[],
        help="the rank of the layers that GLOB names, repeatable; --rank is for all others",
    )  # fmt: skip
    made.add_argument(
        "--methods", type=arguments.readable(arguments.methods),
        help="with commas between them: each layer takes the first that can decompose it, or with "
        "a budget the one that loses least (default: svd)",
    )  # fmt: skip
    for option, words in (
        ("--include", "decompose only these layers"),
        ("--exclude", "leave these layers alone"),
    ):
        made.add_argument(
            option, metavar="GLOB", action="append", default=[],
            help=f"{words}: a name, a glob, or the name of a block of layers; repeatable",
        )  # fmt: skip


def _add_work(made: argparse.ArgumentParser) -> None:
    workers = made.add_mutually_exclusive_group()
    workers.add_argument(
        "--workers", metavar="N", type=arguments.readable(arguments.count),
        help="do the work in this many processes (default: in threads of this one)",
    )  # fmt: skip
    workers.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="do the work on the workers of the Dask scheduler there",
    )
    made.add_argument("--no-progress", action="store_false", dest="progress", help="show no bars")
    _add_traceback(made)


def _add_outputs(made: argparse.ArgumentParser) -> None:
    new_file = arguments.readable(arguments.new_file)
    made.add_argument("--save", metavar="FILE", type=new_file, help="write the plan as JSON")
    made.add_argument("--html", metavar="FILE", type=new_file, help="write the plan as one page")


def _add_traceback(made: argparse.ArgumentParser) -> None:
    made.add_argument("--traceback", action="store_true", help="show where an error was raised")
