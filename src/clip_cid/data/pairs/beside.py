"""Files that a table or a folder of pairs refers to: images and captions, on this machine or elsewhere.

What a table elsewhere names lies below its own folder there: somebody else's table can make this machine read nothing
of its own, and ask no other server.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from clip_cid.addresses import OBJECT_STORES, is_remote, scheme_of, without_secrets
from clip_cid.data.pairs.format import SourceFile
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.sample_parts import read_file
from clip_cid.remote import files
from clip_cid.remote.contract import AbsentError, RemoteFile
from clip_cid.remote.kept import KeptFile


def read_beside(source: SourceFile, name: bytes, what: str) -> bytes:
    """The bytes of an image or caption file.

    Args:
        source: A table, or a folder.
        name: The file's path from the folder of the table, or from the folder.
        what: How errors call it.

    Raises:
        BadSample: This file is missing, may not be read, or lies outside of the folder elsewhere.
        DataError: The disk or the server fails.
    """
    if source.remote is None:
        folder = source.path if source.path.is_dir() else source.path.parent
        return read_file(folder, name, what)
    try:
        file = files.ask(_address(source.remote, name, what))
    except AbsentError as error:
        raise BadSample(f"{what} {os.fsdecode(name)!r} cannot be read (not there)") from error
    return files.read(file, 0, file.bytes) if source.cache is None else KeptFile(file, source.cache).read(0, file.bytes)


def files_beside(source: SourceFile, names: Sequence[bytes | None]) -> list[Path | RemoteFile]:
    """The files that names refer to, in their order, without reading one.

    Of web servers, which list no folder, the address stands for the file.
    """
    given = [name for name in names if name is not None]
    if source.remote is None:
        folder = source.path if source.path.is_dir() else source.path.parent
        return [folder / os.fsdecode(name) for name in given]

    listed = dict[str, RemoteFile]()
    base = _folder(source.remote)
    if scheme_of(base) in OBJECT_STORES and isinstance(there := files.at(base), dict):
        listed = there
    return [listed.get(os.fsdecode(name)) or _unknown(base, name) for name in given]


def _unknown(base: str, name: bytes) -> RemoteFile:
    address = base + os.fsdecode(name)
    return RemoteFile(without_secrets(address), address, -1, "")


def _address(source: RemoteFile, name: bytes, what: str) -> str:
    path = os.fsdecode(name)
    inside = path.removeprefix("./")
    if is_remote(path) or path.startswith("/") or any(part in ("", ".", "..") for part in inside.split("/")):
        raise BadSample(f"{what} {path!r} is not below the folder of {source.name}")
    base = _folder(source)
    return base + (inside if scheme_of(base) in OBJECT_STORES else quote(inside))


def _folder(source: RemoteFile) -> str:
    """The address of the folder that names begin at; on the Hub of the branch, and not of one commit."""
    of_store = scheme_of(source.address) in OBJECT_STORES
    address = source.name if of_store else source.address.partition("#")[0].partition("?")[0]
    return address.rpartition("/")[0] + "/"
