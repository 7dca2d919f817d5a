"""Files in S3, Google Cloud Storage, Azure and on the Hugging Face Hub, by fsspec.

A file is read as the version that was asked for: S3 gets its ETag with every request, Google its generation, the Hub
the commit; on Azure the ETag is compared when a file is opened.
"""

import functools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clip_cid import extras
from clip_cid.addresses import scheme_of, without_secrets
from clip_cid.remote.contract import ChangedError, RemoteFile
from clip_cid.remote.remembered import remembered

EXTRAS = {"s3": extras.S3, "gs": extras.GS, "az": extras.AZ, "hf": extras.HF}
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "xet_hash", "mtime", "created")
_OPEN_FILES = 64
_BLOCK = 8 << 20


class ObjectStores:
    """A `Store` of all schemes that fsspec reads."""

    def ask(self, address: str) -> RemoteFile:
        root = _root(address)
        info = _files(scheme_of(address)).info(root.here)
        if info["type"] != "file":
            raise IsADirectoryError
        return root.file(info)

    def find(self, pattern: str) -> list[RemoteFile]:
        root = _root(pattern)
        matches = _files(scheme_of(pattern)).glob(root.here, detail=True)
        return sorted(map(root.file, _only_files(matches)), key=lambda file: file.name)

    def below(self, folder: str) -> dict[str, RemoteFile]:
        root = _root(folder.rstrip("/"))
        start = root.here.rstrip("/") + "/"
        infos = _only_files(_files(scheme_of(folder)).find(root.here, detail=True))
        inside = {info["name"].lstrip("/"): info for info in infos}
        return {name.removeprefix(start): root.file(inside[name]) for name in sorted(inside) if name.startswith(start)}

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        opened = _opened(file.address, file.version, os.getpid())
        try:
            return opened.read(start, stop)
        except Exception as error:
            if type(error).__name__ == "FileExpired":  # of s3fs
                raise ChangedError from error
            raise

    def stream(self, file: RemoteFile) -> Iterator[bytes]:
        for start in range(0, file.bytes, _BLOCK):
            yield self.read(file, start, min(start + _BLOCK, file.bytes))


@dataclass(frozen=True)
class _Root:
    """How the store and the user write the paths of one bucket or repository."""

    scheme: str
    here: str
    """The path that the store is asked for."""
    pinned: str = ""
    """What the store has for `written`: the repository at one commit."""
    written: str = ""

    def file(self, info: Any) -> RemoteFile:
        path = info["name"].lstrip("/")
        version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
        name = without_secrets(f"{self.scheme}://{self.written}{path.removeprefix(self.pinned)}")
        return RemoteFile(name, f"{self.scheme}://{path}", info["size"], version)


def _root(address: str) -> _Root:
    scheme = scheme_of(address)
    path = _files(scheme)._strip_protocol(address).lstrip("/")  # of fsspec's own interface of file systems
    return _of_commit(path) if scheme == "hf" else _Root(scheme, path)


def _of_commit(path: str) -> _Root:
    """A path on the Hub, at the commit that its branch has now."""
    place = _files("hf").resolve_path(path)
    if not hasattr(place, "repo_id"):
        return _Root("hf", path)  # a bucket, which has no commits
    prefix = {"dataset": "datasets/", "space": "spaces/"}.get(place.repo_type, "")
    pinned = f"{prefix}{place.repo_id}@{_commit(place.repo_id, place.repo_type, place.revision)}"
    return _Root("hf", f"{pinned}/{place.path_in_repo}".rstrip("/"), pinned, place.root)


@remembered
def _commit(repo: str, kind: str, revision: str) -> str:
    import huggingface_hub

    return huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision).sha or revision


def _only_files(listed: Any) -> list[Any]:
    return [info for info in listed.values() if info["type"] == "file" and not info["name"].endswith("/")]


class _Opened:
    """An open file, of which threads read ranges."""

    def __init__(self, address: str, version: str) -> None:
        scheme = scheme_of(address)
        path = _files(scheme)._strip_protocol(address)
        self._handle = _files(scheme).open(path, "rb", cache_type="none")
        self._lock = threading.Lock()
        details = getattr(self._handle, "details", None) or {}
        known = [str(details[key]) for key in _VERSIONS if details.get(key) is not None]
        if known and version and version not in known:
            raise ChangedError

    def read(self, start: int, stop: int) -> bytes:
        with self._lock:
            self._handle.seek(start)
            return self._handle.read(stop - start)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(address: str, version: str, process: int) -> _Opened:
    return _Opened(address, version)


def _files(scheme: str) -> Any:
    extras.require(f"{scheme}://", EXTRAS[scheme])
    return _file_system(scheme, os.getpid())


@functools.cache
def _file_system(scheme: str, process: int) -> Any:
    """fsspec's, one for each process: what it holds open does not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        import botocore.session  # pyright: ignore[reportMissingImports]

        if botocore.session.get_session().get_credentials() is None:
            options["anon"] = True  # a public bucket needs none
    return fsspec.filesystem(scheme, **options)


def close_all() -> None:
    """Close what is open, so that another endpoint or another login counts from now on."""
    _opened.cache_clear()
    _file_system.cache_clear()
