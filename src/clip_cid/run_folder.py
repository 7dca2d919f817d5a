"""The run folder: its stage folders, each whole or absent, and a record of how each was made.

A stage fills `balance.part/`. When every file there is on the disk for good, its record is written into that folder
as `manifest.json`, and one rename makes results and record appear together as `balance/`. A process killed at any
instant, or a power cut, leaves either the old results or the new ones.

Work that other settings have left, finished or not, is moved to `aside/`; the same settings again bring it back.
"""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from clip_cid import log, os_errors
from clip_cid.errors import RunError
from clip_cid.file_digests import FileDigests, digest, sha256_file

MANIFEST = "manifest.json"
WORK = "work"
"""In a stage's work folder, what is no result: removed only when the results are whole, so no kill loses it."""
_PART, _OLD, _ASIDE, _LOCK = ".part", ".old", "aside", ".lock"
_MADE_FROM, _KEEP_OLD = "made-from.json", ".keep-old"
_TEMPORARY = re.compile(r"\..*\.(?:tmp|part|drop)-(?:(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}|(?P<old_pid>\d+))")
_PROBE_SECONDS = 0.2  # longer than `at_work` holds the lock
_FIRST_PROCESSES = 0xEFFFFFFC  # the inode that Linux gives the numbers of processes outside all containers
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
    """Stage -> its `results`, and setting -> a digest of what its files held, when they were read."""
    summary: dict[str, Any]
    versions: dict[str, str]
    device: str
    started: str
    seconds: float
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    by_contents: bool = False
    """Whether `inputs` knows files by their contents; older versions knew sizes and times."""
    equals: str | None = None
    """The `results` of an earlier record, if these say the same to the stages after them."""

    @property
    def results(self) -> str:
        """A digest of the stage's key and of every byte it wrote: the input of the stages after it.

        The key alone would not do: the same training, made again on a GPU, gives another student.
        """
        return self.equals or digest([self.key, {name: file.sha256 for name, file in self.files.items()}])


class Begun(NamedTuple):
    """The work folder of a stage that begins."""

    part: Path
    resumes: bool
    """It holds the work of an attempt with the same settings and inputs."""
    aside: Path | None
    """Where unfinished work of other settings was moved."""


class Work(NamedTuple):
    """What a process does in a run folder."""

    holder: str
    """The process: pid, host, and since when."""
    stage: str = ""
    """What it runs; empty before its first stage."""
    since: str = ""
    """When the stage began."""


