"""The sources that `pairs.source` names: braces and wildcards expanded, files located here and elsewhere."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from braceexpand import braceexpand

from clip_cid.addresses import OBJECT_STORES, is_remote, path_of, scheme_of, without_secrets
from clip_cid.data.pairs.folders import folder_of
from clip_cid.data.pairs.format import Source
from clip_cid.data.pairs.formats import FOLDER_FORMAT, URL_FORMAT, format_by_name, format_of, unknown_format
from clip_cid.errors import ConfigError, DataError
from clip_cid.new_folder import drop_left
from clip_cid.recipe import ALLOW_PIPE, PairsConfig
from clip_cid.remote import files
from clip_cid.remote.contract import RemoteFile
from clip_cid.run_folder import atomic_file

_FETCH_BYTES = 1 << 20


def find_sources(settings: PairsConfig) -> list[Source]:
    """Every source in the order given, wildcards sorted.

    Raises:
        DataError: One is missing, named twice, of no known format, or of another format than the first.
    """
    if not settings.source:
        raise DataError("pairs.source is empty, so there are no pairs.", fix="Name tars, a table or a folder there.")
    sources = [source for pattern in settings.source for source in _expand(pattern, settings)]

    first, identities = sources[0], set[str]()
    for source in sources:
        if source.format.kind != first.format.kind:
            raise DataError(
                f"pairs.source mixes kinds: {first.name} is a {first.format.kind}, "
                f"{source.name} is a {source.format.kind}.",
                fix="Give sources of one kind; run each kind by itself, or write all of them as tars.",
            )

        if source.identity in identities:
            raise DataError(
                f"pairs.source names {source.name} twice.", fix="Name each source once (check overlapping wildcards)."
            )
        identities.add(source.identity)
    return sources


def _expand(pattern: str, settings: PairsConfig) -> list[Source]:
    """The sources of one entry of `pairs.source`."""
    if pattern.startswith("file:"):
        pattern = unquote(urlparse(pattern).path)
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):  # a real name wins, whatever braces, brackets or colons it has
        return [_local(pattern, settings)]

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"pairs.source: the braces of {pattern} do not match.", fix="Ranges are written as {00000..00099}."
        ) from error
    if is_remote(pattern):
        return list(_elsewhere(names, settings))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern):
        return [Source(URL_FORMAT, name, None) for name in names]

    present: list[str] = []
    missing: list[str] = []
    for name in names:
        if os.path.exists(name):
            present.append(name)
        elif glob.has_magic(name) and (matches := sorted(glob.glob(name, recursive=True))):
            present += matches
        else:
            missing.append(name)

    if missing:
        raise DataError(
            f"{missing[0]}: no such file or folder ({len(missing):,} of the {len(names):,} named by {pattern}"
            " missing).",
            fix=f"Correct pairs.source, or bring the data; paths are taken from {os.getcwd()}.",
        )
    return [_local(name, settings) for name in present]


def _elsewhere(names: list[str], settings: PairsConfig) -> Generator[Source]:
    """The sources at addresses; those without wildcards are asked for at once."""
    plain = [name for name in names if not _has_wildcards(name) and format_by_name(name, settings) is not None]
    asked = dict(zip(plain, files.ask_all(plain), strict=True))
    for name in names:
        if name in asked:
            yield _source_elsewhere(asked[name], settings)
        elif _has_wildcards(name):
            if not (matches := files.find(name)):
                raise DataError(f"{without_secrets(name)}: matches no file.", fix="Correct pairs.source.")
            for file in matches:
                yield _source_elsewhere(file, settings)
        elif isinstance(there := files.at(name), dict):
            yield Source(FOLDER_FORMAT, without_secrets(name), None, folder_of(name, there))
        else:
            yield _source_elsewhere(there, settings)


def _has_wildcards(address: str) -> bool:
    """On the web a question mark begins a query, and brackets may be letters."""
    return glob.has_magic(address) if scheme_of(address) in OBJECT_STORES else "*" in path_of(address)


def _source_elsewhere(file: RemoteFile, settings: PairsConfig) -> Source:
    known = format_by_name(file.name, settings)
    if known is None and scheme_of(file.address) in OBJECT_STORES:
        raise unknown_format(file.name)
    return Source(known or URL_FORMAT, file.name, None, file)


def _local(name: str, settings: PairsConfig) -> Source:
    path = Path(os.path.abspath(name))
    return Source(format_of(path, name, settings), name, path)


def cached_path(url: str, cache_dir: Path) -> Path:
    """Where a fetched URL is kept; the name says a little of the URL, its digest the rest."""
    tail = re.sub(r"[^A-Za-z0-9._-]+", "_", urlparse(url).path.rsplit("/", 1)[-1])[-60:]
    return cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:20]}-{tail}"


def fetch(url: str, path: Path, check: Callable[[Path], Any]) -> None:
    """Download `url` to `path`, which appears only when the transfer is whole and `check` accepts the file.

    Raises:
        ConfigError: It is a shell command, and these are not allowed.
        DataError: The URL cannot be opened, or the transfer failed.
    """
    if url.strip().lower().startswith("pipe:") and os.environ.get(ALLOW_PIPE) != "1":
        raise ConfigError(
            f"{url}: not run, because it is a shell command, and a recipe may be somebody else's.",
            fix=f"If you trust the recipe, add --allow-pipe to the command, or set {ALLOW_PIPE}=1.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_left(path)
    with atomic_file(path) as temporary:
        with open(temporary, "wb") as out:
            for block in _blocks(url):
                out.write(block)
        check(temporary)


def _blocks(url: str) -> Generator[bytes]:
    from webdataset.gopen import gopen  # imports torch, which only URLs need

    # Its older versions give other addresses than pipe: to a shell, too, in single quotes.
    address = url if url.startswith("pipe:") else url.replace("'", "%27")
    try:
        with gopen(address, "rb") as stream:
            while block := stream.read(_FETCH_BYTES):
                yield block
    except (AssertionError, OSError, ValueError) as error:  # it asserts that `pipe:` is in small letters
        raise DataError(
            f"{url}: cannot be fetched ({error}).",
            fix="Try the address by hand (curl, or the command behind pipe:), then run again; fetched shards are kept.",
        ) from error
