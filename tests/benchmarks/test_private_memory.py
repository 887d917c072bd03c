"""The most private memory of a process and of those that it starts, seen from outside."""

import subprocess
import sys

from benchmarks.support.private_memory import PrivatePeak

_BLOCK = 2**25  # bytes
# Fills a block of memory when it is told to and then, with "again", lets a child do so, too; all
# of it is held until the next line.
_PROCESS = f"""
import mmap, subprocess, sys
print("ready", flush=True)
input()
block = mmap.mmap(-1, {_BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block[::4096] = b"1" * ({_BLOCK} // 4096)
if "again" in sys.argv:
    command = [sys.executable, "-S", "-c", sys.argv[1]]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(b"go on\\n")
    child.stdin.flush()
    child.stdout.readline(), child.stdout.readline()
print("done", flush=True)
input()
if "again" in sys.argv:
    child.communicate(b"end\\n")
"""


def _peak(*arguments: str) -> float:
    """Of that process, in blocks; it is looked at all the time."""
    command = [sys.executable, "-S", "-c", _PROCESS, _PROCESS, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with PrivatePeak(process.pid, every=0.001) as watched:
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
        process.communicate("end\n")
    assert process.returncode == 0
    return watched.extra / _BLOCK


def test_of_one_process():
    assert 1 <= _peak() < 1.25


def test_of_a_process_and_what_it_starts():
    assert 2 <= _peak("again") < 2.75


def test_of_a_process_that_ends():
    with subprocess.Popen([sys.executable, "-S", "-c", "pass"]) as process:
        process.wait()
        with PrivatePeak(process.pid) as watched:
            pass
    assert watched.extra == 0
