"""Failures of files, disks and memory in two lines, from the words of each library."""

import errno
import io
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from clip_cid import cli, os_errors
from clip_cid.errors import ConfigError, DataError, RunError
from clip_cid.joining import join_teachers
from clip_cid.new_folder import new_folder
from clip_cid.run_folder import RunFolder, atomic_file
from clip_cid.training import checkpoint

BIG = torch.rand(200_000)  # 800,000 bytes


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may not grow beyond 100 kB: every library meets a real failure of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_npy(path: Path) -> None:
    np.save(path, BIG.numpy())


def save_npz(path: Path) -> None:
    with path.open("wb") as handle:
        np.savez(handle, a=BIG.numpy())


def save_parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": BIG.numpy()}), path)


def save_torch(path: Path) -> None:
    checkpoint.save_best(path.parent, {"a": BIG})


def save_text(path: Path) -> None:
    path.write_text("x" * 200_000)


def save_safetensors(path: Path) -> None:
    save_file({"a": BIG}, path)


WRITERS = [save_npy, save_npz, save_parquet, save_torch, save_text, save_safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_a_write_that_fails_is_two_lines_that_name_the_place(
    tmp_path: Path, small_files: None, write: Callable[[Path], None]
) -> None:
    with (
        pytest.raises(RunError) as error,
        os_errors.explained(tmp_path, what=lambda: "; no result", kept="The rest is kept."),
    ):
        write(tmp_path / "result")
    assert str(tmp_path) in error.value.problem
    assert "; no result (" in error.value.problem
    assert "\n" not in error.value.problem + error.value.fix
    assert error.value.fix.endswith("then run the same command again. The rest is kept.")
    assert ("ulimit -f" in error.value.problem) != (write is save_npy)  # NumPy does not say why


@pytest.mark.parametrize("write", [save_npz, save_parquet, save_text])
def test_a_whole_or_absent_file_is_named_as_itself_and_not_by_its_temporary_name(
    tmp_path: Path, small_files: None, write: Callable[[Path], None]
) -> None:
    with pytest.raises(RunError) as error, os_errors.explained(tmp_path), atomic_file(tmp_path / "own") as temporary:
        write(temporary)
    assert error.value.problem.startswith(f"{tmp_path / 'own'}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_is_named_as_itself(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=f"^{tmp_path}/none/own: no such"),
        os_errors.explained(tmp_path),
        atomic_file(tmp_path / "none" / "own") as temporary,
    ):
        temporary.write_text("x")


@pytest.mark.parametrize(
    "code",
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE),
        *(errno.ENOMEM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ENOTEMPTY, errno.EXDEV, errno.EBUSY, errno.ENOENT, errno.EEXIST, errno.EPROTO),
    ],
)
def test_the_system_s_own_words_come_with_ours(code: int) -> None:
    problem = os_errors.explain(OSError(code, os.strerror(code), "/data/a.npy"))
    assert problem is not None
    assert problem.problem.startswith("/data/a.npy: ")
    assert problem.problem.endswith(f"({errno.errorcode[code]}: {os.strerror(code)}).")
    assert problem.fix.endswith("then run the same command again.")


def test_a_copy_without_room_names_its_target_and_an_unreadable_one_its_source() -> None:
    problems = [os_errors.explain(OSError(code, "", "from", None, "to")) for code in (errno.ENOSPC, errno.EIO)]
    assert [problem and problem.problem.partition(":")[0] for problem in problems] == ["to", "from"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("/data/x.parquet"), "no such file or folder"),
        (OSError("100000 requested and 72176 written"), "could not be written whole"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), "not be written whole"),
        (RuntimeError("[enforce fail] . open file failed with strerror: Is a directory"), "is a folder"),
        (RuntimeError("Parent directory /a/none does not exist."), "/a/none: cannot be"),
        (MemoryError((1 << 50,), "float64"), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot allocate memory)"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "memory ran out"),
        (
            OSError("Caught OSError in DataLoader worker process 0.\n[Errno 24] Too many open files: '/a/b'"),
            "/a/b: too",
        ),
        (shutil.Error([("/a", "/b", "[Errno 28] No space left on device: '/a' -> '/b'")]), "/b: the disk is full"),
        (OSError("Corrupt snappy compressed data."), "Corrupt snappy"),
        (RuntimeError("DataLoader worker (pid 8720) is killed by signal: Killed. "), "decodes images was killed"),
        (RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"), "decodes images was killed"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "too many files"),
        (RuntimeError("received 0 items of ancdata"), "too many files"),
    ],
)
def test_libraries_words_are_understood(error: Exception, words: str) -> None:
    problem = os_errors.explain(error)
    assert problem is not None
    assert words in problem.problem


