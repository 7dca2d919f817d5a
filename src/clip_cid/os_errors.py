"""The one place that turns failures of files, disks and memory into two lines: what and where, then what to do.

PyTorch, safetensors, pyarrow and NumPy pass on what the system said in words of their own, mostly without the file.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_cid.errors import ClipCidError, ConfigError, RunError

_ROOM = "Free some room"
_OTHER_PLACE = "Give a folder on a file system that can be written"
_ACCESS = "Give yourself access to it, or another path"
_NETWORK = "Bring the file system back"
_MEMORY = (
    "memory ran out",
    "Lower machine.workers or the batch (machine.embed_batch, machine.micro_batch), or use a machine with more memory",
)
_KILLED = (
    "a process that decodes images was killed",
    "Memory or /dev/shm ran out: lower machine.workers (0 decodes in this process) or the batch (distill.batch_size,"
    " machine.embed_batch)",
)
_SHORT_WRITE = ("could not be written whole; most often the disk is full", _ROOM)
_UNKNOWN = ("cannot be read or written", "Put this right")
_MEANINGS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("the file is larger than the file system or `ulimit -f` allows", "Raise the limit"),
    errno.EIO: ("the disk failed to read or write", "Check the disk (`dmesg` names it) or use another"),
    errno.EROFS: ("the file system is read-only", _OTHER_PLACE),
    errno.EACCES: ("access is denied", _ACCESS),
    errno.EPERM: ("the system does not permit this", _ACCESS),
    errno.EMFILE: (
        "too many files are open in this process",
        "Raise the limit (`ulimit -n 65536`), or lower machine.workers",
    ),
    errno.ENFILE: ("too many files are open on this machine", "Close other programs"),
    errno.ENOMEM: _MEMORY,
    errno.ENOENT: ("no such file or folder", "Correct the path; if something deleted the file, bring it back"),
    errno.EEXIST: ("exists already", "Move it away, or give another path"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "Correct the path, or move the file away"),
    errno.EISDIR: ("is a folder where a file is needed", "Correct the path, or move the folder away"),
    errno.ENOTEMPTY: ("the folder is not empty", "See that nothing else writes there"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "Give a shorter path"),
    errno.ELOOP: ("symbolic links go round in a circle", "Correct the links"),
    errno.EMLINK: ("too many links to one file", "Copy the file"),
    errno.EXDEV: ("lies on two file systems", "Keep the folder on one file system"),
    errno.EBUSY: ("is in use by another program", "Wait for it to end"),
    errno.ENXIO: ("the device does not answer", "Check the device"),
    errno.ENODEV: ("the device does not answer or cannot do this", "Check the device"),
    errno.EOPNOTSUPP: ("the file system cannot do this", "Use a folder on another file system"),
    errno.ESTALE: ("the network file system has lost this file", _NETWORK),
    errno.ETIMEDOUT: ("the network or its file system does not answer", _NETWORK),
    errno.EHOSTDOWN: ("the host of the file system is down", _NETWORK),
    errno.ENOTCONN: ("the file system is not connected any more", _NETWORK),
    errno.EREMOTEIO: ("the network file system failed", _NETWORK),
}
_OF_ABSENCE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_OF_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

# Where the texts of libraries hold the system's number, its words, and the path.
_NUMBER = re.compile(r"\[[Ee]rrno (\d+)\]|\(os error (\d+)\)|\bOs \{ code: (\d+)|Error code (\d+) \(")
_WORDS = re.compile(r"strerror: (.+)")
_PATHS = re.compile(
    r"local file '(.+?)'|at path \"(.+?)\"|Parent directory (.+?) does not exist|File (.+?) cannot be opened"
    r"|\[Errno \d+\] [^:]+: '(?:.*' -> ')?(.+?)'"
)
_TORCH_WRITES = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+|iostream error")
_NUMPY_WRITES = re.compile(r"\d+ requested and \d+ written")
_TOO_MANY_FILES = re.compile(r"^Too many open files|received \d+ items of ancdata")  # PyTorch's, between processes
_WORKER_KILLED = re.compile(r"DataLoader worker \(pid")  # raised wherever this process is at that moment
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory")


@contextlib.contextmanager
def explained(where: Path, *, what: Callable[[], str] = str, kept: str = "") -> Iterator[None]:
    """Raise a failure of the system inside as two lines.

    Args:
        where: Named if the failure names no file.
        what: Says at that moment what has stopped; stands behind what is wrong.
        kept: What is safe; stands behind what to do.

    Raises:
        RunError: A file could not be read or written, or memory ran out.
    """
    try:
        yield
    except Exception as error:
        problem = explain(error, where=where, what=what(), kept=kept)
        if problem is None:
            raise
        raise problem from error


@contextlib.contextmanager
def named(path: Path, *, temporary: Path | None = None) -> Iterator[None]:
    """Failures inside that name no file, or `temporary`, are of `path`."""
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and (cause.filename is None or str(cause.filename) == str(temporary)):
            cause.filename = str(path)
        raise


def explain(error: Exception, *, where: Path | None = None, what: str = "", kept: str = "") -> RunError | None:
    """A failure of the system in two lines; None if `error` is something else."""
    if isinstance(error, ClipCidError):
        return None
    cause = _cause(error)
    code, text = _code(cause), " ".join(str(cause).split())
    meaning = _meaning(cause, code, text)
    if meaning is None:
        return None

    said = f"{errno.errorcode.get(code, code)}: {os.strerror(code)}" if code else text or type(cause).__name__
    path = _path(cause, code, text) or where or "a file or stream"
    problem, remedy = meaning
    return RunError(
        f"{path}: {problem}{what} ({_shortened(said)}).",
        fix=f"{remedy}, then run the same command again. {kept}".rstrip(),
    )


def may_pass(error: BaseException | None) -> bool:
    """Whether a failure of the system may be gone at the next try, unlike a file that is missing or damaged.

    Libraries raise errors of their own from such a failure, some of them more than once.
    """
    causes = [_cause(one) for one in _chain(error)]
    return any(isinstance(cause, MemoryError) or _code(cause) not in _OF_ABSENCE for cause in causes)


def refuse_address(path: Path) -> None:
    """Refuse `s3://bucket/run` and the like where a folder is made or read: `Path` makes a folder `s3:` of it.

    Raises:
        ConfigError: The path is an address.
    """
    if address := address_of(path):
        raise ConfigError(
            f"{address}: an address, where only a path on this machine can be used.",
            fix="Give a folder on a disk or on a mounted file system; copy from or to the address yourself.",
        )


def address_of(path: Path) -> str:
    """The address that a path was made from; empty if it is a path. An absolute path always is one."""
    match = _ADDRESS.match(str(path))
    return f"{match[1]}://{match[2]}" if match else ""


def disk_full(error: OSError) -> bool:
    """Whether a write failed because the disk or quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _cause(error: BaseException) -> BaseException:
    """When a file object fails, PyTorch raises an error of its own while it handles that one."""
    if isinstance(error, RuntimeError) and _TORCH_WRITES.search(str(error)) and isinstance(error.__context__, OSError):
        return error.__context__
    return error


