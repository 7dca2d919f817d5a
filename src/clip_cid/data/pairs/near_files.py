"""The file that a name in a table may have meant, where there is none of this name: the usual reasons are tried."""

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from clip_cid.data.pairs.images import EXTENSIONS

_MOST_LISTED = 10_000  # entries of a folder that are looked through
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def near_file(path: str, name: str) -> str:
    """What stands in the way of a file that is not there, in words; empty if nobody knows.

    Args:
        path: Where it was looked for.
        name: As the table has it.
    """
    if _ADDRESS.match(name):
        return "it is an address: fetch the image first, or give tars"
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)!r}"
    for other in _simple_changes(path):
        if os.path.isfile(other):
            return f"but {_from(other, path)!r} is there"

    folder, last = os.path.split(path)
    if (listed := _by_looks(folder).get(_looks(last))) is not None:
        return f"but {listed!r} is there"
    for below in _folders_in(folder):
        if os.path.isfile(os.path.join(folder, below, last)):
            return f"but it lies in the folder {below!r}: move the table there"
    return ""


def _simple_changes(path: str) -> Iterator[str]:
    yield path.strip()
    folder, last = os.path.split(path)
    yield os.path.join(folder, last.strip())
    yield path.replace("\\", "/")
    yield unquote(path)
    for form in ("NFC", "NFD"):
        yield unicodedata.normalize(form, path)

    stem, _ = os.path.splitext(path)
    for ending in EXTENSIONS:
        yield f"{stem}.{ending}"
        yield f"{path}.{ending}"


def _from(other: str, path: str) -> str:
    """The part of the path that differs."""
    common = os.path.commonpath([os.path.dirname(other), os.path.dirname(path)])
    return os.path.relpath(other, common)


def _looks(name: str) -> str:
    """What is left of a name without its ending, capitals, and the zeros before a number."""
    stem = unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)", "", stem)


@functools.lru_cache(maxsize=16)
def _by_looks(folder: str) -> dict[str, str]:
    """Images of a folder by their looks; none that two share."""
    found: dict[str, str] = {}
    shared: set[str] = set()
    for entry in _listed(folder):
        if os.path.splitext(entry.name)[1][1:].lower() in EXTENSIONS:
            looks = _looks(entry.name)
            shared |= {looks} & found.keys()
            found[looks] = entry.name
    return {looks: name for looks, name in found.items() if looks not in shared}


@functools.lru_cache(maxsize=16)
def _folders_in(folder: str) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in _listed(folder) if entry.is_dir()))


def _listed(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder or ".") as entries:
            return [entry for entry, _ in zip(entries, range(_MOST_LISTED), strict=False)]
    except OSError:
        return []
