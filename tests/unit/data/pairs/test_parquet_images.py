import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_cid.data.pairs import parquet_images, tables
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, fingerprint, open_pairs
from clip_cid.errors import DataError
from clip_cid.recipe import PairsConfig

HUB = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def config(*source: Path | str, **settings: Any) -> PairsConfig:
    return PairsConfig(source=tuple(map(str, source)), **settings)


def png(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write(path: Path, images: list[bytes | None], *, kind: str = "hub", **options: Any) -> Path:
    """A Parquet file of images with captions; the names that the Hub keeps are given for every row."""
    column = pa.array(images, pa.large_binary() if kind == "large" else pa.binary())
    if kind == "hub":
        column = pa.array([{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(images)], HUB)
    if kind == "dictionary":
        column = column.dictionary_encode()
    table = pa.table({"caption": [f"caption {row}" for row in range(len(images))], "image": column})
    pq.write_table(table, path, **options)
    return path


def images_of(pairs: Pairs) -> list[bytes | None]:
    """The image of each row; None where a row says that it is null."""

    def image(row: int) -> bytes | None:
        try:
            return pairs.read(row).image
        except BadSample as error:
            # Where a file has no image at all, but paths, these name files.
            if error.reason != "no image (null)" and not re.match(r"image '.*/\d+\.png' cannot be read", error.reason):
                raise
            return None

    return [image(row) for row in range(len(pairs))]


@given(
    images=st.lists(st.none() | st.binary(min_size=1, max_size=300), min_size=1, max_size=40),
    kind=st.sampled_from(["hub", "binary", "large", "dictionary"]),
    compression=st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
    version=st.sampled_from(["1.0", "2.0"]),
    encoding=st.sampled_from(["dictionary", "PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]),
    group=st.sampled_from([1, 7, 1000]),
    page=st.sampled_from([1, 1 << 20]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_image_is_read_as_pyarrow_reads_it_however_the_file_is_written(
    tmp_path: Path,
    images: list[bytes | None],
    kind: str,
    compression: str,
    version: str,
    encoding: str,
    group: int,
    page: int,
) -> None:
    images = [b"\0picture", *images]  # bytes without a picture are taken for paths
    leaf = "image.bytes" if kind == "hub" else "image"
    how: dict[str, Any] = {"use_dictionary": True}
    if encoding != "dictionary" and kind != "dictionary":  # which pyarrow reads from no other encoding
        how = {"use_dictionary": False, "column_encoding": {leaf: encoding}}
    path = write(
        tmp_path / "t.parquet",
        images,
        kind=kind,
        compression=compression,
        data_page_version=version,
        row_group_size=group,
        data_page_size=page,
        write_batch_size=3,
        **how,
    )
    pairs = open_pairs(config(path))
    assert images_of(pairs) == images
    assert [pairs.known_bad.get(row) for row in range(len(images))] == [None] * len(images)


@pytest.mark.parametrize("number", [pa.uint8(), pa.int8()])
@pytest.mark.parametrize("of_lists", [pa.list_, pa.large_list])
@pytest.mark.parametrize("merge", [None, "merge"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_lists_of_bytes_are_images(
    tmp_path: Path, number: pa.DataType, of_lists: Any, merge: str | None, version: str
) -> None:
    images = [png(row % 5) if row % 4 else None for row in range(11)]
    signed = [None if data is None else np.frombuffer(data, number.to_pandas_dtype()) for data in images]
    table = pa.table({"image": pa.array(signed, of_lists(number)), "caption": [f"c{row}" for row in range(11)]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=4, data_page_size=64, data_page_version=version)

    index = tmp_path / "index"
    pairs = open_pairs(config(path, repeated_rows=merge), index=index)
    if merge is None:
        assert images_of(pairs) == images
        assert [pairs.key(row) for row in (0, 10)] == ["t/0", "t/10"]
        assert images_of(open_pairs(config(path), index=index)) == images
        return
    assert len(pairs) == 3 + 5  # of those without an image none is another's
    read = [pairs.read(row) for row, image in enumerate(images_of(pairs)) if image is not None]
    assert {pair.image: pair.captions for pair in read} == {
        png(seed): tuple(f"c{row}" for row in range(11) if row % 4 and row % 5 == seed) for seed in range(5)
    }


@pytest.mark.parametrize("number", [pa.int64(), pa.uint64(), pa.int32(), pa.int16()])
def test_lists_of_wider_numbers_are_images_if_all_are_bytes(tmp_path: Path, number: pa.DataType) -> None:
    signed = pa.types.is_signed_integer(number) and number != pa.int64()
    values = [list(np.frombuffer(png(seed), np.int8 if signed else np.uint8)) for seed in range(3)]
    values[1] = [*values[1], 256]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array(values, pa.list_(number)), "caption": list("abc")}), path)
    for merge in (None, "merge"):
        pairs = open_pairs(config(path, repeated_rows=merge))
        assert [pairs.read(row).image for row in (0, 2)] == [png(0), png(2)]
        with pytest.raises(BadSample, match="numbers that are no bytes"):
            pairs.read(1)


def test_lists_of_bytes_of_fixed_size_with_a_hole_or_in_a_damaged_or_changed_file(tmp_path: Path) -> None:
    values = [list(png(0)), [*png(1)[:-1], None], list(png(2))]
    size = min(map(len, values))
    column = pa.array([value[:size] for value in values], pa.list_(pa.uint8(), size))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": column, "caption": list("abc")}), path, row_group_size=1)
    pairs = open_pairs(config(path))
    assert images_of(pairs)[::2] == [bytes(values[0][:size]), bytes(values[2][:size])]

    parquet_images._group.cache_clear()
    path.touch()
    with pytest.raises(DataError, match="changed or went away after it was indexed"):
        pairs.read(0)
    path.unlink()
    with pytest.raises(DataError, match="changed or went away after it was indexed"):
        pairs.read(0)


def test_a_column_that_is_never_null_is_read(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("image", pa.binary(), nullable=False), ("caption", pa.string())])
    pq.write_table(pa.table({"image": [png(0), png(1)], "caption": ["a", "b"]}, schema), tmp_path / "t.parquet")
    assert images_of(open_pairs(config(tmp_path / "t.parquet"))) == [png(0), png(1)]


def test_the_lz4_of_hadoop_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [png(0), png(1)], kind="binary", compression="lz4")
    now, of_hadoop = (b"\x05image\x15" + bytes([2 * codec]) for codec in (7, 5))  # in the metadata of the column
    assert path.read_bytes().count(now) == 1
    path.write_bytes(path.read_bytes().replace(now, of_hadoop))
    assert pq.read_metadata(path).row_group(0).column(1).compression == "UNKNOWN"
    assert images_of(open_pairs(config(path))) == [png(0), png(1)]


@pytest.mark.parametrize("merge", [None, "merge"])
def test_columns_named_like_the_fields_of_the_images_are_not_taken_for_them(tmp_path: Path, merge: str | None) -> None:
    """pandas' json_normalize makes such names; in a Parquet file both columns are called image.bytes then."""
    nested = pa.struct([("meta", pa.struct([("bytes", pa.binary()), ("tags", pa.list_(pa.string()))])), *HUB])
    rows = [{"meta": {"bytes": b"m", "tags": ["x"]}, "bytes": png(row), "path": f"{row}.png"} for row in range(3)]
    columns = {
        "image.bytes": [png(7)] * 3,
        "image.path": ["other.png"] * 3,
        "boxes": pa.array([[(1, "a")]] * 3, pa.map_(pa.int32(), pa.string())),
        "image": pa.array(rows, nested),
        "caption.bytes": ["no"] * 3,
        "caption": list("abc"),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    pairs = open_pairs(config(tmp_path / "t.parquet", repeated_rows=merge))
    assert images_of(pairs) == [png(0), png(1), png(2)]
    assert pairs.keys(0, 3) == ["0.png", "1.png", "2.png"]
    assert [pairs.read(row).captions for row in range(3)] == [("a",), ("b",), ("c",)]


def test_columns_without_a_value_have_no_type_in_files_of_pandas(tmp_path: Path) -> None:
    nothing = pa.nulls(2)
    pq.write_table(pa.table({"image": [png(0), png(1)], "caption": nothing}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": nothing, "caption": ["x", "y"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"image": nothing[:0], "caption": nothing[:0]}), tmp_path / "2.parquet")
    pairs = open_pairs(config(tmp_path / "*.parquet", captions="optional"))
    assert [pairs.read(row).captions for row in range(2)] == [(), ()]
    assert pairs.known_bad == dict.fromkeys((2, 3), "no image (empty image)")

    with pytest.raises(DataError, match=r"none of the 2 samples can be used; .*no caption") as error:
        open_pairs(config(tmp_path / "0.parquet"))
    assert "pairs.caption_column" in error.value.fix
    assert "pairs.captions: optional" in error.value.fix


def test_text_that_is_not_utf_8_makes_its_own_row_bad(tmp_path: Path) -> None:
    def texts(first: bytes) -> pa.Array:
        return pa.StringArray.from_buffers(3, *pa.array([first, b"b", b"c"]).buffers()[1:])

    images = pa.StructArray.from_arrays([pa.array([png(0), png(1), png(2)]), texts(b"a")], ["bytes", "path"])
    columns = {
        "image": images,
        "caption": texts(b"\xff"),
        "lists": pa.ListArray.from_arrays([0, 1, 2, 3], texts(b"\xfe")),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for column in ("caption", "lists"):
        pairs = open_pairs(config(tmp_path / "t.parquet", caption_column=column))
        with pytest.raises(BadSample, match="caption 1 is not UTF-8"):
            pairs.read(0)
        assert [pairs.read(row).captions for row in (1, 2)] == [("b",), ("c",)]


def test_one_image_is_read_without_the_pages_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[bytes | None] = [bytes([0, row]) * 5000 for row in range(50)]
    path = write(tmp_path / "t.parquet", images, compression="none", use_dictionary=False, row_group_size=5)
    pairs, sizes = open_pairs(config(path), index=tmp_path / "index"), list[int]()
    real = parquet_images.bytes_at
    monkeypatch.setattr(
        parquet_images, "bytes_at", lambda source, at, size: sizes.append(size) or real(source, at, size)
    )
    assert pairs.read(33).image == images[33]
    assert 5 * 10_000 < sum(sizes) < 6 * 10_000  # the page of its row group, of 500,000 bytes in all


def test_keys_are_the_names_of_the_images_or_file_and_row(tmp_path: Path) -> None:
    named = write(tmp_path / "named.parquet", [png(0), png(1)])
    assert open_pairs(config(named)).keys(0, 2) == ["0.png", "1.png"]
    nameless = write(tmp_path / "plain.parquet", [png(0), png(1)], kind="binary")
    assert open_pairs(config(nameless)).keys(0, 2) == ["plain/0", "plain/1"]
    assert open_pairs(config(nameless, key_column="caption")).keys(0, 2) == ["caption 0", "caption 1"]


def test_several_files_are_one_sequence_and_their_names_keep_equal_keys_apart(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"train-{part}.parquet").write_bytes(write(tmp_path / "t", [png(part), png(2 + part)]).read_bytes())
    source = config(tmp_path / "train-*.parquet")
    assert list(open_pairs(source).known_bad.values()) == [f"duplicate key, first used by row {row}" for row in (0, 1)]

    pairs = open_pairs(config(tmp_path / "train-{0..1}.parquet", key_prefix="shard"), index=tmp_path / "index")
    assert pairs.keys(0, 4) == ["train-0/0.png", "train-0/1.png", "train-1/0.png", "train-1/1.png"]
    assert images_of(pairs) == [png(0), png(2), png(1), png(3)]
    assert [size for _, size in fingerprint(source)] == [shard.bytes for shard in pairs.shards]


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_hold_every_row_once_across_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_index: bool
) -> None:
    monkeypatch.setattr(tables, "SHARD_ROWS", 4)
    path = write(tmp_path / "t.parquet", [png(row) for row in range(10)], row_group_size=3)
    for _ in range(2):  # the second time from the index
        pairs = open_pairs(config(path), index=tmp_path / "index" if with_index else None)
        assert [(shard.first_row, shard.rows) for shard in pairs.shards] == [(0, 4), (4, 4), (8, 2)]
        assert images_of(pairs) == [png(row) for row in range(10)]
        assert [pairs.read(row).captions for row in range(10)] == [(f"caption {row}",) for row in range(10)]


def test_a_column_of_paths_without_bytes_names_files_beside_the_table(tmp_path: Path) -> None:
    """As `datasets` writes images that it did not embed."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    rows = [
        {"bytes": None, "path": "images/a.png"},
        {"bytes": None, "path": "images/b.png"},
        {"bytes": None, "path": None},
    ]
    table = pa.table({"image": pa.array(rows, HUB), "caption": ["a", "b", "c"], "note": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    pairs = open_pairs(config(tmp_path / "t.parquet", keep_fields=("note",)))
    assert pairs.read(0) == Pair("images/a.png", png(0), ("a",), {"note": "x"})
    with pytest.raises(BadSample, match=r"images/b\.png' cannot be read"):
        pairs.read(1)
    assert pairs.known_bad[2].startswith("no image (empty image)")


def test_bytes_that_are_no_picture_and_null_images_are_bad_samples_of_their_own_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [png(0), b"no picture at all", None, b"", png(4)])
    pairs = open_pairs(config(path))
    reasons: dict[int, str] = {}
    for row in range(5):
        try:
            decode_image(pairs.read(row).image, max_pixels=100)
        except BadSample as error:
            reasons[row] = error.reason
    assert reasons == {
        1: "image is of no known format (17 bytes)",
        2: "no image (null)",
        3: "image is empty (0 bytes)",
    }


def test_rows_of_one_image_become_one_pair_with_their_captions_in_order(tmp_path: Path) -> None:
    images: list[bytes | None] = [png(0), png(0), png(1), png(0), None, None]
    path = write(tmp_path / "t.parquet", images, kind="binary")
    pairs = open_pairs(config(path, repeated_rows="merge"))
    assert pairs.keys(0, 4) == ["t/0", "t/2", "t/4", "t/5"]
    assert [pairs.read(row).captions for row in (0, 1)] == [("caption 0", "caption 1", "caption 3"), ("caption 2",)]
    assert images_of(pairs) == [png(0), png(1), None, None]


def test_few_images_are_in_memory_at_once_while_rows_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.parquet", [png(row) for row in range(50)])
    sizes, real = list[int](), pq.ParquetFile.iter_batches

    def counted(file: pq.ParquetFile, *args: Any, columns: list[str], **options: Any) -> Any:
        for batch in real(file, *args, columns=columns, **options):
            if columns == ["image.bytes"]:
                sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(tables, "SHARD_ROWS", 20)
    monkeypatch.setattr(parquet_images, "_LOOKED_AT", 4)
    assert len(open_pairs(config(path, repeated_rows="merge"))) == 50
    assert (sum(sizes), max(sizes)) == (50, 4)


def test_other_images_of_one_key_are_not_merged(tmp_path: Path) -> None:
    table = pa.table({"image": [png(0), png(1), png(0)], "caption": ["a", "b", "c"], "id": ["x", "x", "x"]})
    pq.write_table(table, tmp_path / "t.parquet")
    pairs = open_pairs(config(tmp_path / "t.parquet", key_column="id", repeated_rows="merge"))
    assert pairs.read(0).captions == ("a", "c")
    assert pairs.known_bad == {1: "duplicate key, first used by row 0"}


def test_images_alone_need_no_column_of_captions(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'caption' is not there; the table has image\.") as error:
        open_pairs(config(tmp_path / "t.parquet"))
    assert "pairs.caption_column: null" in str(error.value)
    pairs = open_pairs(config(tmp_path / "t.parquet", caption_column=None, captions="optional"))
    assert (pairs.read(0).captions, pairs.read(0).image) == ((), png(0))
    with pytest.raises(ValueError, match=r"caption_column: null needs pairs.captions: optional"):
        config(tmp_path / "t.parquet", caption_column=None)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([[png(0)]], "list<.*: binary>, neither images nor their paths"),
        ([{"width": 1}], "struct<width: int64>, neither images nor their paths"),
        ([1.5], "double, neither images nor their paths"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: list[Any], kind: str) -> None:
    pq.write_table(pa.table({"image": column, "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"column 'image' is of type {kind}"):
        open_pairs(config(tmp_path / "t.parquet"))


def test_a_file_that_is_cut_short_is_named_among_whole_ones(tmp_path: Path) -> None:
    whole = write(tmp_path / "0.parquet", [png(0)])
    (tmp_path / "1.parquet").write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"1\.parquet: this table cannot be read") as error:
        open_pairs(config(tmp_path / "*.parquet"))
    assert error.value.fix.startswith("Check that it is whole")


def test_a_file_that_changes_after_it_was_indexed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [png(0), png(1)])
    pairs = open_pairs(config(path))
    write(path, [png(2), png(3), png(4)])
    with pytest.raises(DataError, match="changed or went away after it was indexed"):
        pairs.read(0)


def test_damage_is_an_error_or_a_bad_sample_and_changes_no_pair(tmp_path: Path) -> None:
    path, draw = tmp_path / "t.parquet", random.Random(0)
    images = [png(row) for row in range(12)]
    write(path, list(images), row_group_size=5, write_page_checksum=True, data_page_size=100, write_batch_size=1)
    whole, outcomes = path.read_bytes(), dict[str, int]()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            pairs = open_pairs(config(path, key_column="caption"))
            kept = [pairs.read(row) for row in range(len(pairs))]
        except (DataError, BadSample) as error:
            outcomes[type(error).__name__] = outcomes.get(type(error).__name__, 0) + 1
            continue
        assert [pair.image for pair in kept] == images
    assert outcomes.keys() == {"DataError", "BadSample"}


def test_a_file_whose_single_images_are_slow_to_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parquet_images, "_LARGE_PAGE", 2000)
    open_pairs(config(write(tmp_path / "large.parquet", [png(row) for row in range(9)])))
    assert "write column 'image' again with row_group_size=100" in caplog.text
    caplog.clear()
    open_pairs(config(write(tmp_path / "small.parquet", [png(row) for row in range(9)], row_group_size=2)))
    assert not caplog.text
