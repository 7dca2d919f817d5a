"""The layouts of embeddings made elsewhere. Names and headers alone tell which one it is; nothing is unpickled.

X/img_emb/img_emb_0.npy ...        clip-retrieval, with or without text_emb/ and metadata/
X/images/0.npy ...                 the same in other words: texts/ or captions/, laion2B-en-metadata/
X/image_embeddings.npy ...         the same without folders: text_embeddings.npy, metadata.parquet
X/0a1b.npz ...                     DataComp: arrays such as l14_img and l14_txt, with or without 0a1b.parquet
X/part1.npy ... or one X.npy       rows of images alone, with or without part1.parquet
X/part1.parquet ... or one file    a column of vectors, such as `embedding`, beside the keys; also .arrow, .feather and .lance
X/part1.csv ... or one file        a column for each dimension, such as emb_0 to emb_511, beside the keys; also .tsv and these
"""

import contextlib
import dataclasses
import io
import math
import textwrap
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from clip_cid import log
from clip_cid.data.embeddings.files import ARROW, FOLDERS, array_header, read_array_header, table_rows, table_schema
from clip_cid.data.embeddings.lance_tables import SUFFIX as LANCE
from clip_cid.data.embeddings.lance_tables import is_lance
from clip_cid.data.embeddings.names import Name, Role, in_order, listed
from clip_cid.data.embeddings.text_tables import TEXT_TABLES, is_text_table
from clip_cid.data.embeddings.vector_columns import (
    spread_blocks,
    spread_columns,
    vector_blocks,
    vector_columns,
    vector_type,
)
from clip_cid.errors import DataError

FIX = (
    "Give a store of ours; a clip-retrieval folder (img_emb/img_emb_*.npy, optionally text_emb/text_emb_*.npy"
    " and metadata/metadata_*.parquet with equal numbers); a folder of DataComp's .npz or of .npy files; one of"
    " .parquet or .arrow files with a column of vectors (lists of float32, float16 or float64), or with a column for each"
    " dimension (emb_0, emb_1 and so on), also .csv; or one such file."
)
_AGAIN = (
    "Fetch or write this file again: rows of float16, float32 or float64, one after the other (np.ascontiguousarray)."
)
_SPLITS = ("train", "val", "valid", "validation", "dev", "test")
_NAMES = (
    "Name files or folders by what they hold, alike but for that word: image_embeddings.npy and"
    " text_embeddings.npy (and metadata.parquet); for shards image_0.npy, text_0.npy, image_1.npy and so on."
    " Numbered files without such a word (0.npy, 1.npy) are shards of images."
)
_READ_BY = (
    ((".pt", ".pth"), "torch.load(FILE).float().cpu().numpy()"),
    ((".safetensors",), "safetensors.numpy.load_file(FILE)[NAME]"),
    ((".h5", ".hdf5"), "h5py.File(FILE)[NAME][:]"),
    ((".txt",), "np.loadtxt(FILE, delimiter=',', dtype='float32')"),
    ((".json", ".jsonl"), "np.array(pandas.read_json(FILE, lines=True)['embedding'].to_list(), dtype='float32')"),
    ((".index", ".faiss"), "faiss.read_index(FILE).reconstruct_n(0, ROWS)"),
)
"""Endings of files that often hold embeddings, and what reads them."""
_PREFERRED = ("l", 14)
_ARRAYS, _TABLE = (".npy", ".npz"), ".parquet"
_TABLES = (_TABLE, *ARROW, LANCE, *TEXT_TABLES)
_OF_ARRAYS: tuple[Role, ...] = ("image", "text")
_BLOCK_ROWS = 4096
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Vectors:
    """An array of embeddings: a .npy file, a member of a .npz archive, or a column of a table."""

    path: Path
    member: str | None
    """Of the archive, or the column."""
    rows: int
    dim: int
    dtype: np.dtype[Any]
    spread: tuple[str, ...] = ()
    """The columns of a table, where each holds one dimension."""

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"

    def blocks(self) -> Generator[Float[np.ndarray, "some dim"]]:
        """All rows, some at a time, so that an array of any size can be read.

        Raises:
            DataError: The file is damaged or cut short.
        """
        if self.member is not None and self.path.suffix in _TABLES:
            if self.spread:
                yield from spread_blocks(self.path, self.spread, self.dtype, rows=_BLOCK_ROWS)
            else:
                yield from vector_blocks(self.path, self.member, dim=self.dim, rows=_BLOCK_ROWS)
            return
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
    """The table with its keys; it may also be the one with the vectors."""
    keys: pa.LargeStringArray | None = None
    """Keys that count in place of those of the table."""

    @property
    def vectors(self) -> dict[str, Vectors]:
        return {"image": self.image} | ({"text": self.text} if self.text is not None else {})

    @property
    def vectors_beside_keys(self) -> list[str]:
        """The columns of vectors in the table with the keys, if it is the one that holds the embeddings."""
        if self.metadata != self.image.path:
            return []
        spread = [name for vectors in self.vectors.values() for name in vectors.spread]
        return spread or vector_columns(self.image.path)


