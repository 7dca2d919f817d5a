"""The run folder: its stage folders, each whole or absent, and a record of how each was made.

A stage fills `balance.part/`. Its record is written into that folder as `manifest.json`, and one
rename makes results and record appear together as `balance/`. A process killed at any instant leaves
either the old results or the new ones.
"""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from clip_cid import os_errors
from clip_cid.errors import RunError
from clip_cid.file_digests import FileDigests, digest, sha256_file

MANIFEST = "manifest.json"
_PART, _OLD, _KEY, _LOCK = ".part", ".old", "stage-key", ".lock"
_PROBE_SECONDS = 0.2  # longer than `at_work` holds the lock
_held_locks: set[int] = set()


@dataclass(frozen=True)
class FileRecord:
    """A file of a finished stage, as it was written."""

    bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """How a stage's results came to be."""

    stage: str
    key: str
    version: int
    settings: dict[str, Any]
    """The recipe sections the result depends on."""
    inputs: dict[str, str]
    """Stage -> its `results`, and source -> a digest of its files, when they were read."""
    summary: dict[str, Any]
    versions: dict[str, str]
    device: str
    started: str
    seconds: float
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])

    @property
    def results(self) -> str:
        """A digest of the stage's key and of every byte it wrote: the input of the stages after it.

        The key alone would not do: the same training, made again on a GPU, gives another student.
        """
        return digest([self.key, {name: file.sha256 for name, file in self.files.items()}])


class Work(NamedTuple):
    """What a process does in a run folder."""

    holder: str
    """The process: pid, host, and since when."""
    stage: str = ""
    """What it runs; empty before its first stage."""
    since: str = ""
    """When the stage began."""


