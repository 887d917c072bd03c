"""A stream that was stopped goes on, to the same bytes."""

import json
import os
import resource
import shutil
from concurrent.futures import Executor, Future

import pytest
import torch

import tdecomp
from benchmarks.scale.killed import digests, kill_and_resume
from benchmarks.support.fresh_process import in_fresh_process
from tdecomp.streaming.target import WORK, WorkFolder
from tests.streaming.folders import SINGLE, unknown

QUIET = {"progress": False}
JOBS = 6  # a question to each of three layers, a copy, and two fits

# Bits are equal at one number of threads: those of an executor, of the stream and of what it is
# compared with.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed") / "source"
    unknown(folder, shards=3)
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "target"
    stream(source, target)
    return digests(target)


def stream(source, target, **options):
    given = {"rank": tdecomp.Budget(params=0.5), "include": "*", **QUIET, **options}
    return tdecomp.stream(source, target, "svd", **given)


class Interrupted(Executor):
    """Runs what is submitted at once, up to a number of jobs; then Ctrl-C is pressed."""

    def __init__(self, jobs):
        self.left = jobs

    def submit(self, function, /, *args, **kwargs):
        if args and not self.left:
            raise KeyboardInterrupt
        self.left -= bool(args)  # without any it is only asked whether it runs
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


@pytest.mark.parametrize("jobs", range(JOBS))
def test_after_ctrl_c_it_goes_on(source, whole, tmp_path, jobs):
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        stream(source, target, executor=Interrupted(jobs))
    assert not jobs or [path.name for path in target.iterdir()] == [WORK]
    counted = Interrupted(100)
    stream(source, target, executor=counted)
    assert 100 - counted.left == JOBS - jobs  # none is made twice
    assert digests(target) == whole


def test_killed_at_random_moments(tmp_path):
    found = in_fresh_process(kill_and_resume, tmp_path, 2)
    assert found.identical == 2


def test_stopped_while_files_are_put_in_their_places(source, whole, tmp_path):
    target = tmp_path / "target"
    stream(source, target)
    begun = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        stream(source, begun, executor=Interrupted(JOBS - 1))
    # As where all is written, one of the files is moved, and a draft of another is left.
    shutil.copytree(begun / WORK, target / WORK)
    (target / "config.json").unlink()
    (target / "tdecomp.json").unlink()
    (target / ".0123.draft").write_text("{")
    stream(source, target)
    assert digests(target) == whole


@pytest.mark.parametrize("lost", [True, False])
def test_a_finished_target_that_was_damaged(source, tmp_path, lost):
    target = tmp_path / "target"
    stream(source, target)
    file = min(target.glob("*.safetensors"))
    if lost:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    before = digests(target)
    with pytest.raises(ValueError, match=r"target was finished, and is damaged: .* call again"):
        stream(source, target)
    assert digests(target) == before


def test_a_finished_target_is_left_as_it_is(source, whole, tmp_path):
    target = tmp_path / "target"
    report = stream(source, target)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    (target / WORK).mkdir()  # as where it was killed when all was done
    again = stream(source, target)
    assert again.to_dict()["after"] == report.to_dict()["after"]
    assert [r.weight_error for r in again] == [r.weight_error for r in report]
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert digests(target) == whole


@pytest.mark.parametrize("finished", [True, False])
def test_another_job_is_refused(source, tmp_path, finished):
    target = tmp_path / "target"
    if finished:
        stream(source, target)
    else:
        with pytest.raises(KeyboardInterrupt):
            stream(source, target, executor=Interrupted(3))
    before = digests(target)
    for options, words in {
        "rank": ({"rank": 4}, r"rank: Budget\(.*, now Fixed\(rank=4\)"),
        "exclude": ({"exclude": "2"}, r"exclude: \[\], now \['2'\]"),
        "resume": ({"resume": False}, "there already, and resume=False"),
    }.values():
        with pytest.raises(ValueError, match=words):
            stream(source, target, **options)
    with pytest.raises(ValueError, match=r"methods: \['SVD\(.*\)'\], now \['SplitSVD"):
        tdecomp.stream(
            source, target, "split-svd", rank=tdecomp.Budget(params=0.5), include="*", **QUIET
        )
    assert digests(target) == before


class Chosen(tdecomp.RankSelector):
    """Takes the rank that a function says."""

    def __init__(self, rank):
        self.rank = rank

    def select(self, sites, *_):
        return [tdecomp.Choice(site[0], self.rank()) for site in sites]


def test_where_a_selector_is_in_memory_makes_no_other_job(source, tmp_path):
    first, second = (Chosen(lambda: 4) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        stream(source, tmp_path / "target", rank=first, executor=Interrupted(1))
    assert all(row.rank == 4 for row in stream(source, tmp_path / "target", rank=second))


def test_a_source_that_changed_is_refused(tmp_path):
    unknown(tmp_path / "source")
    source, target = tmp_path / "source", tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        stream(source, target, executor=Interrupted(3))
    os.utime(source / SINGLE, ns=(1, 1))
    with pytest.raises(ValueError, match=f"{SINGLE} of the source: it was written again"):
        stream(source, target)


def test_other_versions_are_told(source, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        stream(source, target, executor=Interrupted(3))
    job = WorkFolder(target).job()
    job["versions"]["torch"] = "1.0"
    (WorkFolder(target).path / "job.json").write_text(json.dumps(job))
    with pytest.raises(ValueError, match=rf"torch: 1.0, now {torch.__version__.split('+')[0]}"):
        stream(source, target)


def test_what_no_stream_wrote_is_refused(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"files that no stream wrote \(mine.txt\)"):
        stream(source, target)
    (target / "mine.txt").unlink()
    stream(source, target, resume=False)  # an empty folder is none


def test_a_call_that_chose_nothing_leaves_nothing(source, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="cannot be met"):
        tdecomp.stream(
            source, target, "svd", rank=tdecomp.Budget(params=0.001), include="0", **QUIET
        )
    # The questions that were answered are kept: with more room they would be asked again.
    shutil.rmtree(target)
    with pytest.raises(ValueError, match="above the largest useful rank"):
        stream(source, target, rank=1000)
    assert not target.exists()


def test_two_at_a_time_are_refused(source, tmp_path):
    target = tmp_path / "target"
    with WorkFolder(target).alone(), pytest.raises(ValueError, match="another process is writing"):
        stream(source, target)


def test_a_full_disk_is_told_and_gone_on_from(source, whole, tmp_path):
    target = tmp_path / "target"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(KeyboardInterrupt):
        stream(source, target, executor=Interrupted(4))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"no room on the disk: .* takes .*B there; what is"):
            stream(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in target.iterdir()] == [WORK]
    stream(source, target)
    assert digests(target) == whole


def test_the_disk_has_to_have_room_for_all_files(tmp_path):
    unknown(tmp_path / "source")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "source" / "tokenizer.model").open("wb") as opened:
        opened.truncate(shutil.disk_usage(tmp_path).free + 1)  # a hole, which takes nothing
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # it is never really copied
    try:
        with pytest.raises(
            OSError, match=r"no room on the disk: .* takes .*B there, .*B are free$"
        ):
            stream(tmp_path / "source", tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
