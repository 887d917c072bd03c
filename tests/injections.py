"""Ctrl-C and errors put into a running call: after some seconds, or at some of its lines."""

import ast
import signal
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import tdecomp

ROOT = str(Path(tdecomp.__file__).parent)


def press():
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


class Alarm:
    """Presses Ctrl-C after some seconds, and again each `interval`, until the block is over."""

    def __init__(self, seconds, interval=0.0):
        self.seconds, self.interval = max(1e-5, seconds), interval

    def __str__(self):
        return f"Ctrl-C after {self.seconds:.6f} s" + f", each {self.interval:.6f} s" * bool(
            self.interval
        )

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, self.interval)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def _ring(self, _number, frame):
        if frame.f_code not in (self.__enter__.__code__, self.__exit__.__code__):
            press()


class AtLine:
    """Does something when the block runs a line (file, number) of this library for the n-th time.

    The line that begins a `with` does not count: Python says that it runs once more before the
    block is left, where nothing that happens by itself keeps `__exit__` from being called. Where
    `errors` are raised, lines that restore something do not count either. `hits` are those that do.
    """

    def __init__(self, line, nth, action, errors):
        self.line, self.nth, self.action, self.errors = line, nth, action, errors
        self.hits = Counter()

    def __str__(self):
        file, number = self.line
        return f"{self.action} at {Path(file).name}:{number}, the {self.nth}. time"

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _on_call(self, frame, _event, _argument):
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        return None if self.errors and _restores(frame) else self._on_line

    def _on_line(self, frame, event, _argument):
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            withs, restoring = _special_lines(line[0])
            if line[1] not in withs and not (self.errors and line[1] in restoring):
                self.hits[line] += 1
                if line == self.line and self.hits[line] == self.nth:
                    sys.settrace(None)
                    self.action()
        return self._on_line


def _restores(frame):
    """Whether a function was called, through others or not, to restore something."""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name == "__exit__":
            return True
        if file.startswith(ROOT) and frame.f_lineno in _special_lines(file)[1]:
            return True
        frame = frame.f_back
    return False


@cache
def _special_lines(file):
    """The lines of a file that begin a `with`, and those that restore or go on with an error."""
    withs, restoring = set(), set()
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.With):
            withs.update(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Try) and node.finalbody:
            restoring.update(range(node.finalbody[0].lineno, node.finalbody[-1].end_lineno + 1))
        elif isinstance(node, ast.ExceptHandler) and any(
            isinstance(part, ast.Raise) and part.exc is None for part in ast.walk(node)
        ):
            restoring.update(range(node.lineno, node.end_lineno + 1))
    return withs, restoring