def find_embeddings(source: Path) -> list[LayoutShard]:
    """The shards at `source`, in order; numbers of rows and widths agree. What is taken for what is logged.

    Raises:
        DataError: There is nothing of a known layout, a part is missing or broken, parts do not fit each other, or
            the names do not say clearly what holds images.
    """
    if (source.is_file() and source.suffix in _TABLES) or is_lance(source):
        return _of_vector_tables(source, [source])
    files = _of_file(source) if source.is_file() else _of_folder(source)
    arrays, tables = files.arrays, files.tables
    if not arrays:
        return _of_vector_tables(source, [path for path in _entries(source) if path.suffix in _TABLES])
    if len({file.path.suffix for file in arrays}) > 1:
        raise DataError(f"{source}: holds both .npy and .npz files, so it is unclear which to read.", fix=FIX)

    members = _chosen_members(arrays[0].path) if arrays[0].path.suffix == ".npz" else None
    if members is not None and members.clear:
        images, texts = arrays, []
    else:
        images, texts = _images_and_texts(source, arrays)
    text_of = _matched(source, images, texts)
    metadata_of, unread = _metadata_of(source, images, tables)

    shards = [
        LayoutShard(
            name=file.path.stem,
            image=_array(file.path, members and members.image),
            text=_text(file, members, text_of.get(file.path)),
            metadata=metadata_of.get(file.path),
        )
        for file in images
    ]
    _check_fit(shards)
    if not metadata_of:
        if members is None or not members.clear:
            _check_one_series(source, images, shards)
        _warn_of_lost_keys(source, images)
    _log_taken(source, shards, [*files.unread, *unread])
    return shards


@dataclasses.dataclass(frozen=True)
class _File:
    """A file, and what it holds by its name or its folder's."""

    path: Path
    name: Name
    role: Role | None


@dataclasses.dataclass(frozen=True)
class _Files:
    arrays: list[_File]
    tables: list[_File]
    unread: list[Path]


def _named(path: Path, role: Role | None = None) -> _File:
    name = Name.of(path.stem)
    return _File(path, name, role or name.role)


def _of_file(source: Path) -> _Files:
    """One file of rows, and the metadata of the same name."""
    if source.suffix not in _ARRAYS:
        raise _unknown(source)
    tables = [_named(path) for path in [source.with_suffix(_TABLE)] if path.is_file()]
    return _Files([_named(source)], tables, [])


def _of_folder(source: Path) -> _Files:
    """The files in a folder, or those in its folders of images, texts and metadata."""
    entries = _entries(source)
    here = [_named(path) for path in entries if path.is_file() and path.suffix in (*_ARRAYS, _TABLE)]
    arrays = [file for file in here if file.path.suffix in _ARRAYS]
    tables = [file for file in here if file.path.suffix == _TABLE]

    folders = _role_folders(entries)
    below = [file for role in _OF_ARRAYS for file in _in_folders(folders[role], role, _ARRAYS)]
    metadata = _in_folders(folders["metadata"], "metadata", (_TABLE,))
    if below and arrays and source / FOLDERS["image"] not in folders["image"]:
        raise DataError(
            f"{source}: arrays lie both in it ({listed([file.path for file in arrays], source)}) and in its folders"
            f" ({listed([file.path for file in below], source)}).",
            fix="Keep in one folder only what belongs together.",
        )
    arrays = below or arrays
    tables = metadata or tables or _in_folders(folders["image"], "metadata", (_TABLE,))

    used = {folder for some in folders.values() for folder in some}
    used |= {file.path for file in (*arrays, *tables)}
    unread = [path for path in entries if path not in used and not (below and not _holds_data(path))]
    return _Files(arrays, tables, unread)


