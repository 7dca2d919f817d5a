"""What a process costs: CPU seconds, peak memory, threads; and on which machine."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import resource
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """User and system seconds of this process and of children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def status_kib(field: str) -> int:
    """Of /proc/self/status, in KiB; 0 where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as handle:
        for line in handle:
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


@contextlib.contextmanager
def peak_memory() -> Generator[dict[str, Any]]:
    """Fills in the peak, in MiB, of what runs inside above what there was before."""
    memory: dict[str, Any] = {}
    how = "VmHWM, reset"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        how = "ru_maxrss, not reset: a lower bound"

    def highest() -> int:
        return status_kib("VmHWM") if how.startswith("VmHWM") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    rss, anonymous = status_kib("VmRSS") or highest(), status_kib("RssAnon")
    start = highest() if how.startswith("ru_maxrss") else rss
    peak, stop = [anonymous], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], status_kib("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        memory |= {"rss_before_mib": rss / 1024, "rss_mib": (highest() - start) / 1024, "rss_by": how}
        stop.set()
        watcher.join()
        memory["anonymous_mib"] = (max(peak[0], status_kib("RssAnon")) - anonymous) / 1024


def thread_counts() -> dict[str, Any]:
    """What the libraries say of their threads; all should say 1."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return {}
    from threadpoolctl import threadpool_info

    return {
        "libraries": [f"{each['internal_api']} {each['version']}: {each['num_threads']}" for each in threadpool_info()]
    }


def machine() -> dict[str, Any]:
    """What a reader needs to know to doubt the numbers."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((line.split(":")[1].strip() for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "?")

    versions = {}
    for name in ("clip-cid", "numpy", "scipy", "faiss-cpu", "torch", "numba", "semhash", "vicinity", "usearch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "load": os.getloadavg(),
    }


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").splitlines()
    return []
