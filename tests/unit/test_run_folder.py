import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from clip_cid import run_folder
from clip_cid.errors import RunError
from clip_cid.run_folder import Begun, RunFolder, StageRecord, atomic_file, own_host, read_json, write_json


def record(stage: str = "balance", key: str = "k1") -> StageRecord:
    return StageRecord(
        stage=stage,
        key=key,
        version=1,
        settings={"balance": {"threshold": 0.07}},
        inputs={},
        summary={"kept": 3},
        versions={},
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )


def publish(folder: RunFolder, text: str, key: str = "k1") -> None:
    part = folder.begin("balance", {"key": key}, resumable=False).part
    (part / "kept.txt").write_text(text)
    folder.publish(record(key=key))


def test_a_stage_is_absent_until_it_is_published(tmp_path: Path):
    folder = RunFolder(tmp_path)
    part = folder.begin("balance", {"key": "k1"}, resumable=False).part
    (part / "kept.txt").write_text("1")
    assert not folder.has("balance")
    with pytest.raises(RunError, match="clip-cid balance"):
        folder.stage("balance")
    folder.publish(record())
    assert (folder.stage("balance") / "kept.txt").read_text() == "1"
    assert not part.exists()


def test_the_record_comes_back_with_the_digest_of_every_file(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    found = folder.record("balance")
    assert found is not None
    assert found.summary == {"kept": 3}
    assert list(found.files) == ["kept.txt"]
    # SHA-256 of "abc", from the standard (FIPS 180-2, appendix B.1)
    assert found.files["kept.txt"].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_publishing_again_replaces_the_old_results(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "old")
    publish(folder, "new", key="k2")
    assert (folder.stage("balance") / "kept.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["balance"]


class Killed(BaseException):
    """Stands for the process dying at that call."""


@pytest.mark.resume
@pytest.mark.parametrize("dies_at", range(6))
def test_killed_at_any_rename_of_publish_the_old_or_the_new_results_are_there(
    tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch
):
    folder = RunFolder(tmp_path)
    publish(folder, "old")
    part = folder.begin("balance", {"key": "k2"}, resumable=False).part
    (part / "kept.txt").write_text("new")
    calls = 0
    replace = os.replace

    def dying_replace(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        nonlocal calls
        if calls == dies_at:
            raise Killed
        calls += 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        try:
            folder.publish(record(key="k2"))
            died = False
        except Killed:
            died = True
    assert died == (dies_at < 4)  # manifest, old away, new in place, old to be removed
    with folder.lock():
        found = folder.record("balance")
        assert found is not None
        text = (folder.stage("balance") / "kept.txt").read_text()
        assert (found.key, text) in (("k1", "old"), ("k2", "new"))
        assert (text == "new") == (dies_at > 0)
        unpublished = ["balance.part"] if dies_at == 0 else []
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "balance", *unpublished]


def begin(folder: RunFolder, key: str) -> Begun:
    return folder.begin("embed", {"key": key}, resumable=True)


@pytest.mark.resume
def test_work_of_other_settings_is_kept_aside_and_comes_back_with_them(tmp_path: Path):
    folder = RunFolder(tmp_path)
    begun = begin(folder, "k1")
    assert (begun.resumes, begun.aside) == (False, None)
    (begun.part / "shard").write_text("one")

    begun = begin(folder, "k2")
    assert (begun.resumes, begun.aside) == (False, tmp_path / "aside" / "embed-1")
    assert not (begun.part / "shard").exists()
    (begun.part / "shard").write_text("two")

    begun = begin(folder, "k1")
    assert (begun.resumes, begun.aside) == (True, tmp_path / "aside" / "embed-2")
    assert (begun.part / "shard").read_text() == "one"
    assert (begin(folder, "k2").part / "shard").read_text() == "two"
    assert len(folder.asides("embed")) == 1


@pytest.mark.resume
def test_a_work_folder_without_work_is_not_kept_aside(tmp_path: Path):
    folder = RunFolder(tmp_path)
    begin(folder, "k1")
    begun = begin(folder, "k2")
    assert (begun.resumes, begun.aside) == (False, None)


@pytest.mark.resume
def test_a_refused_stage_leaves_the_unfinished_work_where_it_was(tmp_path: Path):
    folder = RunFolder(tmp_path)
    (begin(folder, "k1").part / "shard").write_text("one")
    folder.refuse(begin(folder, "k2"))
    assert (folder.part("embed") / "shard").read_text() == "one"
    assert begin(folder, "k1").resumes
    assert folder.asides("embed") == []


@pytest.mark.resume
def test_results_behind_a_relative_link_are_kept_aside_and_taken_back(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    publish(folder, "old")
    (folder.path / "balance").rename(tmp_path / "other-disk")
    (folder.path / "balance").symlink_to("../other-disk")
    part = folder.begin("balance", {"key": "k2"}, resumable=False).part
    (part / "kept.txt").write_text("new")
    folder.publish(record(key="k2"), keep_old=True)
    ((aside, _),) = folder.finished_asides("balance")
    folder.take_back("balance", aside)
    assert (folder.stage("balance") / "kept.txt").read_text() == "old"
    assert (tmp_path / "other-disk" / "kept.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["aside", "index"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_folder_of_the_run_that_is_none_is_named_before_any_work(tmp_path: Path, name: str, kind: str):
    path = tmp_path / name
    path.write_text("x") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(RunError, match=f"{name}: (a link to .*, where no folder is|not a folder)"),
        RunFolder(tmp_path).lock(),
    ):
        pass


@pytest.mark.resume
def test_results_of_other_settings_are_kept_aside_and_taken_back(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "old")
    part = folder.begin("balance", {"key": "k2"}, resumable=False).part
    (part / "kept.txt").write_text("new")
    folder.publish(record(key="k2"), keep_old=True)
    ((aside, kept),) = folder.finished_asides("balance")
    assert (kept.key, (aside / "kept.txt").read_text()) == ("k1", "old")

    folder.take_back("balance", aside)
    assert (folder.stage("balance") / "kept.txt").read_text() == "old"
    assert folder.changed_files("balance", digests=True) == []
    ((aside, kept),) = folder.finished_asides("balance")
    assert (kept.key, (aside / "kept.txt").read_text()) == ("k2", "new")
    assert sorted(path.name for path in (tmp_path / "balance").iterdir()) == ["kept.txt", "manifest.json"]


@pytest.mark.resume
@pytest.mark.parametrize("dies_at", range(8))
def test_a_folder_killed_while_it_is_removed_is_whole_or_gone(tmp_path: Path, dies_at: int, monkeypatch):
    folder = RunFolder(tmp_path)
    part = folder.begin("embed", {"key": "k1"}, resumable=True).part
    for name in "abcd":
        (part / name).write_text(name)
    whole = {path.name for path in part.iterdir()}
    unlink, calls = os.unlink, 0

    def dying_unlink(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > dies_at:
            raise Killed
        unlink(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying_unlink)
        with contextlib.suppress(Killed):
            folder.drop_unfinished("embed")
    assert not part.exists() or {path.name for path in part.iterdir()} == whole
    with folder.lock():
        pass
    # What is left under a hidden name belongs to this process, which is alive; of a dead one it is removed.
    (left,) = [path for path in tmp_path.iterdir() if path.name != ".lock"] or [None]
    if left is not None:
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        left.rename(tmp_path / left.name.replace(f"-{os.getpid()}-", f"-{int(dead.stdout)}-"))
        with folder.lock():
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_half_written_files_are_never_published(tmp_path: Path):
    folder = RunFolder(tmp_path)
    part = folder.begin("balance", {"key": "k1"}, resumable=False).part
    (part / "kept.txt").write_text("1")
    for name in (".kept.npy.tmp-host-1-0123abcd", ".student.part-77", "work/.x.drop-host-1-99999999"):
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).mkdir()
        (part / name / "weights").write_text("half")
    assert list(folder.publish(record()).files) == ["kept.txt"]


@pytest.mark.parametrize("dangles", [False, True])
def test_a_stage_that_was_moved_and_linked_is_replaced_and_what_the_link_names_stays(tmp_path: Path, dangles: bool):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    publish(folder, "old")
    shutil.move(tmp_path / "run" / "balance", tmp_path / "elsewhere")
    (tmp_path / "run" / "balance").symlink_to(tmp_path / ("nowhere" if dangles else "elsewhere"))
    publish(folder, "new", key="k2")
    assert (folder.stage("balance") / "kept.txt").read_text() == "new"
    assert (tmp_path / "elsewhere" / "kept.txt").read_text() == "old"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["balance"]


def test_without_locks_in_the_file_system_a_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch, caplog):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunFolder(tmp_path).lock():
        pass
    assert "cannot lock files (No locks available)" in caplog.text


def test_every_file_is_on_the_disk_before_the_record_is(tmp_path: Path, monkeypatch):
    """A power cut may empty a file that was not synced."""
    folder = RunFolder(tmp_path)
    part = folder.begin("balance", {"key": "k1"}, resumable=False).part
    (part / "deep").mkdir()
    for name in ("kept.npy", "deep/table.parquet"):
        (part / name).write_bytes(b"1")
    inodes = {path.stat().st_ino for path in (part, part / "deep", part / "kept.npy", part / "deep" / "table.parquet")}
    synced: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def recording_fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checking_replace(source: Path, target: Path) -> None:
        assert inodes <= synced
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    folder.publish(record())
    assert folder.has("balance")


def test_results_are_verified_once_before_long_work(tmp_path: Path, monkeypatch):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    status = (tmp_path / "balance" / "kept.txt").stat()
    (tmp_path / "balance" / "kept.txt").write_bytes(bytes(3))  # as a power cut leaves it: zeros of equal size
    os.utime(tmp_path / "balance" / "kept.txt", ns=(status.st_mtime_ns, status.st_mtime_ns))
    folder.verify("balance")  # this process has just written it
    with pytest.raises(RunError, match="other contents") as caught:
        RunFolder(tmp_path).verify("balance")
    assert "--force" in caught.value.fix


def test_a_stage_that_cannot_resume_starts_empty(tmp_path: Path):
    folder = RunFolder(tmp_path)
    (folder.begin("balance", {"key": "k1"}, resumable=False).part / "half").write_text("")
    assert not (folder.begin("balance", {"key": "k1"}, resumable=False).part / "half").exists()


@pytest.mark.resume
def test_a_worker_that_outlives_its_killed_process_does_not_hold_the_folder(tmp_path: Path):
    program = f"""
import os, signal, sys
from pathlib import Path
from clip_cid.run_folder import RunFolder
with RunFolder(Path({str(tmp_path)!r})).lock():
    if os.fork() == 0:
        print("works", flush=True)
        sys.stdin.read()  # until the test ends
        os._exit(0)
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"works\n"
        process.kill()
        process.wait()
        with RunFolder(tmp_path).lock():
            pass


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path):
    program = f"""
from pathlib import Path
from clip_cid.errors import RunError
from clip_cid.run_folder import RunFolder
try:
    with RunFolder(Path({str(tmp_path)!r})).lock():
        print("entered")
except RunError as error:
    print(error.problem)
"""
    with RunFolder(tmp_path).lock():
        during = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    after = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"another process works in this run folder (pid {os.getpid()} on " in during
    assert after.strip() == "entered"


def test_what_a_process_does_here_is_told_to_others_while_it_does_it(tmp_path: Path):
    folder, other = RunFolder(tmp_path), RunFolder(tmp_path)
    assert other.at_work() is None
    with folder.lock():
        work = other.at_work()
        assert work is not None
        assert work.holder.startswith(f"pid {os.getpid()} on ")
        assert work.stage == ""

        folder.begin("balance", {"key": "key"}, resumable=False)
        work = other.at_work()
        assert work is not None
        assert work.stage == "balance"

        publish(folder, "abc")
        work = other.at_work()
        assert work is not None
        assert work.stage == ""
    assert other.at_work() is None
    assert RunFolder(tmp_path / "no such").at_work() is None


def test_asking_who_works_here_keeps_nobody_out(tmp_path: Path):
    with RunFolder(tmp_path).lock():
        pass
    asked = threading.Event()

    def ask() -> None:
        while not asked.is_set():
            RunFolder(tmp_path).at_work()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(200):
            with RunFolder(tmp_path).lock():
                pass
    finally:
        asked.set()
        thread.join()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "kept.txt is missing"),
        (lambda path: path.write_text("longer"), "kept.txt has 6 bytes, not 3"),
        (lambda path: path.write_text("abd"), "kept.txt changed on disk"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, spoil, says: str):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    assert folder.changed_files("balance", digests=False) == []
    spoil(tmp_path / "balance" / "kept.txt")
    assert folder.changed_files("balance", digests=False) == [says]


def test_digests_catch_a_change_that_kept_size_and_time(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    path = tmp_path / "balance" / "kept.txt"
    times = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder.changed_files("balance", digests=False) == []
    assert folder.changed_files("balance", digests=True) == ["kept.txt has other contents"]


def test_touching_a_file_does_not_count_as_a_change(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    (tmp_path / "balance" / "kept.txt").touch()
    assert folder.changed_files("balance", digests=False) == []


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail_half_way() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert read_json(path) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_json_refuses_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})


def test_a_record_of_another_shape_is_a_clear_error(tmp_path: Path):
    folder = RunFolder(tmp_path)
    publish(folder, "abc")
    (tmp_path / "balance" / "manifest.json").write_text(json.dumps({"stage": "balance", "files": {}}))
    with pytest.raises(RunError, match="--force"):
        folder.record("balance")


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_an_adopted_stage_is_the_others_file_by_file(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch):
    lender, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    (part := lender.path / "balance.part" / "deep").mkdir(parents=True)
    (part / "manifest.json").write_text("not the stage's own")
    (part.parent / "kept.txt").write_text("1")
    lender.publish(record())
    folder.path.mkdir()
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    folder.adopt("balance", lender)
    assert files(folder.stage("balance")) == files(lender.stage("balance"))
    assert folder.record("balance") == lender.record("balance")
    assert folder.changed_files("balance", digests=True) == folder.changed_files("balance", digests=False) == []
    shared = (folder.stage("balance") / "kept.txt").samefile(lender.stage("balance") / "kept.txt")
    assert shared == links


def test_making_an_adopted_stage_again_leaves_the_lenders_as_it_was(tmp_path: Path):
    lender, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    for one, text in ((lender, "lent"), (folder, "own")):
        one.path.mkdir()
        publish(one, text)
    folder.adopt("balance", lender)
    assert (folder.stage("balance") / "kept.txt").read_text() == "lent"
    publish(folder, "new", key="k2")
    assert (lender.stage("balance") / "kept.txt").read_text() == "lent"
    assert lender.changed_files("balance", digests=True) == []


@pytest.mark.resume
@pytest.mark.parametrize("dies_at", range(4))
def test_killed_while_adopting_the_stage_is_whole_or_absent(tmp_path: Path, dies_at: int, monkeypatch):
    lender, folder = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    lender.path.mkdir()
    (lender.begin("balance", {"key": "k1"}, resumable=False).part / "set_of.txt").write_text("0")
    (lender.part("balance") / "kept.txt").write_text("1")
    lender.publish(record())
    link, calls = os.link, 0

    def dying_link(source: str, target: str) -> None:
        nonlocal calls
        calls += 1
        if calls > dies_at:
            raise Killed
        link(source, target)

    folder.path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", dying_link)
        if dies_at < 3:  # two files and the record
            with pytest.raises(Killed):
                folder.adopt("balance", lender)
        else:
            folder.adopt("balance", lender)
    with folder.lock():
        assert folder.has("balance") == (dies_at == 3)
        folder.adopt("balance", lender)
    assert files(folder.stage("balance")) == files(lender.stage("balance"))


def test_a_temporary_name_holds_host_process_and_a_part_that_is_never_the_same(tmp_path: Path):
    seen: list[str] = []
    for _ in range(2):
        with atomic_file(tmp_path / "result.txt") as temporary:
            temporary.write_text("whole")
            seen.append(temporary.name)
    assert all(name.startswith(f".result.txt.tmp-{own_host()}-{os.getpid()}-") for name in seen)
    assert own_host().startswith(socket.gethostname())
    assert seen[0] != seen[1]
    assert [path.name for path in tmp_path.iterdir()] == ["result.txt"]


def test_two_writers_never_share_a_temporary_file_even_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else the second cuts what the first has written, and the first publishes it."""
    monkeypatch.setattr(run_folder, "own_mark", lambda: "host-1-01234567")
    with atomic_file(tmp_path / "result.txt") as first:
        first.write_text("whole")
        with pytest.raises(FileExistsError), atomic_file(tmp_path / "result.txt"):
            pytest.fail("the second writer has the file of the first")
        assert first.read_text() == "whole"
    assert (tmp_path / "result.txt").read_text() == "whole"


def test_what_a_container_that_shares_the_hosts_name_writes_is_not_swept(tmp_path: Path, monkeypatch):
    dead = 2**22 + 1  # above every number that Linux gives
    ours, theirs = (tmp_path / f".x.tmp-{socket.gethostname()}{of}-{dead}-0123abcd" for of in ("", ".4026532555"))
    monkeypatch.setattr(run_folder, "own_host", socket.gethostname)
    for path in (ours, theirs):
        path.touch()
    with RunFolder(tmp_path).lock():
        assert (ours.exists(), theirs.exists()) == (False, True)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_record_that_cannot_be_read_now_is_not_taken_for_missing_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed" / "manifest.json").write_text("{}")

    def fail(path: Path, **_: object) -> str:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    for read in (folder.record, folder.damage):
        with pytest.raises(OSError, match=os.strerror(code)):
            read("embed")


@pytest.mark.resume
def test_what_a_stage_works_with_is_removed_only_when_its_results_are_whole(tmp_path: Path, monkeypatch):
    folder = RunFolder(tmp_path)
    part = folder.begin("balance", {"key": "k1"}, resumable=True).part
    (part / "kept.txt").write_text("1")
    (part / "work").mkdir()
    (part / "work" / "task").write_text("hours")

    def dying_write(path: Path, value: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("clip_cid.run_folder.write_json", dying_write)
        with pytest.raises(Killed):
            folder.publish(record())
    assert (folder.begin("balance", {"key": "k1"}, resumable=True).part / "work" / "task").read_text() == "hours"
    assert list(folder.publish(record()).files) == ["kept.txt"]
    assert sorted(path.name for path in (tmp_path / "balance").iterdir()) == ["kept.txt", "manifest.json"]