@pytest.mark.parametrize(
    "error", [ValueError("[Errno 28] of mine"), KeyError("x"), RuntimeError("shapes differ"), DataError("a", fix="b")]
)
def test_a_mistake_of_the_program_keeps_its_traceback(error: Exception) -> None:
    assert os_errors.explain(error) is None
    with pytest.raises(type(error)), os_errors.explained(Path("here")):
        raise error


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "RUN"],
        ["verify", "RUN"],
        ["run", "RUN", "--recipe", "RUN/recipe.yaml"],
        ["init", "RUN/new.yaml"],
        ["sample", "RUN/sample", "--pairs", "30"],
    ],
)
def test_every_command_says_in_two_lines_that_a_file_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "file"))

    monkeypatch.setattr("clip_cid.pipeline.states", fail)
    monkeypatch.setattr("clip_cid.pipeline.verify", fail)
    monkeypatch.setattr("clip_cid.run_folder.os.replace", fail)
    monkeypatch.setattr("clip_cid.data.sample.write.write_sample", fail)
    assert cli.main([argument.replace("RUN", str(tmp_path)) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith(f"clip-cid: {tmp_path}")
    assert "the disk failed to read or write" in lines[-2]
    assert lines[-1].startswith("Check the disk")


class FullDevice(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_results_that_cannot_be_printed_are_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout", FullDevice())
    assert cli.main(["init", str(tmp_path / "recipe.yaml")]) == 1
    assert capsys.readouterr().err.splitlines()[0].startswith("clip-cid: standard output: the disk is full")


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (None, False),
        (OSError(errno.EIO, ""), True),
        (OSError(errno.EMFILE, ""), True),
        (MemoryError(), True),
        (RuntimeError("I/O error: Input/output error (os error 5)"), True),
        (FileNotFoundError(errno.ENOENT, ""), False),
        (RuntimeError("I/O error: No such file (os error 2)"), False),
        (OSError("Corrupt snappy compressed data."), False),
        (ValueError("[Errno 5]"), False),
    ],
)
def test_what_may_pass_is_told_from_what_is_missing_or_damaged(error: Exception | None, passing: bool) -> None:
    assert os_errors.may_pass(error) is passing


@pytest.mark.parametrize(("code", "passing"), [(errno.ESTALE, True), (errno.EIO, True), (errno.ENOENT, False)])
def test_what_may_pass_is_found_behind_errors_of_libraries(code: int, passing: bool) -> None:
    """open_clip raises a ValueError from whatever failed while it read a configuration."""
    error = DataError("cannot be loaded", fix="")
    error.__cause__ = ValueError("Could not load valid config")
    error.__cause__.__cause__ = OSError(code, "")
    assert os_errors.may_pass(error) is passing


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/runs/a", "s3://bucket/runs/a"),
        ("gs://bucket", "gs://bucket"),
        ("hf://datasets/org/name", "hf://datasets/org/name"),
        ("file:///tmp/run", "file://tmp/run"),
        ("runs/a", ""),
        ("runs/a:b/c", ""),
        ("/mnt/s3:/bucket", ""),
        ("C:/runs", ""),
        ("a:b", ""),
    ],
)
def test_an_address_is_told_from_a_path_whatever_path_makes_of_it(given: str, address: str):
    assert os_errors.address_of(Path(given)) == address


def test_an_address_is_refused_wherever_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Before, a folder `s3:` appeared, and results in it."""
    monkeypatch.chdir(tmp_path)
    address = "s3://bucket/run"
    (tmp_path / "run").mkdir()
    (tmp_path / "r.yaml").write_text("pairs: {source: [a.tar]}\n")
    stages = ("run", "check", "embed", "balance", "cluster", "texts", "distill", "evaluate", "draw", "report")
    commands = [
        *([stage, address] for stage in stages),
        *([command, address] for command in ("status", "verify", "init")),
        ["balance", address, "--embeddings", "x.npy"],
        ["subset", address, "out"],
        ["subset", "run", address],
        ["export", address, "out"],
        ["export", "run", address],
        ["push", address, "org/name"],
        ["join", "a", "b", address],
        ["ablate", "losses", "r.yaml", address],
        ["sample", address],
        ["run", "run", "--machine.cache-dir", "s3://bucket/run"],
    ]
    for command in commands:
        assert cli.main(command) == 2, command
        said = capsys.readouterr().err.strip()
        assert "s3://bucket/run" in said, command
        assert "path on this machine" in said, command
        assert said.count("\n") == 1 or "settings: 1 problem" in said, command
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["r.yaml", "run"]


def test_python_is_refused_as_the_command_line_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for make in (RunFolder, lambda path: new_folder(path).__enter__(), lambda path: join_teachers([], path)):
        with pytest.raises(ConfigError, match="s3://bucket/x: an address"):
            make(Path("s3://bucket/x"))
    assert list(tmp_path.iterdir()) == []