def _entries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*") if not path.name.startswith(".")), key=in_order)


def _holds_data(path: Path) -> bool:
    files = _entries(path) if path.is_dir() else [path]
    return any(file.suffix in (*_ARRAYS, _TABLE) for file in files)


def _role_folders(entries: Sequence[Path]) -> dict[Role, list[Path]]:
    """The folders that hold images, texts or metadata by their names; `embeddings` alone means those of images."""
    names = {path: Name.of(path.name) for path in entries if path.is_dir()}

    def holding(role: Role | None, *suffixes: str) -> list[Path]:
        few = [path for path, name in names.items() if name.role == role and (role or not (name.roles or name.rest))]
        return [path for path in few if any(file.suffix in suffixes for file in _entries(path))]

    images, texts = holding("image", *_ARRAYS), holding("text", *_ARRAYS)
    return {
        "image": images or ([] if texts else holding(None, *_ARRAYS)),
        "text": texts,
        "metadata": holding("metadata", _TABLE),
    }


def _in_folders(folders: Sequence[Path], role: Role, suffixes: tuple[str, ...]) -> list[_File]:
    files = [_named(path, role) for folder in folders for path in _entries(folder) if path.suffix in suffixes]
    for file in files:
        if role != "metadata" and file.name.role not in (None, role):
            raise DataError(
                f"{file.path}: is named as {file.name.role} embeddings, but lies among those of {role}s.",
                fix="Rename or move it, so that the names of file and folder agree.",
            )
    return files


def _images_and_texts(source: Path, arrays: list[_File]) -> tuple[list[_File], list[_File]]:
    """The files of images and those of texts, by their names; files that say nothing are of images.

    Raises:
        DataError: Only some of the files say what they are, one says two things, or all are of texts.
    """
    images, texts = ([file for file in arrays if file.role == role] for role in _OF_ARRAYS)
    unclear = [file for file in arrays if file.role not in _OF_ARRAYS]
    if unclear and (images or texts or any(file.name.roles for file in unclear)):
        named = [f"images: {listed([file.path for file in images], source)}"] if images else []
        named += [f"texts: {listed([file.path for file in texts], source)}"] if texts else []
        named += [f"unclear: {listed([file.path for file in unclear], source)}"]
        raise DataError(f"{source}: not every name says what the file holds ({'; '.join(named)}).", fix=_NAMES)
    if texts and not images:
        raise DataError(
            f"{source}: named as embeddings of texts ({listed([file.path for file in texts], source)}), and none of"
            " images is there.",
            fix=_NAMES,
        )

    of_source = Name.of(source.name)
    if unclear and source.is_dir() and of_source.role == "text" and not of_source.rest:
        raise DataError(
            f"{source}: the folder is named as embeddings of texts"
            f" ({listed([file.path for file in unclear], source)}), and images are needed.",
            fix=f"Give {source.parent}, if it holds those of the images too. {_NAMES}",
        )
    if len({file.name.numbered for file in images}) > 1:
        odd = [file.path for file in images if not file.name.numbered]
        raise DataError(
            f"{source}: some files of images are numbered, and others are not ({listed(odd, source)}).", fix=_NAMES
        )
    return images or unclear, texts


def _matched(source: Path, images: list[_File], others: list[_File]) -> dict[Path, Path]:
    """Which file goes with which of the images: the one whose name differs in the role alone.

    Raises:
        DataError: A file has no partner, or two.
    """
    if not others:
        return {}
    of_image, of_other = _by_shard(source, images), _by_shard(source, others)
    for have, lack, missing in ((of_image, of_other, others), (of_other, of_image, images)):
        if lone := [path for shard, path in have.items() if shard not in lack]:
            kind = FOLDERS[missing[0].role or "image"]
            raise DataError(
                f"{source}: shard {_label(lone[0])} has no {kind} file ({len(lone):,} such shards);"
                f" there are {listed([file.path for file in images], source)}"
                f" and {listed([file.path for file in others], source)}.",
                fix=_NAMES,
            )
    return {path: of_other[shard] for shard, path in of_image.items()}


