"""The layouts of embeddings made elsewhere. Headers alone tell which one it is; nothing is unpickled.

X/img_emb/img_emb_0.npy ...        clip-retrieval, with or without text_emb/ and metadata/
X/0a1b.npz ...                     DataComp: arrays such as l14_img and l14_txt, with or without 0a1b.parquet
X/part1.npy ... or one X.npy       rows alone, with or without part1.parquet
"""

import contextlib
import dataclasses
import io
import re
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from clip_cid import log
from clip_cid.data.embeddings.files import FOLDERS, array_header, read_array_header, table_rows
from clip_cid.errors import DataError

FIX = (
    "Give a store of ours; a clip-retrieval folder (img_emb/img_emb_*.npy, optionally text_emb/text_emb_*.npy"
    " and metadata/metadata_*.parquet with equal numbers); a folder of DataComp's .npz or of .npy files; or one"
    " such file."
)
_AGAIN = (
    "Fetch or write this file again: rows of float16, float32 or float64, one after the other (np.ascontiguousarray)."
)
_IMAGE, _TEXT = "_img", "_txt"
_PREFERRED = "l14"
_BLOCK_ROWS = 4096
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Vectors:
    """An array of embeddings: a .npy file, or a member of a .npz archive."""

    path: Path
    member: str | None
    rows: int
    dim: int
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"

    def blocks(self) -> Generator[Float[np.ndarray, "some dim"]]:
        """All rows, some at a time, so that an array of any size can be read.

        Raises:
            DataError: The file is damaged or cut short.
        """
        try:
            with _opened(self.path, self.member) as handle:
                read_array_header(handle)
                for start in range(0, self.rows, _BLOCK_ROWS):
                    count = min(_BLOCK_ROWS, self.rows - start)
                    # The last read also makes an archive check its checksum.
                    data = handle.read(count * self.dim * self.dtype.itemsize)
                    yield np.frombuffer(data, dtype=self.dtype).reshape(count, self.dim)
        except _BROKEN as error:
            raise _broken(str(self), error) from error


@dataclasses.dataclass(frozen=True)
class LayoutShard:
    """One file of image embeddings and what goes with it."""

    name: str
    """The file's name without its extension."""
    image: Vectors
    text: Vectors | None
    metadata: Path | None

    @property
    def vectors(self) -> dict[str, Vectors]:
        return {"image": self.image} | ({"text": self.text} if self.text is not None else {})


def find_embeddings(source: Path) -> list[LayoutShard]:
    """The shards at `source`, in order; numbers of rows and widths agree.

    Raises:
        DataError: There is nothing of a known layout, a part is missing or broken, or parts do not fit each other.
    """
    if source.is_file():
        shards = _flat(source, [source])
    elif (source / FOLDERS["image"]).is_dir():
        shards = _clip_retrieval(source)
    else:
        shards = _flat(source, _files_of(source))
    _check_fit(shards)
    return shards


def _clip_retrieval(source: Path) -> list[LayoutShard]:
    parts = {kind: _numbered(source, kind) for kind in ("image", "text", "metadata")}
    numbers = sorted(parts["image"])
    if not numbers:
        raise _unknown(source)

    for kind in ("text", "metadata"):
        if parts[kind] and (lone := sorted(set(numbers) ^ set(parts[kind]))):
            raise DataError(f"{source}: shard {lone[0]} has no {FOLDERS[kind]} or no img_emb file.", fix=FIX)

    return [
        LayoutShard(
            name=parts["image"][number].stem,
            image=_array(parts["image"][number]),
            text=_array(parts["text"][number]) if parts["text"] else None,
            metadata=parts["metadata"].get(number),
        )
        for number in numbers
    ]


def _numbered(source: Path, kind: str) -> dict[int, Path]:
    """Shard number -> file; clip-retrieval pads its numbers as the count of shards needs."""
    folder = FOLDERS[kind]
    pattern = re.compile(rf"{folder}_(\d+)\.{'parquet' if kind == 'metadata' else 'npy'}")
    shards: dict[int, Path] = {}
    for path in sorted((source / folder).glob("*")):
        if match := pattern.fullmatch(path.name):
            number = int(match[1])
            if number in shards:
                raise DataError(f"{source}: both {shards[number].name} and {path.name} are shard {number}.", fix=FIX)
            shards[number] = path
    return shards


def _files_of(source: Path) -> list[Path]:
    """The .npy or .npz files of a folder by the numbers in their names: part2 before part10."""
    entries = [path for path in source.glob("*") if not path.name.startswith(".")]
    files = [path for path in entries if path.suffix in (".npy", ".npz") and path.is_file()]
    if not files:
        raise _unknown(source)
    if len({path.suffix for path in files}) > 1:
        raise DataError(f"{source}: holds both .npy and .npz files, so it is unclear which to read.", fix=FIX)

    read = {*files, *(path.with_suffix(".parquet") for path in files)}
    if others := sorted(path.name for path in entries if path not in read):
        log.warn(f"{source}: {len(others):,} other files and folders are not read, such as {others[0]!r}")
    return sorted(
        files, key=lambda path: ([_number_or_text(part) for part in re.split(r"(\d+)", path.stem)], path.name)
    )


