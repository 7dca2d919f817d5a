"""Files behind `https://` and `http://`, by the standard library: no folder can be listed there."""

import base64
import contextlib
import errno
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from clip_cid.addresses import without_secrets
from clip_cid.remote.contract import ChangedError, RemoteFile

_SECONDS = 60  # that a server may be silent
_BLOCK = 1 << 20
_LETTERS = "%/:=&?~#+!$,;'@()*[]"  # that an address may have as they are
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_ABSENT, _DENIED, _CHANGED, _NOT_SATISFIABLE = (404, 410), (401, 403, 407), 412, 416


class Web:
    """A `Store` of all web servers."""

    def ask(self, address: str) -> RemoteFile:
        """One byte is asked for: that works behind signatures for GET alone, and shows whether ranges are read."""
        try:
            with _opened(address, {"Range": "bytes=0-0"}) as answer:
                headers, by_range = answer.headers, answer.status == http.HTTPStatus.PARTIAL_CONTENT
                size = _total(headers) if by_range else _whole_size(headers)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != _NOT_SATISFIABLE:
                raise _failure(error, address) from error
            headers, by_range, size = error.headers, True, _total(error.headers)  # an empty file
        return RemoteFile(without_secrets(address), address, size, _version(headers), by_range)

    def find(self, pattern: str) -> list[RemoteFile]:
        raise NotImplementedError

    def below(self, folder: str) -> dict[str, RemoteFile]:
        raise NotImplementedError

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        with self._of_version(file, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            place = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT or place is None:
                raise OSError(errno.EREMOTEIO, "the server does not read by range any more")
            if place.groups() != (str(start), str(stop - 1), str(file.bytes)):
                raise ChangedError
            return answer.read()

    def stream(self, file: RemoteFile) -> Iterator[bytes]:
        with self._of_version(file, {}) as answer:
            while block := answer.read(_BLOCK):
                yield block

    @contextlib.contextmanager
    def _of_version(self, file: RemoteFile, headers: Mapping[str, str]) -> Iterator[Any]:
        """An answer with bytes of this version; the server is asked to give no others."""
        condition = {"If-Match": file.version} if file.version.startswith('"') else {}
        try:
            with _opened(file.address, {**headers, **condition}) as answer:
                if _version(answer.headers) != file.version:
                    raise ChangedError
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (_CHANGED, _NOT_SATISFIABLE):
                raise ChangedError from error
            raise _failure(error, file.address) from error


def _opened(address: str, headers: Mapping[str, str]) -> Any:
    try:
        parts = urlsplit(address)
        user, at, host = parts.netloc.rpartition("@")
        bare = quote(parts._replace(netloc=host, fragment="").geturl(), safe=_LETTERS)
        always = {"Accept-Encoding": "identity", "User-Agent": "clip-cid"}
        request = urllib.request.Request(bare, headers={**headers, **always})
        if at:
            word = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {word}")  # for this host alone
        return urllib.request.urlopen(request, timeout=_SECONDS)
    except (ValueError, http.client.InvalidURL) as error:
        raise FileNotFoundError(errno.ENOENT, "not a possible address") from error


def _failure(error: urllib.error.HTTPError, address: str) -> OSError:
    words = f"HTTP {error.code} {error.reason} of {urlsplit(address).hostname}"
    if error.code in _ABSENT:
        return FileNotFoundError(errno.ENOENT, words)
    if error.code in _DENIED:
        return PermissionError(errno.EACCES, words)
    return OSError(errno.EREMOTEIO, words)


def _version(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _total(headers: Any) -> int:
    place = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if place is None:
        raise OSError(errno.EREMOTEIO, "the server does not say how large the file is")
    return int(place[3])


def _whole_size(headers: Any) -> int:
    size = headers.get("Content-Length", "")
    if not size.isdecimal():
        raise OSError(errno.EREMOTEIO, "the server does not say how large the file is")
    return int(size)
