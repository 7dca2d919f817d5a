"""Folders of images, each with a .txt of the same name beside it; every line of the .txt is a caption."""

import collections
import os
import unicodedata
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from clip_cid import log
from clip_cid.addresses import without_secrets
from clip_cid.data.pairs.beside import files_beside, read_beside
from clip_cid.data.pairs.format import (
    COMMON_COLUMNS,
    SHARD_ROWS,
    EmptySourceError,
    PairFormat,
    Scan,
    Source,
    SourceFile,
)
from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.pairs.pair import NO_CAPTION, BadSample, Pair
from clip_cid.data.pairs.sample_parts import (
    IMAGE_EXTENSIONS,
    clean_captions,
    key_hash,
    key_in_json,
    readable_key,
)
from clip_cid.errors import DataError
from clip_cid.file_digests import digest
from clip_cid.recipe import PairsConfig
from clip_cid.remote import files as remote_files
from clip_cid.remote.contract import RemoteFile

_OTHER_IMAGES = {".heic", ".heif", ".jxl", ".svg"}


class Folders(PairFormat):
    """A pair is an image file and the .txt of its name; rows are sorted by path."""

    kind = "folder"
    examples = "a folder of images with .txt files"
    refers_to_files = True
    schema = pa.schema(
        [
            *COMMON_COLUMNS,
            ("image", pa.binary()),
            ("caption_file", pa.binary()),
            ("key_file", pa.binary()),
            ("bytes", pa.int64()),
        ]
    )

    def owns(self, path: Path, settings: PairsConfig) -> bool:
        return path.is_dir()

    def reads_ranges(self, name: str) -> bool:
        return True

    def fingerprint(self, source: Source) -> list[tuple[str, int]]:
        if source.path is None:
            return super().fingerprint(source)
        return [(f"{source.name}/{file.image}", file.bytes) for file in _list_folder(source.path).images]

    def scan(self, source: SourceFile, settings: PairsConfig) -> Scan:
        listing = _list_source(source, with_json=settings.key_field is not None)
        _refuse_other_sources(source.name, listing)
        _warn_of_files_left_out(str(source.path) if source.remote is None else source.name, listing)

        # The folder's own size and time say nothing of the files below it, so theirs stand in the identity.
        identity = [(file.image, file.bytes, file.version) for file in listing.images]
        field = [] if settings.key_field is None else [settings.key_field]
        return Scan([*identity, *field], self._rows(source, listing.images, settings.key_field))

    def read(self, source: SourceFile, row: dict[str, Any], settings: PairsConfig) -> Pair:
        image = read_beside(source, row["image"], "image")
        beside = row["caption_file"]
        lines = [] if beside is None else read_beside(source, beside, "caption file").splitlines()
        captions = clean_captions(lines, optional=settings.captions_are_optional)
        return Pair(row["key"], image, captions, dict.fromkeys(settings.keep_fields, ""))

    def files_of(self, source: SourceFile, rows: pa.RecordBatch) -> list[Path | RemoteFile]:
        names = [name for column in ("image", "caption_file", "key_file") for name in rows.column(column).to_pylist()]
        return files_beside(source, names)

    def shard_bytes(self, source: SourceFile, rows: pa.RecordBatch) -> int:
        return int(rows.column("bytes").to_numpy().sum())

    def image_name(self, row: dict[str, Any]) -> str:
        return os.fsdecode(row["image"])

    def _rows(
        self, source: SourceFile, files: "list[_ListedImage]", key_field: str | None
    ) -> Generator[pa.RecordBatch]:
        """A key is the path without its extension, or in a field of the .json."""
        for start in range(0, len(files), SHARD_ROWS):
            columns: dict[str, list[object]] = {column: [] for column in self.schema.names}
            for file in files[start : start + SHARD_ROWS]:
                key, problem = _key(source, file, key_field)
                columns["key"].append(key)
                columns["key_hash"].append(key_hash(key))
                lacking = None if file.caption_file else f"{NO_CAPTION} (.txt beside the image)"
                columns["problem"].append(problem or lacking)
                columns["image"].append(os.fsencode(file.image))
                columns["caption_file"].append(os.fsencode(file.caption_file) if file.caption_file else None)
                columns["key_file"].append(os.fsencode(file.key_file) if file.key_file else None)
                columns["bytes"].append(file.bytes)
            yield pa.RecordBatch.from_pydict(columns, schema=self.schema)


