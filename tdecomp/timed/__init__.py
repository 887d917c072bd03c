"""A choice of methods and ranks with measured times."""

from tdecomp.timed.choice import Timed, TimedChoice
from tdecomp.timed.clock import Clock

__all__ = ["Clock", "Timed", "TimedChoice"]