def _by_shard(source: Path, files: list[_File]) -> dict[tuple[int | str, ...], Path]:
    shards: dict[tuple[int | str, ...], Path] = {}
    for file in files:
        if (other := shards.setdefault(file.name.rest, file.path)) != file.path:
            raise DataError(
                f"{source}: both {other.name} and {file.path.name} are shard {_label(file.path)}.", fix=_NAMES
            )
    return shards


def _label(path: Path) -> str:
    return " ".join(str(part) for part in Name.of(path.stem).rest) or path.name


def _metadata_of(source: Path, images: list[_File], tables: list[_File]) -> tuple[dict[Path, Path], list[Path]]:
    """The metadata of each file of images, of all or of none; and the tables that are not read."""
    paths = {table.path for table in tables}
    same_name = {file.path: path for file in images if (path := file.path.with_suffix(_TABLE)) in paths}
    if same_name:
        if without := [file.path.name for file in images if file.path not in same_name]:
            raise DataError(
                f"{source}: {len(without):,} of {len(images):,} files have no .parquet of their name, such as"
                f" {without[0]}.",
                fix="Give metadata to all files or to none; without it a key is the file's name and the row number.",
            )
        return same_name, sorted(paths - {*same_name.values()})

    named = [table for table in tables if table.role == "metadata"]
    unread = [table.path for table in tables if table.role != "metadata"]
    if len(images) == len(named) == 1:
        return {images[0].path: named[0].path}, unread
    if len(named) == 1:  # one table for all shards
        return {}, [named[0].path, *unread]
    return _matched(source, images, named), unread


def _check_one_series(source: Path, images: list[_File], shards: list[LayoutShard]) -> None:
    """Files of several names: if their rows are equal in number, one may be of the other's images or texts.

    Raises:
        DataError: Two series of files have the same numbers of rows.
    """
    named = images[0].name.role is not None
    if images[0].role is not None and not named:
        return  # a folder of images holds the shards of one series, whatever their names

    meaning = "the same images twice (another model, a copy)" if named else "images and texts"
    fix = "Give one of the files, or number the shards: image_0.npy, image_1.npy and so on." if named else _NAMES

    rows: dict[tuple[int | str, ...], list[int]] = {}
    example: dict[tuple[int | str, ...], Path] = {}
    for file, shard in zip(images, shards, strict=True):
        series = tuple(part for part in file.name.pattern if not (named and part in _SPLITS))
        rows.setdefault(series, []).append(shard.image.rows)
        example.setdefault(series, file.path)

    first: dict[tuple[int, ...], Path] = {}
    for pattern, counts in rows.items():
        if (other := first.setdefault(tuple(counts), example[pattern])) != example[pattern]:
            raise DataError(
                f"{source}: {other.name} and {example[pattern].name} have the same number of rows ({sum(counts):,}):"
                f" they may be shards of images, or {meaning}"
                f" (the files are {listed([file.path for file in images], source)}).",
                fix=fix,
            )


def _warn_of_lost_keys(source: Path, images: list[_File]) -> None:
    """A folder of images given alone, though the metadata with the keys lies beside it."""
    if source.is_dir() and images[0].path.parent == source:
        folders = [path for path in _entries(source.parent) if path.is_dir() and Name.of(path.name).role == "metadata"]
        beside = [path for path in folders if any(file.suffix == _TABLE for file in _entries(path))]
        if beside:
            log.warn(
                f"{source}: the keys in {beside[0]} are not read, because {source.name} alone was given; give"
                f" {source.parent} to take them"
            )


def _log_taken(source: Path, shards: Sequence[LayoutShard], unread: list[Path]) -> None:
    """Log which files are taken for what, and warn of those that are not read."""
    below = source if source.is_dir() and not is_lance(source) else source.parent
    taken = {
        "images": [shard.image.path for shard in shards],
        "texts": [shard.text.path for shard in shards if shard.text is not None],
        "keys": [shard.metadata for shard in shards if shard.metadata is not None],
    }
    log.info("embed     " + "; ".join(f"{role}: {listed(paths, below)}" for role, paths in taken.items() if paths))
    if unread:
        arrays_first = sorted(unread, key=lambda path: path.suffix not in _ARRAYS)
        names = ", ".join(repr(str(path.relative_to(below))) for path in arrays_first[:5])
        log.warn(f"{source}: {len(unread):,} other files and folders are not read, such as {names}")