@dataclass(frozen=True)
class _ListedImage:
    """An image, and its .txt and .json if there are any; paths are relative to the folder."""

    image: str
    caption_file: str | None
    key_file: str | None
    """None if keys are not read from it."""
    bytes: int
    """Of these files."""
    version: int | list[str]
    """When the latest of them was written, in nanoseconds; elsewhere the version of each."""


class _Status(NamedTuple):
    """Of one file."""

    bytes: int
    version: int | str


class _Found:
    """The files under a folder, each where it belongs by the suffix of its name."""

    def __init__(self) -> None:
        self.images: dict[str, _Status] = {}
        self.texts: dict[str, _Status] = {}
        self.others: collections.Counter[str] = collections.Counter()
        """Files of other types, by suffix."""
        self.linked_folders = 0

    def add(self, name: str, status: _Status) -> None:
        suffix = _suffix(name)
        if suffix.removeprefix(".") in EXTENSIONS:
            self.images[name] = status
        elif suffix in (".txt", ".json"):
            self.texts[name] = status
        else:
            self.others[suffix] += 1

    def walk(self, root: Path, below: str = "") -> None:
        """Collect the files under `root/below`; linked folders are left out and counted."""
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = below + entry.name
                if entry.name.startswith("."):
                    continue

                if entry.is_dir(follow_symlinks=False):
                    self.walk(root, name + "/")
                elif entry.is_dir():
                    self.linked_folders += 1
                elif entry.is_file() or (entry.is_symlink() and _is_image(_suffix(name))):
                    # A link to nowhere keeps its row and is counted as a broken image.
                    status = entry.stat(follow_symlinks=entry.is_file())
                    self.add(name, _Status(status.st_size, status.st_mtime_ns))
                else:
                    self.others[_suffix(name)] += 1


def _key(source: SourceFile, file: _ListedImage, key_field: str | None) -> tuple[str, str | None]:
    """The key of an image, and what is wrong with it."""
    if key_field is None:
        return readable_key(os.fsencode(os.path.splitext(file.image)[0]))
    try:
        data = None if file.key_file is None else read_beside(source, os.fsencode(file.key_file), "json file")
    except BadSample as error:
        return "", f"no key: {error.reason}"
    return key_in_json(data, key_field)


@dataclass(frozen=True)
class _Listing:
    """What is under a folder."""

    images: list[_ListedImage]
    linked_folders: int
    """Not followed, since links can form a circle."""
    texts_alone: list[str]
    """.txt files without an image of their name."""
    others: collections.Counter[str]
    """Files of other types, by suffix."""


def folder_of(address: str, files: Mapping[str, RemoteFile]) -> RemoteFile:
    """A folder elsewhere as if it was one file, whose version is that of all in it."""
    version = digest([[name, *file.state] for name, file in sorted(files.items())])
    folder = without_secrets(address).rstrip("/") + "/"
    return RemoteFile(folder, address.rstrip("/") + "/", sum(file.bytes for file in files.values()), version)


def _list_source(source: SourceFile, *, with_json: bool) -> _Listing:
    """As `_list_folder`, of a folder here or elsewhere."""
    if source.remote is None:
        return _list_folder(source.path, with_json=with_json)

    found = _Found()
    there = remote_files.at(source.remote.address)
    for name, file in there.items() if isinstance(there, dict) else ():
        if not any(part.startswith(".") for part in name.split("/")):
            found.add(name, _Status(file.bytes, file.version))
    return _listing(found, with_json=with_json)