def _number_or_text(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _flat(source: Path, files: Sequence[Path]) -> list[LayoutShard]:
    """Files of rows, each with its metadata of the same name."""
    with_metadata = [path for path in files if path.with_suffix(".parquet").is_file()]
    if with_metadata and (without := [path.name for path in files if path not in with_metadata]):
        raise DataError(
            f"{source}: {len(without):,} of {len(files):,} files have no .parquet of their name, such as {without[0]}.",
            fix="Give metadata to all files or to none; without it a key is the file's name and the row number.",
        )
    if files[0].suffix not in (".npy", ".npz"):
        raise _unknown(source)

    arrays = _chosen_members(files[0]) if files[0].suffix == ".npz" else (None, None)
    return [
        LayoutShard(
            name=path.stem,
            image=_array(path, arrays[0]),
            text=_array(path, arrays[1]) if arrays[1] is not None else None,
            metadata=path.with_suffix(".parquet") if with_metadata else None,
        )
        for path in files
    ]


def _chosen_members(path: Path) -> tuple[str, str | None]:
    """The arrays of images and texts among those of a .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(name.removesuffix(".npy") for name in archive.namelist())
    except _BROKEN as error:
        raise _broken(str(path), error) from error

    models = [name.removesuffix(_IMAGE) for name in members if name.endswith(_IMAGE)]
    if not models and len(members) == 1:
        return members[0], None
    if not models:
        raise DataError(
            f"{path}: no array named like l14_img among {', '.join(members) or 'none'}.",
            fix="Name the image embeddings <model>_img (and the texts' <model>_txt), or keep one array alone in"
            " the file.",
        )

    model = _PREFERRED if _PREFERRED in models else models[0]
    image, text = model + _IMAGE, model + _TEXT
    chosen = (image, text if text in members else None)
    log.info(
        f"embed     taking {' and '.join(name for name in chosen if name)} of the arrays {', '.join(members)}"
        + (
            f"; for another model keep only its arrays in the .npz (there are {', '.join(models)})"
            if models[1:]
            else ""
        )
    )
    return chosen


def _array(path: Path, member: str | None = None) -> Vectors:
    try:
        shape, dtype = array_header(path) if member is None else _member_header(path, member)
    except DataError as error:
        raise DataError(error.problem, fix=_AGAIN) from error
    if len(shape) != 2 or not shape[1] or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        name = path if member is None else f"{path} ({member})"
        raise DataError(f"{name}: {shape} {dtype}, not rows of float16, float32 or float64.", fix=FIX)
    return Vectors(path, member, shape[0], shape[1], dtype)


def _member_header(path: Path, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """As `array_header`, for a member of a .npz."""
    try:
        with _opened(path, member) as handle:
            shape, fortran, dtype = read_array_header(handle)
            offset = handle.tell()
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(f"{member}.npy").file_size
    except KeyError as error:
        raise DataError(f"{path}: no array {member!r}, which the first file has.", fix=_AGAIN) from error
    except _BROKEN as error:
        raise _broken(f"{path} ({member})", error) from error

    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if fortran or dtype.hasobject:
        raise DataError(f"{path} ({member}): rows are not stored one after the other as plain numbers.", fix=_AGAIN)
    if size != expected:
        raise DataError(f"{path} ({member}): {size:,} bytes, but {shape} {dtype} needs {expected:,}.", fix=_AGAIN)
    return shape, dtype


@contextlib.contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes] | io.BufferedIOBase]:
    if member is None:
        with path.open("rb") as handle:
            yield handle
    else:
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as handle:
            yield handle


def _check_fit(shards: Sequence[LayoutShard]) -> None:
    """Before anything is read or converted: every part has the rows of its shard and the width of the first."""
    first = shards[0].image
    for shard in shards:
        for vectors in shard.vectors.values():
            if vectors.dim != first.dim:
                raise DataError(
                    f"{vectors}: width {vectors.dim}, but the store has width {first.dim} ({first}).",
                    fix="All embeddings of a store come from one model; keep those of others apart.",
                )
            if vectors.rows != shard.image.rows:
                raise DataError(
                    f"{vectors}: {vectors.rows:,} rows, but {shard.image.rows:,} in {shard.image}.", fix=FIX
                )

        if shard.metadata is not None and (rows := table_rows(shard.metadata)) != shard.image.rows:
            raise DataError(f"{shard.metadata}: {rows:,} rows, but {shard.image.rows:,} in {shard.image}.", fix=FIX)


def _unknown(source: Path) -> DataError:
    state = "" if source.exists() else " (nothing is there)"
    below = sorted({path.parent for pattern in ("*/*.npy", "*/*.npz") for path in source.glob(pattern)})
    return DataError(
        f"{source}: neither an embedding store nor a clip-retrieval folder, nor .npy or .npz files{state}.",
        fix=f"Did you mean {below[0]}? {FIX}" if below else FIX,
    )


def _broken(where: str, error: BaseException) -> DataError:
    return DataError(f"{where}: cannot be read ({error}).", fix=_AGAIN)