@dataclasses.dataclass(frozen=True)
class _Members:
    """The arrays taken from each .npz."""

    image: str
    text: str | None
    clear: bool
    """Whether their names say what they hold."""


def _chosen_members(path: Path) -> _Members:
    """The arrays of images and texts among those of a .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(name.removesuffix(".npy") for name in archive.namelist())
    except _BROKEN as error:
        raise _broken(str(path), error) from error

    names = {member: Name.of(member) for member in members}
    images, texts = ({name.rest: member for member, name in names.items() if name.role == role} for role in _OF_ARRAYS)
    if len(members) == 1 and not names[members[0]].roles:
        return _Members(members[0], None, clear=False)
    if not images:
        raise DataError(
            f"{path}: no array named like l14_img among {', '.join(members) or 'none'}.",
            fix="Name the image embeddings <model>_img (and the texts' <model>_txt), or keep one array alone in"
            " the file.",
        )
    if len(images) < (count := sum(name.role == "image" for name in names.values())):
        raise DataError(
            f"{path}: {count:,} arrays are named as images of the same model, among {', '.join(members)}.",
            fix="Keep one of them.",
        )

    model = _PREFERRED if _PREFERRED in images else next(iter(images))
    chosen = _Members(images[model], texts.get(model), clear=True)
    log.info(
        f"embed     taking {' and '.join(name for name in (chosen.image, chosen.text) if name)} of the arrays"
        f" {', '.join(members)}"
        + (
            f"; for another model keep only its arrays in the .npz (there are {', '.join(images.values())})"
            if len(images) > 1
            else ""
        )
    )
    return chosen


def _of_vector_tables(source: Path, tables: list[Path]) -> list[LayoutShard]:
    """Tables with a column of vectors, and the keys beside it."""
    columns = _columns_of_vectors(tables)
    holding = [path for path in tables if columns[path]]
    if not holding:
        raise _unknown(source, tables)
    holding = [path for path in holding if table_rows(path)] or holding  # Spark writes files without rows
    image, text = _chosen_columns(holding[0], [*columns[holding[0]]])
    _check_same_columns(holding, tables, columns, [name for name in (image, text) if name is not None])

    shards: list[LayoutShard] = []
    for path in holding:
        shards.append(
            LayoutShard(
                name=path.stem,
                image=_column(path, image, columns[path][image]),
                text=None if text is None else _column(path, text, columns[path][text]),
                metadata=path if _has_others(path, columns[path]) else None,
            )
        )
    _check_fit(shards)
    unread = [] if is_lance(source) else [path for path in _entries(source) if path not in holding]
    _log_taken(source, shards, unread)
    return shards


def _columns_of_vectors(tables: list[Path]) -> dict[Path, dict[str, tuple[str, ...]]]:
    """For each table its columns of vectors by name; or, if none has any, the columns of their dimensions."""
    try:
        lists = {path: vector_columns(path) for path in tables if not is_text_table(path)}
    except DataError as error:
        raise DataError(error.problem, fix="Fetch or write this file again.") from error
    for path, names in lists.items():
        if len(set(names)) < len(names):
            raise DataError(
                f"{path}: two columns of vectors have one name, among {', '.join(names)}.", fix="Leave out one of them."
            )
    if any(lists.values()):
        return {path: dict.fromkeys(lists.get(path, []), ()) for path in tables}
    return {path: spread_columns(path) for path in tables}


def _has_others(path: Path, columns: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a table has columns beside those of vectors."""
    return sum(len(spread) or 1 for spread in columns.values()) < len(table_schema(path))


def _check_same_columns(
    holding: list[Path], tables: list[Path], columns: dict[Path, dict[str, tuple[str, ...]]], wanted: list[str]
) -> None:
    """Tables that hold embeddings have the same columns of them, and all or none have others.

    Raises:
        DataError: They do not, or a table has such a column of another type.
    """
    first, has_others = holding[0], dict[Path, bool]()
    for path in tables:
        schema = table_schema(path)
        for name in wanted:
            if name in columns[path] or (path not in holding and (name not in schema.names or not table_rows(path))):
                continue
            what = f"is of type {schema.field(name).type}, not vectors" if name in schema.names else "is not there"
            raise DataError(
                f"{path}: column {name!r} {what}, and {first.name} has it.", fix="Give files with the same columns."
            )
        if path in holding:
            has_others[path] = _has_others(path, columns[path])

    if without := [path for path in holding if has_others[path] != has_others[first]]:
        bare, other = (first, without[0]) if has_others[without[0]] else (without[0], first)
        raise DataError(
            f"{bare}: nothing but vectors, while {other.name} has keys beside them.",
            fix="Give keys to all files or to none; without them a key is the file's name and the row number.",
        )


