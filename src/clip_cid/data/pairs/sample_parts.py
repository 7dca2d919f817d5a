"""The parts of a sample that every format treats alike: keys, captions, kept fields, and files beside an index."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from clip_cid.data.pairs.near_files import near_file
from clip_cid.data.pairs.pair import BadSample
from clip_cid.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
"""Those that open_clip reads from tars, in its order."""

_UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}


def key_hash(key: str) -> int:
    """A hash of a key in 64 bits, the same in every process, to find equal keys without holding them."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def readable_key(key: bytes) -> tuple[str, str | None]:
    """A key as text, and what is wrong with it."""
    try:
        return key.decode(), None if key else "no key"
    except UnicodeDecodeError:
        return key.decode(errors="backslashreplace"), "the key is not UTF-8"


def json_object(data: bytes) -> dict[str, Any]:
    """The fields of a .json.

    Raises:
        BadSample: It is none.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise BadSample(f"json holds a {type(fields).__name__}, not an object")
    return fields


def key_in_json(data: bytes | None, field: str) -> tuple[str, str | None]:
    """The key in a field of a sample's .json, which may be absent, and what is wrong with it."""
    try:
        value = None if data is None else json_object(data).get(field)
    except BadSample as error:
        return "", f"no key: {error.reason}"
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        return "", f"no key: json field {field!r} holds a {type(value).__name__}, not text or a whole number"
    if value is None or value == "":
        return "", f"no key (json field {field!r})"
    return readable_key(str(value).encode(errors="surrogatepass"))


def clean_captions(texts: list[Any], *, optional: bool = False) -> tuple[str, ...]:
    """The captions without white space around them; empty ones are dropped.

    Raises:
        BadSample: One is not text; or all are empty, unless they are optional.
    """
    captions: list[str] = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadSample(f"caption {number} is not UTF-8 (byte {error.start})") from error

        if not isinstance(text, str):
            raise BadSample(f"caption {number} is a {type(text).__name__}, not text")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can spell what UTF-8 cannot hold
            raise BadSample(f"caption {number} is not UTF-8 (half a surrogate pair)")

        if "\0" in text:
            raise BadSample(f"caption {number} holds {text.count(chr(0)):,} zero bytes, so the file is damaged")

        if stripped := text.strip():
            captions.append(stripped)

    if not captions and not optional:
        raise BadSample("the caption is empty")
    return tuple(captions)


def field_text(value: Any) -> str:
    """A JSON or table value as the text that is kept of it; empty if there is none."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return _of_bytes(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_of_bytes)
    return text.encode(errors="backslashreplace").decode()  # JSON can spell half a character, which no file can hold


def _of_bytes(value: object) -> str:
    """Text of bytes, which tables have also within lists; other values that JSON has no form for are named."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def read_file(folder: Path, name: bytes, what: str) -> bytes:
    """The bytes of an image or caption file.

    Args:
        folder: Where relative names start.
        name: The file's path as the file system has it.
        what: How errors call it.

    Raises:
        BadSample: This file is missing or may not be read.
        DataError: The disk fails.
    """
    path = os.path.join(folder, os.fsdecode(name))
    try:
        with open(path, "rb") as file:
            return file.read()
    except ValueError as error:  # a NUL in the name
        raise BadSample(f"{what} has no possible name: {path!r}") from error
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}).", fix="Check the disk or mount it is on."
            ) from error
        near = near_file(path, os.fsdecode(name)) if error.errno in (errno.ENOENT, errno.ENOTDIR) else ""
        raise BadSample(f"{what} {path!r} cannot be read ({error.strerror}{near and f', {near}'})") from error
