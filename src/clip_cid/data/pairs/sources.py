"""What `pairs.source` names: brace ranges and wildcards expanded, every file found, URLs fetched."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from braceexpand import braceexpand

from clip_cid.errors import DataError
from clip_cid.run_folder import atomic_file

Kind = Literal["tar", "table", "folder"]
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_FETCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One shard, table or folder; `path` is None while a URL has not been fetched."""

    kind: Kind
    name: str
    """As the user wrote it, ranges and wildcards expanded."""
    path: Path | None

    @property
    def bytes(self) -> int:
        """Bytes of the file; -1 for a URL, whose size would take a request to learn."""
        return -1 if self.path is None else self.path.stat().st_size


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """Every source in the order given, wildcards sorted.

    Raises:
        DataError: One is missing, named twice, of no known kind, or of another kind than the first.
    """
    if not patterns:
        raise DataError("pairs.source is empty, so there are no pairs.", fix="Name tars, a table or a folder there.")
    sources = [source for pattern in patterns for source in _expand(pattern)]
    first, seen = sources[0], set[str]()
    for source in sources:
        if source.kind != first.kind:
            raise DataError(
                f"pairs.source mixes kinds: {first.name} is a {first.kind}, {source.name} is a {source.kind}.",
                fix="Give sources of one kind; run each kind by itself, or write all of them as tars.",
            )
        identity = source.name if source.path is None else str(source.path)
        if identity in seen:
            raise DataError(
                f"pairs.source names {source.name} twice.", fix="Name each source once (check overlapping wildcards)."
            )
        seen.add(identity)
    return sources


def _expand(pattern: str) -> list[Source]:
    if pattern.startswith("file:"):
        pattern = unquote(urlparse(pattern).path)
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):  # a real name wins, whatever braces, brackets or colons it has
        return [_local(pattern)]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"pairs.source: the braces of {pattern} do not match.", fix="Ranges are written as {00000..00099}."
        ) from error
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern):
        return [Source("tar", name, None) for name in names]
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        if os.path.exists(name):
            found.append(name)
        elif glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            found += matches
            missing += [] if matches else [name]
        else:
            missing.append(name)
    if missing:
        raise DataError(
            f"{missing[0]}: no such file or folder ({len(missing):,} of the {len(names):,} named by {pattern} missing).",
            fix=f"Correct pairs.source, or bring the data; paths are taken from {os.getcwd()}.",
        )
    return [_local(name) for name in found]


def _local(name: str) -> Source:
    path, lower = Path(os.path.abspath(name)), name.lower()
    if path.is_dir():
        return Source("folder", name, path)
    if lower.endswith(_TAR_SUFFIXES):
        return Source("tar", name, path)
    if lower.endswith(TABLE_SUFFIXES):
        return Source("table", name, path)
    raise DataError(
        f"{name}: not a kind of pairs known here.",
        fix="Give .tar shards, one .csv, .tsv or .parquet table, or a folder.",
    )


def cache_folder(cache_dir: Path | None) -> Path:
    """Where what comes from URLs is kept: `machine.cache_dir`, or ~/.cache/clip_cid."""
    return cache_dir if cache_dir is not None else Path.home() / ".cache" / "clip_cid"


def cached_path(url: str, cache_dir: Path) -> Path:
    """Where a fetched URL is kept; the name says a little of the URL, its digest the rest."""
    tail = re.sub(r"[^A-Za-z0-9._-]+", "_", urlparse(url).path.rsplit("/", 1)[-1])[-60:]
    return cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:20]}-{tail}"


def fetch(url: str, path: Path, check: Callable[[Path], Any]) -> None:
    """Bring `url` to `path`, which appears only when the transfer ended well and `check` of the bytes did not raise.

    Raises:
        DataError: The URL cannot be opened or its transfer failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        with open(temporary, "wb") as out:
            for block in _blocks(url):
                out.write(block)
        check(temporary)


def _blocks(url: str) -> Generator[bytes]:
    from webdataset.gopen import gopen  # imports torch, which nobody without URLs should wait for

    try:
        with gopen(url, "rb") as stream:
            while block := stream.read(_FETCH_BYTES):
                yield block
    except (OSError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be fetched ({error}).",
            fix="Try the address by hand (curl, or the command behind pipe:), then run again; shards already fetched are kept.",
        ) from error