def _list_folder(path: Path, *, with_json: bool = False) -> _Listing:
    """Every image under `path`, sorted by its path; hidden files and folders are left out.

    Args:
        path: The folder.
        with_json: Whether the .json of an image belongs to it.

    Raises:
        DataError: A folder cannot be read.
    """
    found = _Found()
    try:
        found.walk(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error}).", fix="Check its permissions.") from error
    return _listing(found, with_json=with_json)


def _listing(found: _Found, *, with_json: bool) -> _Listing:
    """The images with what belongs to each."""
    images, texts = found.images, found.texts
    listed: list[_ListedImage] = []
    other_spellings = _by_usual_spelling(texts)
    beside = _beside_another(images)
    others = found.others + collections.Counter(map(_suffix, beside))
    for image in sorted(images.keys() - beside):
        stem = os.path.splitext(image)[0]
        caption_file, key_file = (
            name if name in texts else other_spellings.get(_usual_spelling(name))
            for name in (f"{stem}.txt", f"{stem}.json")
        )
        key_file = key_file if with_json else None
        stats = [images[image], *(texts[name] for name in (caption_file, key_file) if name is not None)]
        listed.append(
            _ListedImage(
                image=image,
                caption_file=caption_file,
                key_file=key_file,
                bytes=sum(status.bytes for status in stats),
                version=_version([status.version for status in stats]),
            )
        )

    used = {file.caption_file for file in listed}
    alone = sorted(text for text in texts if text not in used and not text.lower().endswith(".json"))
    return _Listing(listed, found.linked_folders, alone, others)


def _by_usual_spelling(names: Collection[str]) -> dict[str, str]:
    """The names with accents, which macOS writes as letters of their own, and with .TXT, by the usual spelling."""
    spelled = {_usual_spelling(name): name for name in names if not name.isascii()}
    return spelled | {_usual_spelling(name): name for name in names if not name.endswith((".txt", ".json"))}


def _usual_spelling(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(name)[0]) + _suffix(name)


def _version(versions: list[int | str]) -> int | list[str]:
    times = [version for version in versions if isinstance(version, int)]
    return max(times) if times else list(map(str, versions))


def _beside_another(images: Collection[str]) -> set[str]:
    """Images of further types, such as previews, beside one of the same name that open_clip would take."""
    usual = {stem for stem, suffix in map(os.path.splitext, images) if suffix.lower()[1:] in IMAGE_EXTENSIONS}
    names = ((image, *os.path.splitext(image)) for image in images)
    return {image for image, stem, suffix in names if stem in usual and suffix.lower()[1:] not in IMAGE_EXTENSIONS}


def _refuse_other_sources(name: str, listing: _Listing) -> None:
    """Nothing but files that are sources themselves, such as the tars of a downloaded data set."""
    for suffix in (".tar", ".parquet", ".csv", ".tsv"):
        if not listing.images and (count := listing.others[suffix]):
            raise EmptySourceError(
                f"{name}: a folder without images; it holds {count:,} {suffix} files.",
                fix=f"Give the files themselves: {name.rstrip('/')}/**/*{suffix}",
            )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(suffix: str) -> bool:
    return suffix in _OTHER_IMAGES or suffix.removeprefix(".") in EXTENSIONS


def _warn_of_files_left_out(path: str, listing: _Listing) -> None:
    pictures = {suffix: count for suffix, count in listing.others.items() if _is_image(suffix)}
    if pictures:
        types = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(pictures.items()))
        log.warn(
            f"{path}: images of types that are not read, or beside one of the same name, are left out: {types} (read are"
            f" .{', .'.join(EXTENSIONS)})"
        )
    if listing.linked_folders:
        log.warn(f"{path}: {listing.linked_folders:,} linked folders are not followed; name them in pairs.source")
    if listing.texts_alone:
        count, example = len(listing.texts_alone), listing.texts_alone[0]
        log.warn(f"{path}: {count:,} .txt files have no image of their name beside them, such as {example!r}")
