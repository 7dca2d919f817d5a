"""The processes of torchrun meet, or say who is missing; one that ends is told to the others."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from clip_cid import os_errors
from clip_cid.errors import ClipCidError, DataError, RunError
from clip_cid.tasks import Place
from clip_cid.training.ranks import distributed, meeting
from clip_cid.training.ranks.distributed import ALONE, Ranks, meet_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]


def be_rank(rank: int, size: int, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")


def ended(rank: int, port: int, folder: Path, how: str) -> None:
    """Rank 0 ends as `how` says while the others wait for it; each of these writes what it is told."""
    be_rank(rank, 3, port)
    try:
        with meet_ranks() as ranks:
            ranks.wait()
            if ranks.is_main:
                end(how)
            ranks.wait()
    except ClipCidError as error:
        (folder / str(rank)).write_text(f"{error.problem}\n{error.fix}")
    except Exception:
        os._exit(1)


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {
        "ours": DataError("7 images are broken.", fix="Mend them."),
        "of the system": PermissionError(13, "Permission denied", "/there"),
        "a mistake": KeyError("x"),
    }[how]


@pytest.mark.parametrize(
    ("how", "problem", "fix"),
    [
        ("ours", "has ended: 7 images are broken.", "Mend them."),
        ("of the system", "has ended: /there: access is denied", "Give yourself access"),
        ("a mistake", "has ended: KeyError: 'x'", "Look at the output of that process."),
        ("killed", "lost another process", "it resumes"),
    ],
)
def test_the_error_of_one_process_ends_the_others_in_the_same_two_lines(
    tmp_path: Path, how: str, problem: str, fix: str
):
    port = processes.free_port()
    ranks = [processes.start(ended, rank, port, tmp_path, how) for rank in range(3)]
    for rank in ranks:
        rank.join(processes.PATIENCE)
        assert rank.exitcode is not None, "it waits for one that has ended"
    for rank in (1, 2):
        told, what = (tmp_path / str(rank)).read_text().splitlines()
        assert problem in told
        assert fix in what
        assert how == "killed" or told.startswith("rank 0 on ")


def stuck(rank: int, port: int, folder: Path, where: str) -> None:
    """Rank 0 ends; the other does not notice, as with a device that waits for the other's."""
    be_rank(rank, 2, port)
    meeting._STUCK = 0.5
    with open(folder / str(rank), "w") as handle:
        os.dup2(handle.fileno(), sys.stderr.fileno())
    if where == "while they connect":
        dist.init_process_group = lambda *_, **__: gone_or_waiting(rank, folder / "connects")
    with meet_ranks() as ranks:
        if ranks.is_main:
            raise DataError("7 images are broken.", fix="Mend them.")
        time.sleep(600)


def gone_or_waiting(rank: int, sign: Path) -> None:
    """Rank 0 ends once the other is past the meeting and waits for a connection."""
    if rank == 1:
        sign.touch()
        time.sleep(600)
    while not sign.exists():
        time.sleep(0.02)
    os._exit(1)


@pytest.mark.parametrize(
    ("where", "problem"),
    [("at work", "has ended: 7 images are broken.\nMend them.\n"), ("while they connect", "lost another process")],
)
def test_a_process_that_does_not_notice_is_ended_with_the_same_two_lines(tmp_path: Path, where: str, problem: str):
    port = processes.free_port()
    ranks = [processes.start(stuck, rank, port, tmp_path, where) for rank in range(2)]
    for rank in ranks:
        rank.join(processes.PATIENCE)
        assert rank.exitcode == 1
    said = (tmp_path / "1").read_text()
    assert "clip-cid: rank " in said
    assert problem in said


def lonely(rank: int, port: int, folder: Path) -> None:
    be_rank(rank, 3, port)
    meeting._MEETING = datetime.timedelta(seconds=1.5)
    try:
        with meet_ranks():
            pass
    except RunError as error:
        (folder / str(rank)).write_text(str(error))


@pytest.mark.parametrize("there", [[0], [2], [0, 2]])
def test_processes_that_do_not_come_are_not_waited_for(tmp_path: Path, there: list[int]):
    port = processes.free_port()
    ranks = [processes.start(lonely, rank, port, tmp_path) for rank in there]
    for rank in ranks:
        rank.join(processes.PATIENCE)
        assert rank.exitcode == 0
    for rank in there:
        said = (tmp_path / str(rank)).read_text()
        assert f"rank {rank} of 3 on " in said
        assert "within 1.5 seconds" in said
        assert "Start the same torchrun command on every machine" in said


def test_a_process_that_ends_during_the_meeting_is_told_as_ended(monkeypatch: pytest.MonkeyPatch):
    class Ended(HashStore):
        """Its process has ended: every call fails."""

        def wait(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise dist.DistNetworkError("failed to recv, got 0 bytes")

        check = wait  # pyright: ignore[reportAssignmentType]

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4711")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(Ended(), 1, 2)]))
    with pytest.raises(RunError, match=r"rank 1 of 2 on .*: the process at 127.0.0.1:4711 .* has ended") as error:
        meeting.Meeting(Place(1, 2))
    assert "says why in its own output" in error.value.fix


def test_those_who_are_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "_MEETING", datetime.timedelta(seconds=0.1))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(HashStore(), 1, 4)]))
    with pytest.raises(RunError, match=r"rank 1 of 4 on .*: rank 0, 2, 3 did not come within 0.1 seconds"):
        meeting.Meeting(Place(1, 4))


def test_only_errors_of_the_connection_are_of_another_rank():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:34567")
    assert meeting.is_of_another_rank(lost)
    assert os_errors.explain(lost) is None
    error = RuntimeError("the backward failed")
    error.__cause__ = lost
    assert meeting.is_of_another_rank(error)
    assert not meeting.is_of_another_rank(RuntimeError("shapes differ"))
    assert not meeting.is_of_another_rank(DataError("gloo.tar: broken.", fix=""))


def test_what_another_rank_has_made_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A host may remember for a while that it was not there; alone there is nobody to wait for."""
    looks: list[bool] = []

    def seen_at_the_third_look() -> bool:
        looks.append(True)
        return len(looks) == 3

    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert Ranks(1, 2).sees(seen_at_the_third_look)
    monkeypatch.setattr(distributed, "_UNSEEN_SECONDS", 0.01)
    assert not Ranks(1, 2).sees(lambda: False)
    assert not ALONE.sees(lambda: False)
    with pytest.raises(RunError, match=r"rank 1 on .* does not see it") as error:
        Ranks(1, 2).find(tmp_path / "step-000004.pt")
    assert "must be a shared one" in error.value.fix