def _chosen_columns(path: Path, columns: list[str]) -> tuple[str, str | None]:
    """The columns with the embeddings of images and of texts."""
    roles = {name: Name.of(name).role for name in columns}
    images, texts = ([name for name in columns if roles[name] == role] for role in _OF_ARRAYS)
    unclear = [name for name in columns if roles[name] not in _OF_ARRAYS]
    if not images and len(unclear) == 1:
        images, unclear = unclear, []
    if len(images) != 1 or len(texts) > 1 or unclear:
        raise DataError(
            f"{path}: it is not clear which column holds the embeddings of images, among {', '.join(columns)}.",
            fix="Keep one column of vectors, or name them by what they hold: image_embedding and text_embedding.",
        )
    return images[0], next(iter(texts), None)


def _column(path: Path, name: str, spread: tuple[str, ...]) -> Vectors:
    rows = table_rows(path)
    return Vectors(path, name, rows, *vector_type(path, name, spread), spread)


def _text(file: _File, members: _Members | None, path: Path | None) -> Vectors | None:
    """The text embeddings that go with a file of images: an array of the same .npz, or another file."""
    if members is not None and members.text is not None:
        return _array(file.path, members.text)
    if path is None:
        return None
    return _array(path, members and members.image)


def _array(path: Path, member: str | None = None) -> Vectors:
    try:
        shape, dtype = array_header(path) if member is None else _member_header(path, member)
    except DataError as error:
        raise DataError(error.problem, fix=_AGAIN) from error
    if len(shape) != 2 or not shape[1] or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        name = path if member is None else f"{path} ({member})"
        raise DataError(
            f"{name}: {shape} {dtype}, not rows of float16, float32 or float64.",
            fix="Embeddings are rows of numbers, one row an image: array.reshape(rows, width).astype('float32'). If the"
            " file holds something else, name the files of embeddings, or take it out of the folder.",
        )
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

    expected = offset + math.prod(shape) * dtype.itemsize
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


def _unknown(source: Path, tables: Sequence[Path] = ()) -> DataError:
    how = next((how for endings, how in _READ_BY if source.name.lower().endswith(endings)), None)
    if how is not None and source.is_file():
        return DataError(
            f"{source}: embeddings are not read from files of this type.",
            fix=f"Write them as rows of a .npy first: np.save('image_embeddings.npy', {how}).",
        )

    if is_text_table(source) and source.is_file():
        names = textwrap.shorten(", ".join(table_schema(source).names), 400, placeholder=" ...")
        return DataError(
            f"{source}: has no column for each dimension, named by its number; there are {names}.",
            fix="Name them emb_0, emb_1 and so on on the first line, with key, uid, image_path or id beside them. Without"
            " names: np.save('image_embeddings.npy', np.loadtxt(FILE, delimiter=',', dtype='float32')).",
        )

    state = "" if source.exists() else " (nothing is there)"
    if tables:
        columns = ", ".join(f"{field.name} of type {field.type}" for field in table_schema(tables[0]))
        state = f" ({tables[0].name} has {textwrap.shorten(columns, 400, placeholder=' ...')})"
    arrays = [path for pattern in ("*/*.np[yz]", "*/*/*.np[yz]") for path in source.glob(pattern)]
    below = sorted(
        {path.parent.parent if Name.of(path.parent.name).role in _OF_ARRAYS else path.parent for path in arrays}
    )
    below = [folder for folder in below if folder != source]
    return DataError(
        f"{source}: neither an embedding store nor a clip-retrieval folder, nor .npy or .npz files, nor a table with"
        f" a column of vectors{state}.",
        fix=f"Did you mean {below[0]}? {FIX}" if below else FIX,
    )


def _broken(where: str, error: BaseException) -> DataError:
    return DataError(f"{where}: cannot be read ({error}).", fix=_AGAIN)
