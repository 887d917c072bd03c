"""With blocks that always put back what they change, whenever Ctrl-C is pressed.

What a thread has entered is noted in order, so that leaving one block also leaves those entered
after it that were not left (as in a generator that was never finished).
"""

import _thread
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any, Self

# Functions that are always run to their end.
_UNINTERRUPTED = {"__enter__", "__exit__", "__del__"}
# Seconds after which an interrupt that came at such a moment is raised again.
_DELAY = 0.01


class _Interrupts:
    """The handler of SIGINT while this library has changed something.

    An interrupt that arrives while a context manager (anybody's) is entered or left, or while
    `deferrals` is above 0, is repeated a moment later, and at the latest when the outermost scope
    of this library has restored everything. All others go to the handler that was there before,
    which by default raises KeyboardInterrupt. Python runs signal handlers in the main thread only,
    so that all of this is about that thread.
    """

    def __init__(self) -> None:
        self.deferrals = 0
        self._previous: Any = None
        # The frame that entered the outermost scope; None outside of it.
        self._outermost: FrameType | None = None
        self._ending = False
        self._pending = False
        # Threads that are about to repeat an interrupt, and whether one just has.
        self._waiting: list[None] = []
        self._repeated = False

    def begin(self, frame: FrameType) -> None:
        """Take over SIGINT until `end`, unless it is ignored or ends the process."""
        previous = signal.getsignal(signal.SIGINT)
        if not callable(previous):
            return
        if previous != self._handle:  # it is where a model put it back after its own
            self._previous = previous
        self._outermost, self._ending = frame, False
        signal.signal(signal.SIGINT, self._handle)

    def end(self) -> None:
        """Put the handler back, then raise an interrupt that is still pending."""
        if self._outermost is None:
            return
        self._ending = True
        while self._waiting:
            time.sleep(0.001)
        if self._pending:
            time.sleep(0)  # a repeated signal reaches this thread at a system call at the latest
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)
        self._outermost, self._repeated = None, False
        self.raise_pending()

    def raise_pending(self) -> None:
        """Raise an interrupt that is pending, at a moment when nothing is half done."""
        if self._pending:
            self._pending = False
            self._previous(signal.SIGINT, sys._getframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self._repeated = self._repeated, False
        if repeated and not self._pending:  # it has been raised meanwhile
            return
        if self._outermost is not None and (self.deferrals or self._uninterrupted(frame)):
            self._pending = True
            if not self._ending:
                self._waiting.append(None)
                # Not a `Thread`, whose locks the interrupted function may hold.
                try:
                    _thread.start_new_thread(self._repeat, ())
                except RuntimeError:  # no more threads: it is raised at the end
                    self._waiting.pop()
        else:
            self._pending = False
            self._previous(number, frame)

    def _uninterrupted(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._outermost:
            if frame.f_code.co_name in _UNINTERRUPTED:
                return True
            frame = frame.f_back
        return False

    def _repeat(self) -> None:
        time.sleep(_DELAY)
        if self._pending:
            self._repeated = True
            if hasattr(signal, "pthread_kill"):  # this wakes a thread that waits, too
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)
            else:
                _thread.interrupt_main()
        self._waiting.pop()


_INTERRUPTS = _Interrupts()


class _Entered(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_ENTERED = _Entered()


class Scope:
    """A `with` block after which everything is undone that `change` noted, the last first."""

    def __init__(self) -> None:
        self.undo = ExitStack()

    def change(self) -> None:
        """Change the state, each time after noting in `self.undo` how to restore it."""

    def __enter__(self) -> Self:
        scopes = _ENTERED.scopes
        try:
            if not scopes and threading.current_thread() is threading.main_thread():
                _INTERRUPTS.begin(sys._getframe(1))
            scopes.append(self)
            self.change()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        scopes = _ENTERED.scopes
        # None if it was left already, with one around it.
        inner = scopes[scopes.index(self) :] if self in scopes else []
        try:
            with ExitStack() as leave:  # which goes on where one of them fails
                for scope in inner:
                    leave.callback(scopes.remove, scope)
                    leave.callback(scope.undo.close)
        finally:
            if not scopes and threading.current_thread() is threading.main_thread():
                _INTERRUPTS.end()


class interrupts_deferred(Scope):
    """An interrupt (Ctrl-C) is raised after the block, not inside."""

    def change(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.undo.callback(setattr, _INTERRUPTS, "deferrals", _INTERRUPTS.deferrals)
            _INTERRUPTS.deferrals += 1


def raise_pending_interrupt() -> None:
    """Raise an interrupt that has waited for `__enter__` or `__exit__`, from inside of them."""
    if threading.current_thread() is threading.main_thread():
        _INTERRUPTS.raise_pending()
