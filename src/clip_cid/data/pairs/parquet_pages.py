"""Single pages of a Parquet column, so that one value is read without the row group around it.

The headers of the pages say where each lies and how many rows it has. To read one, a Parquet file of this page alone is
made in memory, and pyarrow reads that: all its encodings and compressions, and its checks of them.
"""

import struct
from collections.abc import Generator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet

_MAGIC = b"PAR1"
_CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1, "GZIP": 2, "BROTLI": 4, "UNKNOWN": 5, "ZSTD": 6, "LZ4": 7}
"""By pyarrow's names; it has none for the LZ4 of Hadoop, which Spark and fastparquet write."""
_BYTE_ARRAY, _REQUIRED, _OPTIONAL = 6, 0, 1
_ENCODINGS = (0, 2, 3, 6, 7, 8)  # PLAIN, PLAIN_DICTIONARY, RLE, DELTA_..._BYTE_ARRAY, RLE_DICTIONARY
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_HEADER_BYTES, _LONGEST_HEADER = 1 << 12, 1 << 26  # it may hold the smallest and the largest value

# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Page(NamedTuple):
    """Where a data page lies, with all that is needed to read it."""

    at: int
    """Its header, in bytes of the file."""
    bytes: int
    """With the header."""
    dictionary_at: int
    dictionary_bytes: int
    """0 where no dictionary belongs to it."""
    codec: int
    levels: int
    """How many of the column and the groups around it may be null."""
    rows: int


def data_pages(file: BinaryIO, chunk: Any, levels: int) -> Generator[Page]:
    """The data pages of a column in one row group, in order; only their headers are read.

    Args:
        file: The Parquet file.
        chunk: pyarrow's metadata of the column chunk, of byte arrays that are no part of a list.
        levels: Its largest definition level.

    Raises:
        ValueError: A header is damaged, or the compression is not known.
    """
    if chunk.compression not in _CODECS:
        raise ValueError(f"compression {chunk.compression}")
    starts = [chunk.data_page_offset]
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        starts.append(chunk.dictionary_page_offset)
    at = min(starts)
    end = at + chunk.total_compressed_size

    dictionary, rows = (0, 0), 0
    while rows < chunk.num_values:
        header, size = _page_header(file, at)
        size += _whole(header, 3)
        if at + size > end:
            raise ValueError(f"the page at byte {at:,} ends behind its column")
        kind = header.get(1)
        if kind == _DICTIONARY_PAGE:
            dictionary = (at, size)
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            count = _whole(header.get(5 if kind == _DATA_PAGE else 8), 1)
            rows += count
            if rows > chunk.num_values:
                break
            yield Page(at, size, *dictionary, _CODECS[chunk.compression], levels, count)
        at += size
    if rows != chunk.num_values:
        raise ValueError(f"pages of {rows:,} values in a column of {chunk.num_values:,}")


def read_page(page: Page, dictionary: bytes, data: bytes) -> pa.Array:
    """The values of a page, null where one of the groups around is.

    Args:
        page: Where it was.
        dictionary: The bytes of the dictionary page; empty if there is none.
        data: The bytes of the data page.

    Raises:
        OSError: It is damaged; also `pa.ArrowException`.
    """
    start, size = len(_MAGIC), len(dictionary) + len(data)
    footer = _footer(page, start, dictionary_bytes=len(dictionary), size=size)
    whole = b"".join([_MAGIC, dictionary, data, footer, struct.pack("<I", len(footer)), _MAGIC])
    with pyarrow.parquet.ParquetFile(pa.BufferReader(whole), page_checksum_verification=True) as file:
        column = file.read(use_threads=False).column(0).combine_chunks()
    while pa.types.is_struct(column.type):
        (column,) = column.flatten()
    if len(column) != page.rows:
        raise pa.ArrowInvalid(f"{len(column):,} values in a page of {page.rows:,}")
    return column


def _footer(page: Page, start: int, *, dictionary_bytes: int, size: int) -> bytes:
    """The metadata of a file with one page."""
    names = [b"%d" % level for level in range(max(page.levels, 1))]
    schema = [_written({4: (_BINARY, b"root"), 5: (_I32, 1)})]
    for name in names[:-1]:
        schema.append(_written({3: (_I32, _OPTIONAL), 4: (_BINARY, name), 5: (_I32, 1)}))
    repetition = _OPTIONAL if page.levels else _REQUIRED
    schema.append(_written({1: (_I32, _BYTE_ARRAY), 3: (_I32, repetition), 4: (_BINARY, names[-1])}))

    column: dict[int, tuple[int, Any]] = {
        1: (_I32, _BYTE_ARRAY),
        2: (_LIST, (_I32, [_zigzag(encoding) for encoding in _ENCODINGS])),
        3: (_LIST, (_BINARY, [_varint(len(name)) + name for name in names])),
        4: (_I32, page.codec),
        5: (_I64, page.rows),
        6: (_I64, size),
        7: (_I64, size),
        9: (_I64, start + dictionary_bytes),
    }
    if dictionary_bytes:
        column[11] = (_I64, start)
    chunk = _written({2: (_I64, start), 3: (_STRUCT, _written(column))})
    group = _written({1: (_LIST, (_STRUCT, [chunk])), 2: (_I64, size), 3: (_I64, page.rows)})
    return _written({1: (_I32, 2), 2: (_LIST, (_STRUCT, schema)), 3: (_I64, page.rows), 4: (_LIST, (_STRUCT, [group]))})


def _written(fields: dict[int, tuple[int, Any]]) -> bytes:
    """A struct in Thrift's compact protocol; structs inside are written already."""
    parts, last = list[bytes](), 0
    for number, (kind, value) in fields.items():
        parts.append(bytes([(number - last) << 4 | kind]))
        last = number
        if kind in (_I32, _I64):
            parts.append(_zigzag(value))
        elif kind == _BINARY:
            parts += [_varint(len(value)), value]
        elif kind == _LIST:
            of, items = value
            parts += [bytes([len(items) << 4 | of]), *items]
        else:
            parts.append(value)
    return b"".join([*parts, b"\0"])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _zigzag(value: int) -> bytes:
    return _varint(value << 1)  # of what is not negative


def _page_header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """The fields of the header that begins here, by number, and its bytes.

    Raises:
        ValueError: There is none.
    """
    size = _HEADER_BYTES
    while True:
        file.seek(at)
        data = file.read(size)
        try:
            return _Fields(data).struct()
        except IndexError as error:
            if len(data) < size or size >= _LONGEST_HEADER:
                raise ValueError(f"no page header at byte {at:,}") from error
        size *= 16


def _whole(fields: Any, number: int) -> int:
    """A size or a count among the fields of a header."""
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError("a page header is damaged")
    return value


class _Fields:
    """Reads Thrift's compact protocol; an `IndexError` means that more bytes are needed."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> tuple[dict[int, Any], int]:
        """The fields of a struct by number, and where it ends."""
        return self._struct(depth=0), self._at

    def _struct(self, depth: int) -> dict[int, Any]:
        if depth > 8:
            raise ValueError("a page header is damaged")
        fields, number = dict[int, Any](), 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 0x0F, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BINARY:
            return self._take(self._unsigned())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            return [self._value(head & 0x0F, depth + 1) for _ in range(count)]
        if kind == _STRUCT:
            return self._struct(depth + 1)
        raise ValueError("a page header is damaged")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise IndexError
        return self._data[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page header is damaged")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
