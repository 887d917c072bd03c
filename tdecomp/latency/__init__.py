"""Measured time: of layers and their chains, of whole models, and what it says of a choice."""

from tdecomp.latency.measuring import profile
from tdecomp.latency.profile import Profile, check_profile
from tdecomp.latency.setting import Setting
from tdecomp.latency.timing import Time
from tdecomp.latency.whole import Speed, compare, measured_speed

__all__ = [
    "Profile",
    "Setting",
    "Speed",
    "Time",
    "check_profile",
    "compare",
    "measured_speed",
    "profile",
]
