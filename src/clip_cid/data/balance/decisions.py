"""What a person has decided about images, one decision a line: a file of JSON lines that survives growth and new runs.

    {"id": "5f0c...", "decision": "keep", "images": [{"hash": "09ab...", "key": "cat/1"}], "at": "2026-11-30T18:00:00Z"}
    {"id": "77d1...", "decision": "undo", "of": "5f0c..."}

An image is named by the digest of its stored embedding (`row_hashes.npy` of a balance, 32 hexadecimal digits) and by
its key, which chooses among images whose embeddings are equal. The order of the lines does not count.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int, UInt64

from clip_cid import log
from clip_cid.errors import DataError
from clip_cid.file_digests import digest
from clip_cid.run_folder import sync

Kind = Literal["not_duplicates", "keep", "keep_all", "remove_all"]
UNDO = "undo"
LEAST_IMAGES: Mapping[Kind, int] = {"not_duplicates": 2, "keep": 1, "keep_all": 1, "remove_all": 1}

_HASH_DIGITS = 32
_FIX = "Mend or delete that line; the other decisions do not depend on it."
_MOST_NAMED = 3


class Image(NamedTuple):
    """An image that a decision names."""

    hash: str
    key: str


class Decision(NamedTuple):
    """One line that decides."""

    id: str
    kind: Kind
    images: tuple[Image, ...]
    at: str = ""

    def as_json(self) -> dict[str, Any]:
        images = [image._asdict() for image in self.images]
        return {"id": self.id, "decision": self.kind, "images": images, "at": self.at}


@dataclass(frozen=True)
class Decisions:
    """What holds of a file, without what was undone."""

    lines: tuple[Decision, ...]
    """In the order of the file."""

    def __bool__(self) -> bool:
        return bool(self.lines)

    @functools.cached_property
    def apart(self) -> frozenset[tuple[Image, Image]]:
        """Pairs that are not duplicates of each other, each in ascending order."""
        named = (line.images for line in self.lines if line.kind == "not_duplicates")
        return frozenset(pair for images in named for pair in itertools.combinations(sorted(images), 2))

    @functools.cached_property
    def keep(self) -> frozenset[Image]:
        return frozenset(image for line in self.lines if line.kind in ("keep", "keep_all") for image in line.images)

    @functools.cached_property
    def remove(self) -> frozenset[Image]:
        return frozenset(image for line in self.lines if line.kind == "remove_all" for image in line.images)

    @property
    def digest(self) -> str:
        """The same for files that decide the same."""
        return digest([sorted(map(list, part)) for part in (self.apart, self.keep, self.remove)])

    def against(self, kind: Kind, images: Collection[Image]) -> Decision | None:
        """The first decision that contradicts one of this kind."""
        opposed = _OPPOSED[kind]
        return next((line for line in self.lines if line.kind in opposed and {*images} & {*line.images}), None)


_KEEPING: tuple[Kind, ...] = ("keep", "keep_all")
_OPPOSED: Mapping[Kind, tuple[Kind, ...]] = {
    "not_duplicates": (),
    "keep": ("remove_all",),
    "keep_all": ("remove_all",),
    "remove_all": _KEEPING,
}


@dataclass(frozen=True, eq=False)
class RowsNamed:
    """The rows that decisions name."""

    apart: Int[np.ndarray, "pairs 2"]
    keep: Int[np.ndarray, " keep"]
    remove: Int[np.ndarray, " remove"]
    gone: tuple[Image, ...]
    """Images that decisions name and that are not among the rows."""


def read_decisions(path: Path) -> Decisions:
    """The decisions of a file that hold. A line that a kill has torn was never confirmed, and does not count.

    Raises:
        DataError: There is no such file, a line is no decision, or two contradict each other.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}).",
            fix="balance.decisions is a file that `clip-cid review` wrote.",
        ) from error
    return parse_decisions(content, where=str(path))


