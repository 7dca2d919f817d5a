"""Small Ray clusters of this host, and tasks that their workers can import."""

import contextlib
import errno
import functools
import importlib
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import clip_cid
from clip_cid.errors import DataError, MissingExtraError

_STORE_BYTES = 80 * 2**20  # no data pass through it
_WITHOUT = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
_ATTEMPTS = 5


@contextlib.contextmanager
def cluster(*cores: int) -> Generator[Any]:
    """A cluster of a node for each number of cores, the first one its head."""
    path = os.pathsep.join(str(folder.parent) for folder in (Path(clip_cid.__path__[0]), Path(__file__)))
    ours = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours
    nodes = importlib.import_module("ray.cluster_utils").Cluster()  # after what Ray reads once
    try:
        for number in cores:
            _add_node(nodes, number)
        yield nodes
    finally:
        nodes.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def grow(nodes: Any, count: int) -> None:
    """Add nodes of one core until there are so many."""
    while len(nodes.list_all_nodes()) < count:
        _add_node(nodes, 1)


def _add_node(nodes: Any, cores: int) -> None:
    """Ray gives a node 30 seconds to start, which under load are too few."""
    for attempt in range(_ATTEMPTS):
        try:
            nodes.add_node(num_cpus=cores, object_store_memory=_STORE_BYTES, **_WITHOUT)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == _ATTEMPTS - 1:
                raise


def workers(nodes: Any) -> list[int]:
    """The processes of a cluster that do tasks."""
    parents = {process.process.pid for node in nodes.list_all_nodes() for process in node.all_processes["raylet"]}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in parents and (folder / "cmdline").read_bytes().startswith((b"ray::_do", b"ray::IDLE")):
                found.append(int(folder.name))
    return found


def _wait_for(path: Path) -> None:
    """At most a minute: all processes may be waiting before any does what they wait for."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def open_work(folder: Path) -> Any:
    """Leaves the process in which it was called."""
    (folder / f"begun-{os.getpid()}").touch()
    return functools.partial(write, folder)


def write(folder: Path, task: str) -> None:
    """A task named like `5`, or `5 ACTION`; it leaves a file of its number and process."""
    number, _, action = task.partition(" ")
    first = not (folder / f"tried-{number}").exists()
    (folder / f"tried-{number}").touch()
    match action:
        case "dies once" if first:
            os.kill(os.getpid(), signal.SIGKILL)
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs once" if first:
            time.sleep(3600)
        case "refuses":
            raise DataError(f"Row {number} is broken.", fix="Embed again.")
        case "takes memory":
            raise MemoryError
        case "finds a full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/x")
        case "may not read":
            denied = DataError("s3://bucket/x: access is denied (Forbidden).", fix="Give it rights.")
            raise denied from OSError(errno.EACCES, "Forbidden")
        case "lacks an extra":
            raise MissingExtraError("s3://", "s3", ["s3fs"])
        case "waits":
            time.sleep(0.5)
        case "waits for 1":
            _wait_for(folder / "tried-1")
            time.sleep(0.5)
    (folder / number).write_text(str(os.getpid()))


def refuse(folder: Path) -> Any:
    raise DataError(f"{folder}: changed.", fix="Embed again.")
