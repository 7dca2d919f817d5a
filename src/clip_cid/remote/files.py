"""The one way to files elsewhere: which there are, which version each is, and their bytes.

What may pass is tried again, after longer and longer waits; then every failure is two lines, without secrets.
"""

import errno
import functools
import http
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from urllib.error import URLError
from urllib.parse import urlsplit

from clip_cid import log, os_errors
from clip_cid.addresses import OBJECT_STORES, scheme_of, without_secrets
from clip_cid.errors import ClipCidError, DataError
from clip_cid.remote.contract import AbsentError, ChangedError, RemoteFile, Store, UnreachableError
from clip_cid.remote.object_stores import ObjectStores
from clip_cid.remote.remembered import remembered
from clip_cid.remote.web import Web

WAITS = [0.5, 1.0, 2.0, 4.0]
"""Seconds before each further try; of object stores there is one, since their libraries have tries of their own."""
_AT_ONCE = 16  # files that are asked for
_LONGEST_REASON = 200  # characters

_OF_RIGHTS = ("NoCredentials", "ClientAuthentication", "AccessDenied", "InvalidAccessKeyId", "with credentials")
"""Words of libraries that have no error of their own for want of rights."""
_LOG_IN = {
    "s3": "Give this machine access to the bucket (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; another"
    " endpoint by AWS_ENDPOINT_URL)",
    "gs": "Give this machine access to the bucket (gcloud auth application-default login)",
    "az": "Give this machine access to the container (AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or a SAS"
    " token)",
    "hf": "Log in with an account that may read it (`hf auth login`, or HF_TOKEN)",
}
_WEB_LOG_IN = (
    "Name an address that may be read, whose signature has not expired (a run folder keeps addresses without password"
    " and signature: give --recipe)"
)
_Answer = TypeVar("_Answer")


_WEB, _OBJECTS = Web(), ObjectStores()


def ask(address: str) -> RemoteFile:
    """The present version of a file; within a minute the answer is the same.

    Raises:
        DataError: It is not there, may not be read, or the server does not answer.
        MissingExtraError: The package that reads such addresses is not installed.
    """
    return _asked(address)


def ask_all(addresses: Sequence[str]) -> list[RemoteFile]:
    """As `ask`, of several files at once."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(_asked, addresses))


@remembered
def find(pattern: str) -> list[RemoteFile]:
    """The files that a pattern with wildcards matches, sorted by name; as `ask`."""
    if scheme_of(pattern) not in OBJECT_STORES:
        raise DataError(
            f"{without_secrets(pattern)}: a web server does not list its files, so wildcards match none.",
            fix="Name the files with braces: {00000..00099}.",
        )
    return _tried(pattern, lambda store: store.find(pattern))


@remembered
def at(address: str) -> RemoteFile | dict[str, RemoteFile]:
    """The file at an address, or every file below the folder there, by its name in it.

    Raises:
        DataError: As `ask`; or a name leads out of the folder.
    """
    if scheme_of(address) not in OBJECT_STORES:
        return ask(address)
    if not (files := _tried(address, lambda store: store.below(address))):
        return ask(address)

    for name in files:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\\" in name:
            raise DataError(
                f"{without_secrets(address)}: holds {name!r}, which cannot be the name of a file below a folder.",
                fix="Rename it there.",
            )
    return files


def read(file: RemoteFile, start: int, stop: int) -> bytes:
    """The bytes from `start` up to `stop`.

    Raises:
        DataError: They cannot be read, or the file is of another version by now.
    """
    if start == stop:
        return b""

    def whole(store: Store) -> bytes:
        data = store.read(file, start, stop)
        if len(data) != stop - start:
            raise OSError(errno.EREMOTEIO, f"{len(data):,} bytes came of {stop - start:,}")
        return data

    return _tried(file.address, whole, file.name)


def stream(file: RemoteFile, take: Callable[[Iterator[bytes]], _Answer]) -> _Answer:
    """What `take` makes of all bytes in order; it begins again where they fail midway.

    Raises:
        DataError: As `read`.
    """

    def whole(store: Store) -> _Answer:
        return take(_counted(store.stream(file), file))

    return _tried(file.address, whole, file.name)


def _counted(blocks: Iterator[bytes], file: RemoteFile) -> Iterator[bytes]:
    size = 0
    for block in blocks:
        size += len(block)
        yield block
    if size != file.bytes:
        raise OSError(errno.EREMOTEIO, f"{size:,} bytes came of {file.bytes:,}")


@remembered
def _asked(address: str) -> RemoteFile:
    file = _tried(address, lambda store: store.ask(address))
    if not file.version:
        _warn_of_no_version(urlsplit(file.name).netloc)
    return file


@functools.cache
def _warn_of_no_version(host: str) -> None:
    log.warn(f"{host}: gives no ETag and no date of its files, so a change that keeps the size of one is not noticed")


def _tried(address: str, act: Callable[[Store], _Answer], name: str = "") -> _Answer:
    """What a store answers, which may take several tries."""
    store, waits = (_OBJECTS, WAITS[:1]) if scheme_of(address) in OBJECT_STORES else (_WEB, WAITS)
    name = name or without_secrets(address)
    for wait in (*waits, None):
        try:
            return act(store)
        except ClipCidError:
            raise
        except Exception as error:  # each library has errors of its own
            if isinstance(error, OSError) and os_errors.disk_full(error):
                raise  # the disk of the cache
            if problem := _for_good(error, name, scheme_of(address)):
                raise problem from problem.__cause__ or error
            if wait is None:
                raise UnreachableError(
                    f"{name}: cannot be read, after {len(waits) + 1} tries ({_reason(error)}).",
                    fix="Run the same command again when the server answers.",
                ) from _as_of_the_system(error, errno.EREMOTEIO)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _for_good(error: Exception, name: str, scheme: str) -> DataError | None:
    """A failure that another try does not change; None if it may pass."""
    if isinstance(error, ChangedError):
        return DataError(
            f"{name}: changed after it was indexed.", fix="Leave the sources alone while they are used; run again."
        )
    if isinstance(error, FileNotFoundError | IsADirectoryError) or _status(error) == http.HTTPStatus.NOT_FOUND:
        return AbsentError(
            f"{name}: not there ({_reason(error)}).",
            fix="Correct the address. A private one looks absent without the right to see it: see that you are logged"
            " in.",
        )
    if _is_denied(error):
        problem = UnreachableError(
            f"{name}: access is denied ({_reason(error)}).",
            fix=f"{_LOG_IN.get(scheme, _WEB_LOG_IN)}; then run the same command again.",
        )
        problem.__cause__ = _as_of_the_system(error, errno.EACCES)
        return problem
    if isinstance(error, ValueError | NotImplementedError):
        return DataError(f"{name}: not an address that can be read ({_reason(error)}).", fix="Correct it.")
    return None


def _is_denied(error: BaseException | None) -> bool:
    """Whether a store refuses for want of rights, in one of the ways of its library."""
    while error is not None:
        words = f"{type(error).__name__}: {error}"
        if isinstance(error, PermissionError) or _status(error) in (401, 403):
            return True
        if any(word in words for word in _OF_RIGHTS):
            return True
        error = error.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """The number of an answer over HTTP that an error of the Hub's library is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _as_of_the_system(error: Exception, code: int) -> OSError:
    """A failure that may pass, as the system would number it."""
    failure = OSError(code, _reason(error))
    failure.__cause__ = error
    return failure


def _reason(error: BaseException) -> str:
    error = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = without_secrets(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