def parse_decisions(content: bytes, *, where: str) -> Decisions:
    """As `read_decisions`, of the bytes of a file.

    Raises:
        DataError: A line is no decision, or two contradict each other.
    """
    by_id: dict[str, Decision] = {}
    undone: dict[str, int] = {}
    for number, entry in _entries(content, where):
        if entry.get("decision") == UNDO:
            undone.setdefault(_text(entry, "of", where, number), number)
            continue
        line = _decision(entry, where, number)
        if by_id.setdefault(line.id, line) != line:
            raise DataError(f"{where}, line {number:,}: another line with the id {line.id!r} says otherwise.", fix=_FIX)

    if unknown := [of for of in undone if of not in by_id]:
        raise DataError(f"{where}, line {undone[unknown[0]]:,}: undoes {unknown[0]!r}, which no line says.", fix=_FIX)
    decisions = Decisions(tuple(line for line in by_id.values() if line.id not in undone))
    _refuse_contradictions(decisions, where)
    return decisions


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to the file and bring it to the disk for good, whole or not at all.

    Raises:
        OSError: It cannot be written; what was there is whole.
    """
    encoded = json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
    with open(path, "ab+") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size:
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                _end_last_line(handle)
                size = handle.seek(0, os.SEEK_END)
        try:
            handle.write(encoded)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            os.truncate(path, size)
            raise
    if not size:
        sync(path.parent)  # the file may be new


def rows_named(decisions: Decisions, hashes: UInt64[np.ndarray, "rows 2"], key_of: Callable[[int], str]) -> RowsNamed:
    """The rows that decisions name; images that are not among the rows are left out.

    The row of the same digest and key; where there is none, the only row of the digest, under whatever key.

    Raises:
        DataError: Decisions that do not contradict each other in the file name one row under two keys.
    """
    named = sorted({*decisions.keep, *decisions.remove, *(image for pair in decisions.apart for image in pair)})
    row_of = _rows_of(named, hashes, key_of)

    keep, remove = ({row_of[image] for image in part if image in row_of} for part in (decisions.keep, decisions.remove))
    if both := sorted(keep & remove):
        raise DataError(
            f"balance.decisions: {key_of(both[0])!r} is both to be kept and to be removed ({len(both):,} such images).",
            fix="Undo one of the decisions in `clip-cid review`.",
        )

    pairs = {
        tuple(sorted((row_of[one], row_of[other]))) for one, other in decisions.apart if {one, other} <= row_of.keys()
    }
    apart = sorted(pair for pair in pairs if pair[0] != pair[1])
    return RowsNamed(
        apart=np.array(apart, dtype=np.int64).reshape(-1, 2),
        keep=np.array(sorted(keep), dtype=np.int64),
        remove=np.array(sorted(remove), dtype=np.int64),
        gone=tuple(image for image in named if image not in row_of),
    )


def hash_text(row: UInt64[np.ndarray, "2"]) -> str:
    """The digest of a row as decisions name it."""
    return f"{int(row[0]):016x}{int(row[1]):016x}"


def _rows_of(
    named: Sequence[Image], hashes: UInt64[np.ndarray, "rows 2"], key_of: Callable[[int], str]
) -> dict[Image, int]:
    wanted = np.array([int(image.hash[:16], 16) for image in named], dtype=np.uint64)
    rows_with: dict[str, list[int]] = {}
    for row in np.flatnonzero(np.isin(hashes[:, 0], wanted)).tolist():
        rows_with.setdefault(hash_text(hashes[row]), []).append(row)

    row_of: dict[Image, int] = {}
    for image in named:
        row = next((row for row in rows_with.get(image.hash, ()) if key_of(row) == image.key), None)
        if row is not None:
            row_of[image] = row
    taken = {*row_of.values()}
    for image in named:
        rows = rows_with.get(image.hash, [])
        if image not in row_of and len(rows) == 1 and rows[0] not in taken:
            row_of[image] = rows[0]
    return row_of


@functools.cache
def _warn_of_cut(where: str, size: int) -> None:
    """Once for a file of this size, which one command reads several times."""
    log.warn(f"{where}: its last line was cut short, so it does not count")


def _entries(content: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            # Without a line break: torn by a kill, and never confirmed. Zeros are what a power cut may leave of it.
            if number == len(lines) and line.lstrip(b"\0 ")[:1] in (b"", b"{"):
                _warn_of_cut(where, len(content))
                return
            raise DataError(f"{where}, line {number:,}: not JSON ({error}).", fix=_FIX) from error
        if not isinstance(entry, dict):
            raise DataError(f"{where}, line {number:,}: not a decision, but {line[:60]!r}.", fix=_FIX)
        yield number, entry


def _decision(entry: Mapping[str, Any], where: str, number: int) -> Decision:
    told = entry.get("decision")
    kind = next((kind for kind in get_args(Kind) if kind == told), None)
    if kind is None:
        raise DataError(
            f"{where}, line {number:,}: the decision must be {', '.join((*get_args(Kind), UNDO))}, got {told!r}.",
            fix=_FIX,
        )
    try:
        images = tuple(Image(*_strings(image["hash"], image["key"])) for image in entry["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}, line {number:,}: images must each have a hash and a key ({error!r}).", fix=_FIX
        ) from error

    for image in images:
        if len(image.hash) != _HASH_DIGITS or not {*image.hash} <= {*"0123456789abcdef"}:
            raise DataError(f"{where}, line {number:,}: {image.hash[:60]!r} is not a digest of 32 digits.", fix=_FIX)
    if len({*images}) != len(images) or len(images) < LEAST_IMAGES[kind]:
        raise DataError(
            f"{where}, line {number:,}: {kind} needs {LEAST_IMAGES[kind]} or more different images.", fix=_FIX
        )
    return Decision(_text(entry, "id", where, number), kind, images, str(entry.get("at", "")))


def _strings(*values: Any) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise TypeError("not a text")
    return values


def _text(entry: Mapping[str, Any], name: str, where: str, number: int) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}, line {number:,}: {name!r} must be a text, got {value!r}.", fix=_FIX)
    return value


def _refuse_contradictions(decisions: Decisions, where: str) -> None:
    both = sorted(decisions.keep & decisions.remove)
    if not both:
        return
    first = both[0]
    lines = [line.id for line in decisions.lines if line.kind != "not_duplicates" and first in line.images]
    raise DataError(
        f"{where}: {first.key!r} is both to be kept and to be removed ({len(both):,} such images; lines with the ids"
        f" {', '.join(lines[:_MOST_NAMED])}).",
        fix='Add a line {"decision": "undo", "of": ID} for one of them; `clip-cid review` opens the file then.',
    )


def _end_last_line(handle: Any) -> None:
    """End a whole last line, and remove a torn one, which was never confirmed."""
    handle.seek(0)
    content = handle.read()
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        handle.truncate(start)
    else:
        handle.write(b"\n")
