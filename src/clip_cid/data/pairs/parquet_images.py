"""Images inside a Parquet file: a column of bytes or of lists of bytes, or the Hugging Face Hub's `struct<bytes, path>`.

Nothing is unpacked beforehand: the index says in which page of the file an image lies, and the page is read when the
image is; of lists, which may run from page to page, it is the row group. The images themselves are read for the index
only where rows of the same image are merged.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from clip_cid import log, units
from clip_cid.data.pairs.format import SourceFile
from clip_cid.data.pairs.indexed_files import bytes_at, changed, opened
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.parquet_pages import Page, data_pages, read_page

BYTES, PATH = "bytes", "path"
"""The fields of the Hub's images."""
COLUMNS = tuple((f"page_{name}", pa.int64()) for name in (*Page._fields, "place"))
"""Of the index: the page of an image, and its place there."""
COLUMNS_OF_LISTS = tuple((f"group_{name}", pa.int64()) for name in ("number", "bytes", "place"))
"""Of the index: the row group of an image that is a list, and its place there."""

_LOOKED_AT = 64  # values of a column of bytes, which may also hold paths
_LARGE_PAGE = 32 << 20  # bytes; each image that is drawn costs the reading of so many
_DECODED_PAGES = 2  # kept by each process; one may have hundreds of megabytes


class Group(NamedTuple):
    """A row group, all of whose images are read together."""

    number: int
    bytes: int
    """Of the images, as they are stored."""


class Inside(NamedTuple):
    """Where the image of a row lies."""

    part: Page | Group
    place: int
    """Of the row among those of the page or the row group."""
    row: int
    """Of the table."""
    path: bytes | None
    """The name it had."""
    digest: bytes = b""
    """Of the image, where rows are merged; empty if there is no image."""

    @property
    def columns(self) -> dict[str, int]:
        names = COLUMNS if isinstance(self.part, Page) else COLUMNS_OF_LISTS
        return {name: value for (name, _), value in zip(names, (*self.part, self.place), strict=True)}

    @property
    def bytes_read(self) -> int:
        """How much of the file is read for the image alone."""
        return self.part.bytes + (self.part.dictionary_bytes if isinstance(self.part, Page) else 0)


def is_list_of_bytes(kind: pa.DataType) -> bool:
    """Whether a type is a list of whole numbers: some tools write each byte as one, of 8 bits or of more."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def holds_images(file: pyarrow.parquet.ParquetFile, column: str, is_picture: Callable[[bytes], bool]) -> bool:
    """Whether a column holds images, and not their paths; of bytes the first values are looked at."""
    kind = file.schema_arrow.field(column).type
    if is_list_of_bytes(kind):
        return True
    if pa.types.is_struct(kind):
        has_bytes = BYTES in [field.name for field in kind] and _is_bytes(kind.field(BYTES).type)
        return has_bytes and not (path_type(kind) and _is_null(file, _leaf(file, column, BYTES)))
    if not _is_bytes(kind):
        return False
    filled = (data for data in _values(file, column) if data)
    return any(is_picture(data) for data in itertools.islice(filled, _LOOKED_AT))


def path_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of the paths in a column like the Hub's; None if it has none."""
    has_paths = pa.types.is_struct(kind) and PATH in [field.name for field in kind]
    return kind.field(PATH).type if has_paths else None


def _is_null(file: pyarrow.parquet.ParquetFile, number: int) -> bool:
    """Whether a column has rows and no value, as the statistics of the file say."""
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    statistics = [(group.num_rows, group.column(number).statistics) for group in groups]
    return file.metadata.num_rows > 0 and all(
        known is not None and known.has_null_count and known.null_count == rows for rows, known in statistics
    )


def images_inside(
    source: SourceFile, file: pyarrow.parquet.ParquetFile, column: str, *, digests: bool
) -> Iterator[Inside]:
    """The image of each row, in order.

    Args:
        source: The Parquet file.
        file: The same, opened.
        column: That holds the images.
        digests: Whether to read them for their digests.
    """
    kind = file.schema_arrow.field(column).type
    if is_list_of_bytes(kind):
        yield from _lists_inside(file, column, digests=digests)
        return
    fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
    names = _values(file, column, PATH) if PATH in fields else itertools.repeat(None)
    of_bytes = BYTES if fields else None
    hashes = map(_digest, _values(file, column, of_bytes)) if digests else itertools.repeat(b"")
    places = _places(source, file, _leaf(file, column, of_bytes))
    for row, (place, name, of_image) in enumerate(zip(places, names, hashes, strict=False)):
        yield Inside(*place, row, name, of_image)


def _lists_inside(file: pyarrow.parquet.ParquetFile, column: str, *, digests: bool) -> Generator[Inside]:
    row = 0
    for number in range(file.num_row_groups):
        group = Group(number, file.metadata.row_group(number).column(_leaf(file, column, None)).total_compressed_size)
        images = file.read_row_group(number, columns=[column], use_threads=False).column(0) if digests else None
        for place in range(file.metadata.row_group(number).num_rows):
            image = None
            if images is not None:
                with contextlib.suppress(BadSample):  # it is told when the image is read
                    image = _bytes_of_list(images[place])
            yield Inside(group, place, row, None, _digest(image))
            row += 1