class RunFolder:
    """One run: `embed/`, `balance/`, ... each whole or absent.

    Raises:
        ConfigError: The path is an address such as s3://bucket/run.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        os_errors.refuse_address(path)
        self.path, self.read_only = path, read_only
        self._forgotten: set[str] = set()
        self._lock: int | None = None
        self._verified: set[tuple[str, str]] = set()
        self._same_as_before: dict[str, bool] = {}
        self._all_of_before: dict[str, bool] = {}
        self.accepted = False
        """Whether the stage that runs has accepted its settings."""
        self._on_accept: list[Callable[[], None]] = []

    @property
    def index(self) -> Path:
        """Where the index of the pairs is kept."""
        return self.path / "index"

    @functools.cached_property
    def digests(self) -> FileDigests:
        """The digests of files made elsewhere, each read once."""
        return FileDigests(self.index / "digests.jsonl", read_only=self.read_only)

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

    def say_of_before(self, stage: str, *, same: bool, all_of_it: bool) -> None:
        """A stage says how its new results stand to the present ones.

        Args:
            stage: The stage.
            same: They say the same to the stages after it.
            all_of_it: They hold all that took long to make.
        """
        self._same_as_before[stage], self._all_of_before[stage] = same, all_of_it

    def holds_the_same(self, stage: str) -> bool:
        return self._same_as_before.get(stage, False)

    def holds_all_of_before(self, stage: str) -> bool:
        return self._all_of_before.get(stage, False)

    def forgets(self, stage: str) -> bool:
        """Whether `forget` was called for this stage: nothing made before is to be used again."""
        return stage in self._forgotten

    def earlier(self, stage: str) -> Path | None:
        """The stage's present results, which the run is about to replace; None if files have changed."""
        if not self.has(stage) or self.forgets(stage) or self.damage(stage):
            return None
        return None if self.changed_files(stage, digests=True) else self.path / stage

    def when_accepted(self, then: Callable[[], None]) -> None:
        """What to do as soon as a stage accepts its settings; if it refuses them, nothing is done."""
        self._on_accept.append(then)

    def accept(self) -> None:
        """A stage calls this once its settings and inputs are checked, before its long work: they count from now on."""
        self.accepted = True
        waiting, self._on_accept = self._on_accept, []
        for then in waiting:
            then()

    def refuse(self, begun: Begun) -> None:
        """The stage that has begun refused its settings: the work folder is as it was before `begin`."""
        self._on_accept = []
        if not begun.resumes:
            remove_folder(begun.part)
        if begun.aside is not None and not os.path.lexists(begun.part):
            os.replace(begun.aside, begun.part)
            with contextlib.suppress(OSError):  # holds other work
                (self.path / _ASIDE).rmdir()

    def record(self, stage: str) -> StageRecord | None:
        """How a finished stage was made; None if it has not finished.

        Raises:
            RunError: The record is damaged, or of another version.
        """
        if not self.has(stage):
            return None
        return _read_record(self.path / stage, f"Run `clip-cid {stage} {self.path} --force` to make the stage again.")

    def damage(self, stage: str) -> str:
        """Why the record of a finished stage cannot be read; empty if it can, or if there is none."""
        try:
            self.record(stage)
        except RunError as error:
            return error.problem
        return ""

    def lost(self, stage: str) -> str:
        """That a stage's folder is a link to a place where nothing is, such as a disk that is not mounted, in words."""
        path = self.path / stage
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {os.readlink(path)}, where nothing is"
        return ""

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
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process works in this run folder ({_work(handle).holder}).",
                    fix="Wait for it to end, or give another folder.",
                ) from error
            except OSError as error:
                log.warn(
                    f"{self.path}: this file system cannot lock files ({error.strerror}); see to it yourself that no"
                    " second command works in this run folder meanwhile"
                )

            # Say who holds the lock, and put right what an earlier process left.
            _sign_lock(handle, Work(f"pid {os.getpid()} on {socket.gethostname()} since {now()}"))
            self._check_own_folders()
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

    def unfinished(self, stage: str) -> dict[str, Any] | None:
        """What the work that a killed attempt has left was to be made from; None if there is none."""
        return _made_from(self.part(stage))

    def begin(self, stage: str, made_from: dict[str, Any], *, resumable: bool) -> Begun:
        """The stage's work folder: empty, or (resumable) as an earlier attempt with equal `made_from` left it.

        What another `made_from` has left is moved aside if it can be resumed. Work that was moved aside comes back.

        Args:
            stage: The stage.
            made_from: All that decides its results, as JSON.
            resumable: Whether a killed attempt leaves work that the next one resumes.
        """
        part, aside, resumes = self.part(stage), None, False
        if os.path.lexists(part):
            resumes = resumable and _made_from(part) == made_from
            if not resumes and resumable and _holds_work(part):
                aside = self._put_aside(part, stage)
            elif not resumes:
                remove_folder(part)

        if not os.path.lexists(part):
            own = next((path for path in self.asides(stage) if _made_from(path) == made_from), None)
            resumes = own is not None
            if own is not None:
                os.replace(own, part)
            else:
                part.mkdir()
                write_json(part / _MADE_FROM, made_from)

        _remove_temporaries(part)
        self._sign(stage)
        return Begun(part, resumes, aside)

    def begin_again(self, stage: str) -> Path:
        """Move aside what the work folder holds, and give a new one for the same settings."""
        part = self.part(stage)
        made_from = _made_from(part) or {}
        aside = self._put_aside(part, stage)
        part.mkdir()
        write_json(part / _MADE_FROM, made_from)
        return aside

    def drop_unfinished(self, stage: str) -> bool:
        """Remove the work that a killed attempt has left; returns whether there was any."""
        part = self.part(stage)
        held = os.path.lexists(part) and _holds_work(part)
        remove_folder(part)
        return held

    def asides(self, stage: str) -> list[Path]:
        """The stage's results and unfinished work of other settings that were moved aside, the latest first."""
        found = [path for path in self.path.glob(f"{_ASIDE}/{stage}-*") if _aside_number(path, stage)]
        return sorted(found, key=lambda path: _aside_number(path, stage), reverse=True)

    def finished_asides(self, stage: str) -> Iterator[tuple[Path, StageRecord]]:
        """Those that are whole results, with their records."""
        for path in self.asides(stage):
            with contextlib.suppress(RunError):
                if (path / MANIFEST).is_file():
                    yield path, _read_record(path, "")

    def take_back(self, stage: str, aside: Path) -> None:
        """Make results that were moved aside the stage's results again; the present ones take their place."""
        final = self.path / stage
        if os.path.lexists(final):
            self._put_aside(final, stage)
        os.replace(aside, final)
        sync(self.path)

    def publish(self, record: StageRecord, *, keep_old: bool = False) -> StageRecord:
        """Make the stage's work folder its result, with digests of every file; returns the completed record.

        Args:
            record: How the results came to be.
            keep_old: Move the present results aside instead of removing them.
        """
        part = self.part(record.stage)
        _remove_temporaries(part)
        sync_tree(part, leave_out=part / WORK)
        results = [path for path in part.rglob("*") if path.is_file() and not path.is_relative_to(part / WORK)]
        names = sorted(path for path in results if path.name not in (_MADE_FROM, _KEEP_OLD))
        complete = replace(record, files={str(path.relative_to(part)): file_record(path) for path in names})
        if keep_old:
            (part / _KEEP_OLD).touch()

        # From here on a killed publish is finished by the next process.
        write_json(part / MANIFEST, asdict(complete))
        self._swap(record.stage)
        self._verified.add((record.stage, complete.results))
        self._sign("")
        return complete

    def adopt(self, stage: str, other: "RunFolder", *, keep_old: bool = False) -> None:
        """Take over a stage as another run finished it, record included; the caller holds the lock.

        If the file system can, the files are linked and not copied: no process writes into a finished stage.
        """
        source, part = other.stage(stage), self.part(stage)
        remove_folder(part)
        without = {str(source): [MANIFEST]}
        shutil.copytree(source, part, copy_function=link_or_copy, ignore=lambda path, _: without.get(str(path), []))
        sync_tree(part, leave_out=part / WORK)
        if keep_old:
            (part / _KEEP_OLD).touch()
        link_or_copy(source / MANIFEST, part / MANIFEST)  # last: a work folder that has one is whole
        self._swap(stage)

    def verify(self, stage: str) -> None:
        """Read every byte of a finished stage, once in this process, before long work trusts it.

        Raises:
            RunError: A file is not as it was written.
        """
        record = self.record(stage)
        if record is None or (stage, record.results) in self._verified:
            return
        if changes := self.changed_files(stage, digests=True):
            raise RunError(
                f"{self.path / stage}: {changes[0]}, and was not when {stage} finished"
                f" ({len(changes):,} such files of {len(record.files):,}).",
                fix=f"Run `clip-cid {stage} {self.path} --force` to make the stage again.",
            )
        self._verified.add((stage, record.results))

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

    def _check_own_folders(self) -> None:
        """What is not a stage can be used, before long work relies on it."""
        for path in (self.index, self.path / _ASIDE):
            if os.path.lexists(path) and not path.is_dir():
                kind = f"a link to {os.readlink(path)}, where no folder is" if path.is_symlink() else "not a folder"
                raise RunError(f"{path}: {kind}.", fix="Remove it or move it away; it is made again.")
        aside = self.path / _ASIDE
        if aside.is_dir() and aside.stat().st_dev != self.path.stat().st_dev:
            raise RunError(
                f"{aside}: lies on another disk ({aside.resolve()}), where earlier results cannot be moved at once.",
                fix="Move the link or the folder away; it is made again beside the stages.",
            )

    def _sign(self, stage: str) -> None:
        """Say in the lock's file which stage runs."""
        if self._lock is not None:
            _sign_lock(self._lock, Work(_work(self._lock).holder, stage, now()))

    def _swap(self, stage: str) -> None:
        """Put a complete work folder in the place of the stage's old results."""
        part, final, old = (self.path / f"{stage}{suffix}" for suffix in (_PART, "", _OLD))
        remove_folder(part / WORK)
        _remove_temporaries(part)  # a kill may have left the work folder half removed
        (part / _MADE_FROM).unlink(missing_ok=True)
        if final.is_symlink():
            log.warn(
                f"{final} was a link to {os.readlink(final)}, which stays as it is; the new results are in {final}"
            )
        if os.path.lexists(final):
            if (part / _KEEP_OLD).exists():
                aside = self._put_aside(final, stage)
                log.info(f"{stage:<9} the earlier results are kept in {aside}; their settings again bring them back")
            else:
                os.replace(final, old)
        (part / _KEEP_OLD).unlink(missing_ok=True)
        os.replace(part, final)
        sync(self.path)
        remove_folder(old)

    def _put_aside(self, path: Path, stage: str) -> Path:
        (self.path / _ASIDE).mkdir(exist_ok=True)
        latest = max((_aside_number(aside, stage) for aside in self.asides(stage)), default=0)
        aside = self.path / _ASIDE / f"{stage}-{latest + 1}"
        if path.is_symlink():  # a relative one would point elsewhere from there
            aside.symlink_to(path.resolve())
            path.unlink()
        else:
            os.replace(path, aside)
        sync(aside.parent)
        sync(self.path)
        return aside

    def _mend(self) -> None:
        """Finish or undo the renames that a kill interrupted, and remove the files that it left half written."""
        for part in sorted(self.path.glob(f"*{_PART}")):
            if (part / MANIFEST).is_file():
                self._swap(part.name.removesuffix(_PART))
            elif not _holds_work(part):
                remove_folder(part)
        for old in sorted(self.path.glob(f"*{_OLD}")):
            final = self.path / old.name.removesuffix(_OLD)
            if os.path.lexists(final):
                remove_folder(old)
            else:
                os.replace(old, final)
        for folder in (self.path, self.index):
            for path in folder.glob(".*"):
                if _is_left_by_a_dead_process(path.name):
                    _remove(path)


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