def _code(cause: BaseException) -> int | None:
    """The system's number of the failure, from the error or from its text."""
    if isinstance(cause, OSError) and cause.errno is not None:
        return cause.errno
    if not _may_be_of_the_system(cause):
        return None
    if number := _NUMBER.search(str(cause)):
        return int(next(filter(None, number.groups())))
    if words := _WORDS.search(str(cause)):
        return next((code for code in errno.errorcode if os.strerror(code) == words[1].strip()), None)
    return None


def _may_be_of_the_system(cause: BaseException) -> bool:
    return isinstance(cause, OSError | RuntimeError) or type(cause).__name__ == "SafetensorError"


def _meaning(cause: BaseException, code: int | None, text: str) -> tuple[str, str] | None:
    """What is wrong and what to do; None if it is no failure of the system."""
    if isinstance(cause, MemoryError):
        return _MEMORY
    if not _may_be_of_the_system(cause):
        return None
    if code is not None:
        return _MEANINGS.get(code, _UNKNOWN)
    if isinstance(cause, FileNotFoundError):  # pyarrow's has no number
        return _MEANINGS[errno.ENOENT]
    if _NUMPY_WRITES.search(text) or _TORCH_WRITES.search(text):
        return _SHORT_WRITE
    if _TOO_MANY_FILES.search(text):
        return _MEANINGS[errno.EMFILE]
    if _WORKER_KILLED.search(text):
        return _KILLED
    if _OUT_OF_MEMORY.search(text):
        return _MEMORY
    if _PATHS.search(text) or isinstance(cause, OSError):
        return _UNKNOWN
    return None


def _path(cause: BaseException, code: int | None, text: str) -> str:
    """The file that the error names; the target of a copy that could not be written."""
    if isinstance(cause, OSError):
        names = [name for name in (cause.filename, cause.filename2) if isinstance(name, str | bytes | Path)]
        if names:
            return os.fsdecode(names[-1 if code in _OF_WRITES else 0])
    found = _PATHS.search(text)
    return next(filter(None, found.groups()), "") if found else ""


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
