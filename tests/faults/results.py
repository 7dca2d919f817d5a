"""The files that a command leaves, comparable between two runs: times and what is computed from them are taken out."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_COMPARED = re.compile(
    r"(^|/)(run\.log|tables\.txt|\.lock|index/digests\.jsonl|throughput\.(svg|csv|png)|tables/stages\.csv)$"
)
_CACHE = re.compile(r"(^|/)features/[^./][^/]*(/[^./][^/]*)?$")  # what it holds may differ, but not what a file says
_OF_TIMES = {
    *("seconds", "started", "mtime_ns", "data_wait_share", "memory_gib", "bytes"),
    *("peak_memory_gib", "sha256", "key", "inputs", "latency"),
}
_PAGE_PARTS = re.compile(rb"<svg.*?</svg>|<[^>]*>|[\d.,:]+", re.DOTALL)


def contents(folder: Path) -> dict[str, str]:
    """A digest of each file and link in `folder`, by its name."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() and not path.is_symlink():
            found[name] = "folder"
        elif not _NOT_COMPARED.search(name):
            found[name] = _digest(name, path.read_bytes())
    return found


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names that only one of them has, or whose contents differ."""
    extra = [f"{name} is extra" for name in found.keys() - expected.keys() if not _CACHE.search(name)]
    missing = [f"{name} is missing" for name in expected.keys() - found.keys() if not _CACHE.search(name)]
    other = [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return sorted(extra + missing + other)


def _digest(name: str, content: bytes) -> str:
    return hashlib.sha256(_without_times(name, content)).hexdigest()


def unrecorded(run: Path) -> list[str]:
    """Files in the stages of a run that their record does not name, or that are not as it says."""
    wrong: list[str] = []
    for manifest in run.glob("*/manifest.json"):
        record = json.loads(manifest.read_text())
        if not isinstance(record.get("files"), dict):
            continue  # of a subset
        files = {str(path.relative_to(manifest.parent)): path for path in manifest.parent.rglob("*") if path.is_file()}
        wrong += [f"{manifest.parent.name}/{name} is not recorded" for name in files.keys() - record["files"].keys()]
        for name, entry in record["files"].items():
            if name not in files or hashlib.sha256(files[name].read_bytes()).hexdigest() != entry["sha256"]:
                wrong.append(f"{manifest.parent.name}/{name} is not as recorded")
    return [name for name in wrong if not name.endswith("/manifest.json is not recorded")]


def _without_times(name: str, content: bytes) -> bytes:
    if name.endswith(".json"):
        return _json(content)
    if name.endswith(".jsonl"):
        return b"\n".join(_json(line) for line in content.splitlines())
    if name.endswith(("report.html", "balance.html")):
        return _PAGE_PARTS.sub(b"", content)  # most of its numbers are computed from tables that are compared
    return content


def _json(content: bytes) -> bytes:
    try:
        return json.dumps(_plain(json.loads(content)), sort_keys=True).encode()
    except ValueError:
        return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _plain(part)
            for key, part in value.items()
            if key not in _OF_TIMES and not key.endswith(("_per_s", "_wait_share"))
        }
    return [_plain(part) for part in value] if isinstance(value, list) else value