def _read_record(folder: Path, fix: str) -> StageRecord:
    path = folder / MANIFEST
    values = read_json(path)
    try:
        files = {name: FileRecord(**entry) for name, entry in values.pop("files").items()}
        return StageRecord(**values, files=files)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a stage record of this version ({error}).", fix=fix) from error


def _made_from(folder: Path) -> dict[str, Any] | None:
    """What the work in a folder is made from; None if nothing there says so."""
    try:
        values: Any = json.loads((folder / _MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(dict[str, Any], values) if isinstance(values, dict) else None


def _holds_work(part: Path) -> bool:
    if not part.is_dir():
        return True  # not ours, so not ours to remove
    return any(
        path.is_file() and path.name != _MADE_FROM and not _TEMPORARY.fullmatch(path.name) for path in part.rglob("*")
    )


def _aside_number(path: Path, stage: str) -> int:
    number = path.name.removeprefix(f"{stage}-")
    return int(number) if number.isdecimal() else 0


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there. A kill leaves it whole, or under a name that nobody reads.

    Of a link, what it points to stays.
    """
    if not os.path.lexists(path):
        return
    dropped = path.with_name(f".{path.name}.drop-{own_mark()}")
    os.replace(path, dropped)
    _remove(dropped)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written; the caller knows that no process writes here now."""
    left = [path for path in folder.rglob(".*") if _TEMPORARY.fullmatch(path.name)]
    for path in left:
        _remove(path)


def _is_left_by_a_dead_process(name: str) -> bool:
    """Whether a name is a temporary one of a process that is gone; of another host nobody can say."""
    match = _TEMPORARY.fullmatch(name)
    if match is None or match["host"] not in (None, own_host()):
        return False
    return not lives(int(match["pid"] or match["old_pid"]))


def lives(process: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file that nobody changes any more; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def now() -> str:
    """The time as manifests keep it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def own_mark() -> str:
    """A part of a temporary name that no other process uses, on this host or another, nor this one twice."""
    return f"{own_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def own_host() -> str:
    """This host as temporary names have it; in a container also whose numbers of processes these are.

    Containers may share the name of a host, while each of them has a process 7.
    """
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        return socket.gethostname()
    return socket.gethostname() if processes == _FIRST_PROCESSES else f"{socket.gethostname()}.{processes}"


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """A temporary path beside `path` that takes its place, on disk for good, when the block ends well.

    Raises:
        FileExistsError: The temporary file is another's; it stays as it is.
    """
    temporary = path.with_name(f".{path.name}.tmp-{own_mark()}")
    with os_errors.named(path, temporary=temporary):
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # no other writer has this name
    try:
        with os_errors.named(path, temporary=temporary):
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is there whole or not at all; NaN and infinity are refused, since JSON has none."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: The file is missing or not JSON.
        OSError: It cannot be read now, which may pass: nobody may take it for missing.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if os_errors.may_pass(error):
            raise
        raise RunError(
            f"{path}: cannot be read ({error}).", fix="Run the stage that wrote it again, with --force."
        ) from error


def file_record(path: Path) -> FileRecord:
    status = path.stat()
    return FileRecord(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256_file(path))


def sync_tree(folder: Path, *, leave_out: Path | None = None) -> None:
    """Bring every file under `folder`, and the folders themselves, to the disk for good."""
    for path, _, names in os.walk(folder, topdown=False):
        left_out = leave_out is not None and Path(path).is_relative_to(leave_out)
        for name in [] if left_out else names:
            sync(Path(path) / name)
        sync(Path(path))


def sync(path: Path) -> None:
    """Make the contents of a file, or the renames in a folder, survive a power cut."""
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