class RunFolder:
    """One run: `embed/`, `balance/`, ... each whole or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forgotten: set[str] = set()
        self._lock: int | None = None

    @property
    def index(self) -> Path:
        """Where the index of the pairs is kept."""
        return self.path / "index"

    @functools.cached_property
    def digests(self) -> FileDigests:
        """The digests of files made elsewhere, each read once."""
        return FileDigests(self.index / "digests.jsonl")

    def has(self, stage: str) -> bool:
        return (self.path / stage / MANIFEST).is_file()

    def stage(self, stage: str) -> Path:
        """The folder of a finished stage.

        Raises:
            RunError: The stage has not finished here.
        """
        if not self.has(stage):
            raise RunError(
                f"{self.path}: the {stage} stage has not finished here.",
                fix=f"Run `clip-cid {stage} {self.path}` first.",
            )
        return self.path / stage

    def forget(self, stage: str) -> None:
        """From now on `earlier` gives nothing for this stage, so it starts from nothing."""
        self._forgotten.add(stage)

    def forgets(self, stage: str) -> bool:
        """Whether `forget` was called for this stage: nothing made before is to be used again."""
        return stage in self._forgotten

    def earlier(self, stage: str) -> Path | None:
        """The stage's present results, which the run is about to replace; None if files have changed."""
        if not self.has(stage) or self.forgets(stage) or self.changed_files(stage, digests=True):
            return None
        return self.path / stage

    def record(self, stage: str) -> StageRecord | None:
        """How a finished stage was made; None if it has not finished."""
        if not self.has(stage):
            return None
        path = self.path / stage / MANIFEST
        values = read_json(path)
        try:
            files = {name: FileRecord(**entry) for name, entry in values.pop("files").items()}
            return StageRecord(**values, files=files)
        except (AttributeError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}: not a stage record of this version ({error}).",
                fix=f"Run `clip-cid {stage} {self.path} --force` to make the stage again.",
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Lock the folder against other processes; the system frees the lock when this one dies.

        Raises:
            RunError: Another process works here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be used as a run folder ({error.strerror}).",
                fix="Give a folder you can write to.",
            ) from error

        _held_locks.add(handle)
        try:
            try:
                _lock(handle)
            except OSError as error:
                raise RunError(
                    f"{self.path}: another process works in this run folder ({_work(handle).holder}).",
                    fix="Wait for it to end, or give another folder.",
                ) from error

            # Say who holds the lock, and put right what an earlier process left.
            _sign_lock(handle, Work(f"pid {os.getpid()} on {socket.gethostname()} since {now()}"))
            self._mend()
            self._lock = handle
            yield
        finally:
            self._lock = None
            _held_locks.remove(handle)
            os.close(handle)

    def at_work(self) -> Work | None:
        """What another process does here now; None if none does."""
        try:
            handle = os.open(self.path / _LOCK, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, which `lock` waits out
        except BlockingIOError:
            return _work(handle)
        except OSError:  # a file system without locks
            return None
        finally:
            os.close(handle)
        return None

    def part(self, stage: str) -> Path:
        """The stage's work folder, which `begin` makes."""
        return self.path / f"{stage}{_PART}"

    def begin(self, stage: str, key: str, *, resumable: bool) -> Path:
        """The stage's work folder: empty, or (resumable) as an earlier attempt with the same key left it."""
        part = self.part(stage)
        mark = part / _KEY
        if part.exists() and not (resumable and mark.is_file() and mark.read_text() == key):
            shutil.rmtree(part)
        if not part.exists():
            part.mkdir()
            mark.write_text(key)
        self._sign(stage)
        return part

    def resumes(self, stage: str, key: str) -> bool:
        """Whether a killed attempt with the same key has left work that can be resumed."""
        mark = self.part(stage) / _KEY
        return mark.is_file() and mark.read_text() == key

    def publish(self, record: StageRecord) -> StageRecord:
        """Make the stage's work folder its result, with digests of every file; returns the completed record."""
        part = self.part(record.stage)
        names = sorted(path for path in part.rglob("*") if path.is_file() and path.name != _KEY)
        complete = replace(record, files={str(path.relative_to(part)): file_record(path) for path in names})
        # From here on a killed publish is finished by the next process.
        write_json(part / MANIFEST, asdict(complete))
        self._swap(record.stage)
        self._sign("")
        return complete

    def adopt(self, stage: str, other: "RunFolder") -> None:
        """Take over a stage as another run finished it, record included; the caller holds the lock.

        If the file system can, the files are linked and not copied: no process writes into a finished stage.
        """
        source, part = other.stage(stage), self.part(stage)
        if part.exists():
            shutil.rmtree(part)
        without = {str(source): [MANIFEST]}
        shutil.copytree(source, part, copy_function=_link, ignore=lambda path, _: without.get(str(path), []))
        _link(source / MANIFEST, part / MANIFEST)  # last: a work folder that has one is whole
        self._swap(stage)

    def changed_files(self, stage: str, *, digests: bool) -> list[str]:
        """The files that differ from the record, by size and time, or (digests) by every byte."""
        record = self.record(stage)
        if record is None:
            return []
        changes: list[str] = []
        for name, expected in record.files.items():
            path = self.path / stage / name
            if not path.is_file():
                changes.append(f"{name} is missing")
            elif (status := path.stat()).st_size != expected.bytes:
                changes.append(f"{name} has {status.st_size:,} bytes, not {expected.bytes:,}")
            elif digests and sha256_file(path) != expected.sha256:
                changes.append(f"{name} has other contents")
            elif not digests and status.st_mtime_ns != expected.mtime_ns and sha256_file(path) != expected.sha256:
                changes.append(f"{name} changed on disk")
        return changes

    def _sign(self, stage: str) -> None:
        """Say in the lock's file which stage runs."""
        if self._lock is not None:
            _sign_lock(self._lock, Work(_work(self._lock).holder, stage, now()))

    def _swap(self, stage: str) -> None:
        """Put a complete work folder in the place of the stage's old results."""
        part, final, old = (self.path / f"{stage}{suffix}" for suffix in (_PART, "", _OLD))
        (part / _KEY).unlink(missing_ok=True)
        if final.exists():
            os.replace(final, old)
        os.replace(part, final)
        _sync_folder(self.path)
        if old.exists():
            shutil.rmtree(old)

    def _mend(self) -> None:
        """Finish or undo the renames that a kill interrupted."""
        for part in sorted(self.path.glob(f"*{_PART}")):
            if (part / MANIFEST).is_file():
                self._swap(part.name.removesuffix(_PART))
        for old in sorted(self.path.glob(f"*{_OLD}")):
            final = self.path / old.name.removesuffix(_OLD)
            if final.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, final)


def _lock(handle: int) -> None:
    """Take the lock, or raise OSError; moments in which `at_work` holds it are waited out."""
    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _sign_lock(handle: int, work: Work) -> None:
    """Write into the lock's file who holds it."""
    content = "\n".join(work).encode()
    os.pwrite(handle, content, 0)
    os.ftruncate(handle, len(content))


def _work(handle: int) -> Work:
    lines = os.pread(handle, 1000, 0).decode(errors="replace").splitlines()
    return Work(*lines[:3]) if lines else Work("unknown")


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def now() -> str:
    """The time as manifests keep it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def own_mark() -> str:
    """A part of a temporary name that no other process uses, on this host or another, nor this one twice."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """A temporary path beside `path` that takes its place, on disk for good, when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp-{own_mark()}")
    try:
        with os_errors.named(path, temporary=temporary):
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is there whole or not at all; NaN and infinity are refused, since JSON has none."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}).", fix="Run the stage that wrote it again, with --force."
        ) from error


def file_record(path: Path) -> FileRecord:
    status = path.stat()
    return FileRecord(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256_file(path))


def _sync_folder(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _close_locks() -> None:
    """A forked worker shares the locks: one that outlives a killed process for a moment would keep the folder shut."""
    for handle in _held_locks:
        os.close(handle)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_locks)