def read_image(source: SourceFile, row: dict[str, Any], column: str) -> bytes:
    """The image of a row of the index.

    Args:
        source: The Parquet file.
        row: Of the index.
        column: That holds the images.

    Raises:
        BadSample: There is none, or its page is damaged.
        DataError: The file changed since it was indexed.
    """
    if "group_number" in row:
        image = _bytes_of_list(_group(source, row["group_number"], column)[row["group_place"]])
        if image is None:
            raise BadSample("no image (null)")
        return image
    *page, place = (row[name] for name, _ in COLUMNS)
    image = _decoded(source, Page(*page))[place].as_py()
    if image is None:
        raise BadSample("no image (null)")
    return image


def warn_of_large_pages(name: str, file: pyarrow.parquet.ParquetFile, column: str, largest: int) -> None:
    """Tell that single images cannot be read at a good rate."""
    if largest > _LARGE_PAGE:
        log.warn(
            f"{name}: images lie in pages of up to {units.size(largest)}, each read whole for an image that training"
            f" draws from it; write column {column!r} again with row_group_size=100 (there are"
            f" {file.metadata.num_row_groups:,} row groups of {file.metadata.num_rows:,} rows), or as WebDataset tars"
        )


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _values(file: pyarrow.parquet.ParquetFile, column: str, field: str | None = None) -> Generator[bytes | None]:
    """The values of a column, or of one field of a column of structs."""
    leaf = column if field is None else f"{column}.{field}"  # a column may have this name, and comes along
    for batch in file.iter_batches(_LOOKED_AT, columns=[leaf]):
        values = batch.column(column)
        if field is not None:
            values = values.flatten()[values.type.get_field_index(field)]
        yield from values.cast(pa.large_binary()).to_pylist()


def _leaf(file: pyarrow.parquet.ParquetFile, column: str, field: str | None) -> int:
    """The number of a column, or of a field of a column of structs, in the Parquet file, where names may repeat."""
    schema = file.schema_arrow
    at = schema.get_field_index(column)
    before = [schema.field(number).type for number in range(at)]
    if field is not None:
        struct = schema.field(at).type
        before += [struct.field(number).type for number in range(struct.get_field_index(field))]

    number = sum(map(_leaves, before))
    name = column if field is None else f"{column}.{field}"
    path = file.schema.column(number).path
    if path != name and not (path.startswith(f"{name}.") and is_list_of_bytes(schema.field(at).type)):
        raise ValueError(f"column {path!r} in place of {column!r}")
    return number


def _leaves(kind: pa.DataType) -> int:
    """How many columns of a Parquet file hold a type."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pa.types.is_struct(kind):
        return sum(_leaves(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _leaves(kind.key_type) + _leaves(kind.item_type)
    return _leaves(kind.value_type) if pa.types.is_nested(kind) else 1


def _digest(image: bytes | None) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest() if image else b""


def _places(source: SourceFile, file: pyarrow.parquet.ParquetFile, number: int) -> Generator[tuple[Page, int]]:
    """The page of each row of a column, and its place in it."""
    levels = file.schema.column(number).max_definition_level
    with opened(source, in_order=False) as handle:
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            chunk = group.column(number)
            if chunk.num_values != group.num_rows:
                raise ValueError(f"{chunk.num_values:,} images in a row group of {group.num_rows:,} rows")
            for page in data_pages(handle, chunk, levels):
                yield from ((page, place) for place in range(page.rows))


def _bytes_of_list(image: pa.Scalar) -> bytes | None:
    """The image that is stored as a list of numbers; none if one is missing.

    Raises:
        BadSample: One of them is no byte, with or without a sign.
    """
    values = image.values  # pyright: ignore[reportAttributeAccessIssue]  # a list
    if values is None or values.null_count:
        return None
    numbers = values.to_numpy()
    if numbers.itemsize == 1:
        return numbers.tobytes()
    if len(numbers) and not -128 <= numbers.min() <= numbers.max() <= 255:
        raise BadSample(f"no image (numbers that are no bytes, from {numbers.min()} to {numbers.max()})")
    return (numbers & 0xFF).astype(np.uint8).tobytes()


@functools.lru_cache(maxsize=_DECODED_PAGES)
def _group(source: SourceFile, number: int, column: str) -> pa.ChunkedArray:
    """The lists of a row group."""
    try:
        if not source.is_as_indexed():
            raise changed(source.name)
        with opened(source, in_order=False) as handle, _parquet(handle) as file:
            return file.read_row_group(number, columns=[column], use_threads=False).column(0)
    except FileNotFoundError as error:
        raise changed(source.name) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadSample(f"image is in a damaged row group of the Parquet file ({reason})") from error


def _parquet(handle: BinaryIO) -> pyarrow.parquet.ParquetFile:
    return pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True)


@functools.lru_cache(maxsize=_DECODED_PAGES)
def _decoded(source: SourceFile, page: Page) -> pa.Array:
    dictionary = bytes_at(source, page.dictionary_at, page.dictionary_bytes)
    data = bytes_at(source, page.at, page.bytes)
    try:
        return read_page(page, dictionary, data)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadSample(f"image is in a damaged page of the Parquet file ({reason})") from error
