import base64
import bz2
import gzip
import importlib
import io
import json
import lzma
import multiprocessing
import os
import pickle
import random
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from clip_cid.data.pairs import index, tables, tars
from clip_cid.data.pairs.format import SourceFile
from clip_cid.data.pairs.images import EXTENSIONS
from clip_cid.data.pairs.index import duplicate_keys
from clip_cid.data.pairs.pair import BadSample, Pair
from clip_cid.data.pairs.pairs import Pairs, fingerprint, open_pairs
from clip_cid.data.pairs.sample_parts import field_text, key_hash
from clip_cid.data.pairs.sources import cached_path, fetch
from clip_cid.data.pairs.tars import scan_tar
from clip_cid.errors import ConfigError, DataError
from clip_cid.recipe import ALLOW_PIPE, PairsConfig

Member = tuple[str, bytes]


def write_tar(path: Path, members: Sequence[Member], *, kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, *, image: str = "jpg", text: str | None = "", **fields: Any) -> list[Member]:
    """The members of a sample; its image bytes are its key, so that a row out of place shows."""
    members = [(f"{key}.{image}", f"image of {key}".encode())]
    if text is not None:
        members.append((f"{key}.txt", (text or f"caption of {key}").encode()))
    if fields:
        members.append((f"{key}.json", json.dumps(fields).encode()))
    return members


def config(*source: Path | str, **settings: Any) -> PairsConfig:
    return PairsConfig(source=tuple(str(name) for name in source), **settings)


def read_all(pairs: Pairs) -> list[Pair | str]:
    """Each row's pair, or the reason why there is none."""

    def read(row: int) -> Pair | str:
        try:
            return pairs.read(row)
        except BadSample as error:
            return error.reason

    return [read(row) for row in range(len(pairs))]


def reason(pairs: Pairs, row: int) -> str:
    with pytest.raises(BadSample) as error:
        pairs.read(row)
    return error.value.reason


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A shard of three samples."""
    return write_tar(tmp_path / "small.tar", [*sample("a"), *sample("b", captions=["one", "two"]), *sample("c")])


# Tars: order, grouping, captions


def test_rows_follow_the_sources_and_the_tar(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "z.tar", [*sample("z2"), *sample("z1")])
    second = write_tar(tmp_path / "a.tar", [*sample("a1", image="webp"), *sample("a0", image="PNG")])
    pairs = open_pairs(config(first, second))
    assert pairs.keys(0, len(pairs)) == ["z2", "z1", "a1", "a0"]
    assert [(shard.name, shard.first_row, shard.rows, shard.bytes) for shard in pairs.shards] == [
        (str(first), 0, 2, first.stat().st_size),
        (str(second), 2, 2, second.stat().st_size),
    ]
    assert pairs.read(2) == Pair("a1", b"image of a1", ("caption of a1",), {})


def test_several_captions_come_from_the_json_field_and_the_text_stands_in_for_it(tmp_path: Path) -> None:
    members = [
        *sample("list", text="from txt", captions=["one ", "", "two"], dup="x", count=3, none=None, tags=["é"]),
        *sample("named", text="from txt", captions="only"),
        *sample("absent", text=" from txt\n", other=1),
        *sample("null", text="from txt", captions=None),
        *sample("json only", text=None, captions=["one"]),
    ]
    fields = ("dup", "count", "none", "tags", "missing")
    pairs = open_pairs(config(write_tar(tmp_path / "a.tar", members), keep_fields=fields))
    captions = [pairs.read(row).captions for row in range(5)]
    assert captions == [("one", "two"), ("only",), ("from txt",), ("from txt",), ("one",)]
    assert pairs.read(0).fields == {"dup": "x", "count": "3", "none": "", "tags": '["é"]', "missing": ""}


def test_another_captions_field_is_read_when_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("a", syn=["x", "y"], captions=["no"]))
    assert open_pairs(config(path, captions_field="syn")).read(0).captions == ("x", "y")


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.txt", b"\xef\xbb\xbfcaption")])
    assert open_pairs(config(path)).read(0).captions == ("caption",)


def test_open_clips_order_of_extensions_picks_the_image(tmp_path: Path) -> None:
    members = [("a.webp", b"webp"), ("a.png", b"png"), ("a.seg.jpg", b"mask"), ("a.txt", b"caption")]
    assert open_pairs(config(write_tar(tmp_path / "a.tar", members))).read(0).image == b"png"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_each_line_of_a_txt_is_a_caption_in_a_tar_as_in_a_folder(tmp_path: Path, end: str) -> None:
    text = f"\ufeffone{end}{end} two {end}three".encode()
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"image"), ("a.txt", text)])
    folder = make_folder(tmp_path / "f", {"a.jpg": b"image", "a.txt": text})
    for source in (tar, folder):
        assert open_pairs(config(source)).read(0).captions == ("one", "two", "three")
    assert open_pairs(config(tar)).read(0).remark == "each line of the .txt is a caption"


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        # img2dataset: str(caption) in the .txt, and the same in the json.
        ("a dog\non a mat", {"caption": "a dog\non a mat", "url": "u"}, ("a dog\non a mat",)),
        ("a dog\r\n on a mat\n", {"TEXT": "a dog\n on a mat"}, ("a dog\r\n on a mat",)),
        ("one\ntwo", {"caption": "one", "url": "u"}, ("one", "two")),
        ("one\ntwo", {"caption": ["one", "two"]}, ("one", "two")),
        ("one\ntwo", {"captions": ["x", "y\nz"]}, ("x", "y\nz")),
        ("one\ntwo", {"captions": "y\nz"}, ("y\nz",)),
        ("one", {"caption": "other"}, ("one",)),
    ],
)
def test_a_txt_whose_whole_text_is_in_the_json_is_one_caption(
    tmp_path: Path, text: str, fields: dict[str, Any], captions: tuple[str, ...]
) -> None:
    members = [("a.jpg", b"image"), ("a.txt", text.encode()), ("a.json", json.dumps(fields).encode())]
    assert open_pairs(config(write_tar(tmp_path / "a.tar", members))).read(0).captions == captions


@pytest.mark.parametrize(
    ("described", "remark"),
    [
        (b"", "json cannot be read"),
        (b"{'a': 1}", "json cannot be read"),
        (bytes(512), "json cannot be read"),
        (b"[" * 100_000, "json cannot be read"),
        (b"[1]", "json holds a list"),
        (b"null", "json holds a NoneType"),
        (b'{"captions": {"a": "b"}}', "holds a dict"),
        (b'{"captions": ["a", 7]}', "caption 2 is a int"),
        (b'{"captions": [" "]}', "the caption is empty"),
        (b'{"captions": ["\\ud800"]}', "half a surrogate pair"),
    ],
)
def test_an_odd_json_beside_a_good_txt_is_left_out_with_a_remark(tmp_path: Path, described: bytes, remark: str) -> None:
    members = [*sample("a"), ("a.json", described), *sample("b", dup=7)]
    pairs = open_pairs(config(write_tar(tmp_path / "a.tar", members), keep_fields=("dup",)))
    odd, good = (pairs.read(row) for row in range(2))
    assert (odd.captions, odd.fields, good.fields, good.remark) == (("caption of a",), {"dup": ""}, {"dup": "7"}, "")
    assert odd.remark.startswith("the .txt is used alone: ")
    assert remark in odd.remark


def test_zeros_in_a_caption_are_a_damaged_sample_in_every_format(tmp_path: Path) -> None:
    text = b"a dog" + bytes(7)
    tar = write_tar(
        tmp_path / "a.tar", [("a.jpg", b"image"), ("a.txt", text), ("b.jpg", b"image"), ("b.txt", bytes(4))]
    )
    folder = make_folder(tmp_path / "f", {"a.jpg": b"image", "a.txt": text})
    table = pa.table({"image": ["f/a.jpg"], "caption": [text.decode()]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    for source in (tar, folder, tmp_path / "t.parquet"):
        assert reason(open_pairs(config(source)), 0) == "caption 1 holds 7 zero bytes, so the file is damaged"
    assert reason(open_pairs(config(tar)), 1) == "caption 1 holds 4 zero bytes, so the file is damaged"


names = st.text("ab.é/_-", min_size=1, max_size=6).filter(
    lambda name: (
        not name.startswith("/") and ".." not in name.split("/") and not any(part == "" for part in name.split("/"))
    )
)
extensions = st.sampled_from(["jpg", "JPG", "png", "txt", "json", "seg.png", "url"])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(names, extensions), min_size=1, max_size=12),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_rows_and_bytes_are_those_webdataset_reads_in_sequence(
    members: list[tuple[str, str]], kind: int, tmp_path: Path
) -> None:
    named = [(f"{name}.{extension}", f"data {place}".encode()) for place, (name, extension) in enumerate(members)]
    visible = [(name, data) for name, data in named if not name.rpartition("/")[2].startswith(".")]
    path = write_tar(tmp_path / "oracle.tar", [*visible, ("last.jpg", b"image"), ("last.txt", b"caption")], kind=kind)
    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}])
        try:
            expected = list(group_by_keys(files))
        except ValueError:
            reject()  # a member given twice, which webdataset refuses; ours has a test of its own
    batch = scan_tar(SourceFile.of("oracle", path))
    data = path.read_bytes()
    assert batch.column("key").to_pylist() == [read["__key__"] for read in expected]
    for row, read in zip(batch.to_pylist(), expected, strict=True):
        image = next((read[extension] for extension in ("jpg", "png", "jpeg", "webp") if extension in read), None)
        for part, value in {"image": image, "text": read.get("txt"), "json": read.get("json")}.items():
            at, size = row[f"{part}_at"], row[f"{part}_size"]
            assert (None if at < 0 else data[at : at + size]) == value


def test_tars_of_webdatasets_own_writer_are_read(tmp_path: Path) -> None:
    path = tmp_path / "written.tar"
    with TarWriter(str(path)) as writer:
        for key in ("a", "folder/b"):
            writer.write({"__key__": key, "jpg": key.encode(), "txt": f"caption {key}"})
    pairs = open_pairs(config(path))
    assert [pairs.read(row) for row in range(2)] == [
        Pair(key, key.encode(), (f"caption {key}",), {}) for key in ("a", "folder/b")
    ]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_whole_keys(tmp_path: Path, kind: int) -> None:
    key = "folder.with.dots/" + "ключ" * 60
    pairs = open_pairs(config(write_tar(tmp_path / "a.tar", sample(key), kind=kind)))
    assert pairs.key(0) == key
    assert pairs.read(0).image == f"image of {key}".encode()


# Bad samples keep their rows


def test_every_kind_of_bad_sample_is_named_and_shifts_no_row(tmp_path: Path) -> None:
    bad = {
        "no image": [("bad0.txt", b"caption")],
        "no caption": [("bad1.jpg", b"image")],
        "the caption is empty": sample("bad2", text=" \n"),
        "caption 1 is not UTF-8": [("bad3.jpg", b"image"), ("bad3.txt", b"caf\xe9")],
        "json cannot be read": [("bad4.jpg", b"image"), ("bad4.json", b"{'a': 1}")],
        "json holds a list": [("bad5.jpg", b"image"), ("bad5.json", b"[]")],
        "caption 2 is a int, not text": sample("bad6", text=None, captions=["a", 7]),
        "field 'captions' holds a dict": sample("bad7", text=None, captions={"a": "b"}),
        "caption 1 is not UTF-8 (half": [("bad8.jpg", b"image"), ("bad8.json", b'{"captions": ["\\ud800"]}')],
        "json cannot be read (maximum": [("bad9.jpg", b"image"), ("bad9.json", b"[" * 100_000)],
        "no caption (no .txt, and no json field 'captions'; it has caption)": sample("bad10", text=None, caption="x"),
        "duplicate key, first used by row 0": sample("good0"),
    }
    members = sample("good0")
    for place, broken in enumerate(bad.values(), start=1):
        members += [*broken, *sample(f"good{place}")]
    pairs = open_pairs(config(write_tar(tmp_path / "a.tar", members)))
    assert len(pairs) == 2 * len(bad) + 1
    for place, why in enumerate(bad):
        assert reason(pairs, 2 * place + 1).startswith(why) or why in reason(pairs, 2 * place + 1)
    for place in range(len(bad) + 1):
        assert pairs.read(2 * place).image == f"image of good{place}".encode()
    assert set(pairs.known_bad) == {1, 3, 23}


def test_the_first_of_equal_keys_stays_good_across_shards(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("a")])
    second = write_tar(tmp_path / "1.tar", [*sample("b"), *sample("c"), *sample("a")])
    pairs = open_pairs(config(first, second), index=tmp_path / "index")
    assert pairs.known_bad == {
        2: "duplicate key, first used by row 0",
        3: "duplicate key, first used by row 1",
        5: "duplicate key, first used by row 0",
    }
    assert [isinstance(read, Pair) for read in read_all(pairs)] == [True, True, False, False, True, False]
    assert open_pairs(config(first, second), index=tmp_path / "index").known_bad == pairs.known_bad


def test_keys_that_repeat_across_shards_get_the_shards_name_before_them(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / name, [*sample("000"), *sample("001")]) for name in ("a.tar", "b.x.tar")]
    for where in (None, tmp_path / "index"):
        assert len(open_pairs(config(*tars), index=where).known_bad) == 2
        pairs = open_pairs(config(*tars, key_prefix="shard"), index=where)
        assert pairs.keys(0, 4) == ["a/000", "a/001", "b.x/000", "b.x/001"]
        assert pairs.known_bad == {}
        assert pairs.read(2) == Pair("b.x/000", b"image of 000", ("caption of 000",), {})
    names = [[name for name, _ in files] for files in pairs.original_files(np.array([1, 2]))]
    assert names == [["a/001.jpg", "a/001.txt"], ["b.x/000.jpg", "b.x/000.txt"]]


def test_a_prefix_has_as_many_folders_as_make_it_unlike_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_PIPE, "1")
    tars = [write_tar(tmp_path / part / "00000.tar", sample("a")) for part in ("x", "y")]
    assert open_pairs(config(*tars, key_prefix="shard")).keys(0, 2) == ["x/00000/a", "y/00000/a"]
    folders = [make_folder(tmp_path / part / "v1.0", {"a.jpg": b"", "a.txt": b"a"}) for part in ("x", "y")]
    assert open_pairs(config(*folders, key_prefix="shard")).keys(0, 2) == ["x/v1.0/a", "y/v1.0/a"]
    urls = [f"pipe:cat {tar}" for tar in tars]
    keys = open_pairs(config(*urls, key_prefix="shard"), cache_dir=tmp_path / "cache").keys(0, 2)
    assert [key.split("/")[-3:] for key in keys] == [["x", "00000", "a"], ["y", "00000", "a"]]


def test_a_repeated_member_begins_a_sample_of_a_duplicate_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("a"), ("a.jpg", b"other"), ("a.txt", b"other"), *sample("b")])
    pairs = open_pairs(config(path))
    assert pairs.keys(0, 3) == ["a", "a", "b"]
    assert pairs.read(0).image == b"image of a"
    assert list(pairs.known_bad) == [1]


@given(st.lists(st.text("ab", max_size=3), max_size=40), st.integers(5, 50), st.integers(1, 3))
def test_duplicates_are_those_a_dictionary_finds_even_when_hashes_collide(
    keys: list[str], rows_per_pass: int, different_hashes: int
) -> None:
    hashes = np.array([key_hash(key) % different_hashes << 62 for key in keys], np.uint64)
    cut = len(keys) // 2
    expected: dict[int, int] = {}
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            expected[row] = first[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_cid.data.pairs.index._ROWS_PER_PASS", rows_per_pass)
        found = duplicate_keys(lambda: [hashes[:cut], hashes[cut:]], len(keys), keys.__getitem__)
    assert found == expected


def test_when_no_sample_can_be_used_the_first_reason_is_told(tmp_path: Path) -> None:
    scattered = [("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"x"), ("b.txt", b"x")]
    with pytest.raises(DataError, match=r"none of the 4 samples can be used; the first, 'a': no caption") as error:
        open_pairs(config(write_tar(tmp_path / "a.tar", scattered)))
    assert "--sort=name" in error.value.fix


def test_a_key_that_is_not_utf8_is_a_bad_sample_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("caf\xe9.jpg", "caf\xe9.txt", "b.jpg", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    pairs = open_pairs(config(path))
    assert pairs.keys(0, 2) == ["caf\\xe9", "b"]
    assert pairs.known_bad == {0: "the key is not UTF-8"}


# Broken and hostile tars


def test_a_tar_cut_anywhere_is_refused_with_shard_byte_and_remedy(tmp_path: Path) -> None:
    members = [*sample("a"), ("b.jpg", bytes(1300)), ("b.txt", b"caption"), *sample("long" * 40)]
    whole = write_tar(tmp_path / "whole.tar", members, kind=tarfile.PAX_FORMAT)
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512  # where the last member's padding ends; from there on there are only zeros
    cut = tmp_path / "cut.tar"
    for size in [*range(1, end + 512, 61), *range(512, end + 512, 512), 100, 511, 513, end - 1, end, end + 511]:
        cut.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cut\.tar: .*byte") as error:
            scan_tar(SourceFile.of(str(cut), cut))
        assert f"{size:,}" in error.value.problem
        assert "again" in error.value.fix
    cut.write_bytes(data[: end + 512])  # one whole zero block is an end
    assert scan_tar(SourceFile.of("cut", cut)).equals(scan_tar(SourceFile.of("whole", whole)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_changes_nothing(data: st.DataObject, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "damaged.tar", [*sample("a"), *sample("b")], kind=tarfile.GNU_FORMAT)
    intact, content = scan_tar(SourceFile.of("intact", path)), bytearray(path.read_bytes())
    headers = [0, 1024, 2048, 3072]
    content[data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = scan_tar(SourceFile.of("damaged", path))
    except DataError:
        return
    assert found.equals(intact)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("mode", list(COMPRESSORS))
@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_a_compressed_tar_is_refused_with_the_remedy(tmp_path: Path, small: Path, mode: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESSORS[mode](small.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}: compressed with {mode}") as error:
        open_pairs(config(path))
    assert "Decompress it once" in error.value.fix


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "..", "C:\\a.jpg", "x\\..\\a.jpg"])
def test_a_member_that_points_outside_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("a"), (name, b"")])
    with pytest.raises(DataError, match="points outside the archive") as error:
        open_pairs(config(path))
    assert repr(name) in error.value.problem


@pytest.mark.parametrize(
    ("kind", "what"), [(tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"), (tarfile.FIFOTYPE, "no")]
)
def test_a_member_that_is_no_file_is_refused_by_name(tmp_path: Path, kind: bytes, what: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match=f"member 'x.jpg' at byte 0 is {what}"):
        open_pairs(config(path))


def test_folders_and_metadata_in_a_tar_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("__meta__/info.json", "README", "train/._a.jpg", "train/a.jpg", "train/a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    assert open_pairs(config(path)).keys(0, 1) == ["train/a"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty file"),
        (bytes(10_240), "an empty shard"),
        (b"x" * 2000, "no readable tar"),
    ],
)
def test_an_empty_shard_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.tar: {problem}"):
        open_pairs(config(path))


@pytest.mark.parametrize("content", [b"", bytes(10_240)])
@pytest.mark.parametrize("with_index", [True, False])
def test_an_empty_shard_among_good_ones_is_left_out_and_counted(
    tmp_path: Path, content: bytes, with_index: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 2, 4):
        write_tar(tmp_path / f"{number}.tar", sample(f"key{number}"))
    for number in (1, 3):
        (tmp_path / f"{number}.tar").write_bytes(content)
    settings = config(f"{tmp_path}/{{0..4}}.tar")
    pairs = open_pairs(settings, index=tmp_path / "index" if with_index else None)
    assert pairs.keys(0, 3) == ["key0", "key2", "key4"]
    assert [Path(shard.name).name for shard in pairs.shards] == ["0.tar", "2.tar", "4.tar"]
    assert "2 of 5 sources hold no pair and are left out" in caplog.text
    assert "1.tar: an empty" in caplog.text
    assert len(read_all(pairs)) == 3


def test_empty_tables_and_folders_among_good_ones_are_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.csv").write_text("image,caption\n")
    (tmp_path / "1.csv").write_text("image,caption\nf/a.jpg,x\n")
    full, empty = make_folder(tmp_path / "f", {"a.jpg": b"a", "a.txt": b"a"}), make_folder(tmp_path / "g", {"x": b""})
    assert len(open_pairs(config(tmp_path / "*.csv"))) == len(open_pairs(config(empty, full))) == 1
    assert caplog.text.count("1 of 2 sources hold no pair and are left out") == 2


def test_tars_joined_by_cat_are_refused(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "joined.tar"
    path.write_bytes(small.read_bytes() * 2)
    with pytest.raises(DataError, match="more data behind the end") as error:
        open_pairs(config(path))
    assert "--concatenate" in error.value.fix


# Sources


def test_ranges_and_wildcards_give_shards_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"s-{number:02d}.tar", sample(f"s{number}"))
        write_tar(tmp_path / f"t-{number:02d}.tar", sample(f"t{number}"))
    monkeypatch.chdir(tmp_path)
    pairs = open_pairs(config("t-{02..00}.tar", "s-*.tar"))
    assert pairs.keys(0, 6) == ["t2", "t1", "t0", "s0", "s1", "s2"]
    assert pairs.shards[0].name == "t-02.tar"
    monkeypatch.chdir("/")
    assert pairs.read(0).image == b"image of t2"


def test_a_real_file_wins_over_the_range_its_name_could_be(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s-{0..1}[a].tar", sample("a"))
    assert open_pairs(config(path)).keys(0, 1) == ["a"]


def test_a_missing_shard_of_a_range_is_named_and_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", sample("a"))
    pattern = f"{tmp_path}/s-{{0..3}}.tar"
    for use in (open_pairs, fingerprint):
        with pytest.raises(DataError, match=r"s-1\.tar: no such file or folder \(3 of the 4 named by"):
            use(config(pattern))


@pytest.mark.parametrize("name", ["nothing.tar", "none-*.tar", "{0..1", "nothing/"])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no such file|do not match"):
        open_pairs(config(f"{tmp_path}/{name}"))


def test_no_source_mixed_kinds_unknown_kinds_and_repeats_are_refused(tmp_path: Path, small: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    (tmp_path / "t.doc").write_text("")
    problems = {
        (): "source is empty",
        (small, tmp_path / "t.csv"): "mixes kinds: .*small.tar is a tar, .*t.csv is a table",
        (tmp_path / "t.doc",): "not a known format of pairs",
        (small, tmp_path / "sm*.tar"): "names .*small.tar twice",
    }
    for source, problem in problems.items():
        with pytest.raises(DataError, match=problem):
            open_pairs(config(*source))


def test_the_fingerprint_names_every_file_with_its_bytes(tmp_path: Path, small: Path) -> None:
    assert fingerprint(config(small)) == [(str(small), small.stat().st_size)]
    assert fingerprint(config("pipe:cat {a,b}.tar")) == [("pipe:cat a.tar", -1), ("pipe:cat b.tar", -1)]
    folder = make_folder(tmp_path / "f", {"a.jpg": b"123", "a.txt": b"12", "README.md": b""})
    assert fingerprint(config(folder)) == [(f"{folder}/a.jpg", 5)]


# URLs


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def _pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who allows `pipe:`."""
    monkeypatch.setenv(ALLOW_PIPE, "1")


@pytest.mark.usefixtures("_pipes")
@pytest.mark.parametrize("scheme", ["http", "pipe"])
def test_a_url_is_fetched_once_and_read_from_the_cache(tmp_path: Path, small: Path, served: str, scheme: str) -> None:
    url = f"{served}/small.tar" if scheme == "http" else f"pipe:cat '{small}'"
    content, cache = small.read_bytes(), tmp_path / "cache"
    pairs = open_pairs(config(url), cache_dir=cache)
    small.unlink()
    assert pairs.shards[0].name == url
    assert read_all(open_pairs(config(url), cache_dir=cache)) == read_all(pairs)
    assert [path.read_bytes() for path in cache.rglob("*") if path.is_file()] == [content]


@pytest.mark.usefixtures("_pipes")
@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("PIPE:cat {path}", "cannot be fetched"),
        ("pipe:cat {path}; exit 3", "cannot be fetched .*exit 3"),
        ("pipe:head -c 2000 {path}", "cut short at byte 2,000"),
        ("pipe:true", "an empty file"),
        ("{served}/nothing.tar", "nothing.tar: not there .*HTTP 404"),
        ("s4://bucket/a.tar", "cannot be fetched .*no gopen handler"),
    ],
)
def test_a_failed_fetch_leaves_nothing_in_the_cache(
    tmp_path: Path, small: Path, served: str, url: str, problem: str
) -> None:
    url = url.format(path=small, served=served)
    with pytest.raises(DataError, match=problem):
        open_pairs(config(url), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("allowed", [None, "", "0", "yes"])
@pytest.mark.parametrize("scheme", ["pipe:", "PIPE:"])
def test_a_shell_command_is_not_run_unless_the_user_allows_it(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, allowed: str | None
) -> None:
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    if allowed is not None:
        monkeypatch.setenv(ALLOW_PIPE, allowed)
    source = f"{scheme}touch '{tmp_path}/ran'; cat '{small}'"
    with pytest.raises(ConfigError, match="not run, because it is a shell command") as error:
        open_pairs(config(source), cache_dir=tmp_path / "cache")
    assert "--allow-pipe" in error.value.fix
    assert ALLOW_PIPE in error.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {small.name}


def test_a_shard_that_is_in_the_cache_needs_no_command_and_no_permission(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"pipe:cat '{small}'"
    monkeypatch.setenv(ALLOW_PIPE, "1")
    fetched = read_all(open_pairs(config(url), cache_dir=tmp_path / "cache"))
    monkeypatch.delenv(ALLOW_PIPE)
    assert read_all(open_pairs(config(url), cache_dir=tmp_path / "cache")) == fetched


def test_a_quote_in_an_address_is_no_end_of_a_word_for_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """webdataset 0.2.86 runs `curl '{url}'` in a shell."""
    opened: list[str] = []
    module = importlib.import_module("webdataset.gopen")  # the package has a function of this name
    monkeypatch.setattr(module, "gopen", lambda url, mode: opened.append(url) or io.BytesIO())
    for url in ("http://host/a'; touch ran; '.tar", "gs://bucket/it's.tar"):
        fetch(url, tmp_path / "file", check=lambda path: None)
    assert opened == ["http://host/a%27; touch ran; %27.tar", "gs://bucket/it%27s.tar"]


def test_urls_that_end_alike_have_files_of_their_own(tmp_path: Path) -> None:
    assert cached_path("http://a/0.tar?x=1", tmp_path) != cached_path("http://b/0.tar?x=1", tmp_path)
    assert cached_path("http://a/0.tar?x=1", tmp_path).name.endswith("-0.tar")
    assert cached_path("pipe:" + "x/../" * 200, tmp_path).parent == tmp_path


# Tables


def make_images(folder: Path, count: int) -> list[str]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number:03d}.jpg" for number in range(count)]
    for name in names:
        (folder / name).write_bytes(f"image {name}".encode())
    return names


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_a_csv_table_gives_its_rows_in_order(tmp_path: Path, suffix: str, delimiter: str) -> None:
    images = make_images(tmp_path, 3)
    path = tmp_path / f"t{suffix}"
    rows = [["note", "image", "caption"], ["x", images[2], '"a ""quoted"", long\ncaption"'], ["", images[0], "NA"]]
    rows.append(["é", str(tmp_path / images[1]), "absolute"])
    path.write_text("\n".join(delimiter.join(row) for row in rows) + "\n")
    pairs = open_pairs(config(path, keep_fields=("note",)))
    assert read_all(pairs) == [
        Pair(images[2], b"image images/002.jpg", ('a "quoted", long\ncaption',), {"note": "x"}),
        Pair(images[0], b"image images/000.jpg", ("NA",), {"note": ""}),
        Pair(str(tmp_path / images[1]), b"image images/001.jpg", ("absolute",), {"note": "é"}),
    ]


def test_a_field_is_text_also_where_bytes_lie_within_lists_and_structs():
    """Tables give text as bytes, so that text that is not UTF-8 spoils its own row alone."""
    assert field_text([b"a", {"x": b"b \xff"}, 1, None]) == '["a", {"x": "b \\\\xff"}, 1, null]'
    assert field_text(b"\xe9") == "\\xe9"


def test_a_parquet_table_holds_lists_of_captions_and_a_key_of_its_own(tmp_path: Path) -> None:
    images = make_images(tmp_path, 3)
    table = pa.table(
        {"path": images, "texts": [["a", "b "], ["c"], ["", "d"]], "id": [7, 8, 9], "score": [0.5, None, 2.0]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    settings = {
        "image_column": "path",
        "caption_column": "texts",
        "key_column": "id",
        "keep_fields": ("score", "texts"),
    }
    pairs = open_pairs(config(tmp_path / "t.parquet", **settings), index=tmp_path / "index")
    assert read_all(pairs) == [
        Pair("7", b"image images/000.jpg", ("a", "b"), {"score": "0.5", "texts": '["a", "b "]'}),
        Pair("8", b"image images/001.jpg", ("c",), {"score": "", "texts": '["c"]'}),
        Pair("9", b"image images/002.jpg", ("d",), {"score": "2.0", "texts": '["", "d"]'}),
    ]


ROWS_OF_CAPTIONS = [(0, "a"), (1, "b"), (0, "c"), (2, "d"), (1, "e"), (0, "")]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_of_one_image_are_one_pair_of_several_captions_where_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(tables, "SHARD_ROWS", 2)
    images = make_images(tmp_path, 3)
    path = tmp_path / f"t{suffix}"
    rows = [(images[image], caption, f"note {caption}") for image, caption in ROWS_OF_CAPTIONS]
    if suffix == ".csv":
        path.write_text("image,caption,note\n" + "".join(",".join(row) + "\n" for row in rows))
    else:
        columns = dict(zip(("image", "caption", "note"), zip(*rows, strict=True), strict=True))
        pyarrow.parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)

    assert list(open_pairs(config(path)).known_bad) == [2, 4, 5]
    for where in (None, tmp_path / "index"):
        pairs = open_pairs(config(path, repeated_rows="merge", keep_fields=("note",)), index=where)
        assert read_all(pairs) == [
            Pair(images[0], b"image images/000.jpg", ("a", "c"), {"note": "note a"}),
            Pair(images[1], b"image images/001.jpg", ("b", "e"), {"note": "note b"}),
            Pair(images[2], b"image images/002.jpg", ("d",), {"note": "note d"}),
        ]
        assert [shard.rows for shard in pairs.shards] == [2, 1]


def test_rows_of_one_key_and_several_images_are_not_one_pair(tmp_path: Path) -> None:
    images = make_images(tmp_path, 2)
    (tmp_path / "t.csv").write_text(f"id,image,caption\n7,{images[0]},a\n7,{images[1]},b\n7,{images[0]},c\n,,d\n,,e\n")
    pairs = open_pairs(config(tmp_path / "t.csv", key_column="id", repeated_rows="merge"))
    assert pairs.read(0).captions == ("a", "c")
    assert list(pairs.known_bad.values()) == ["duplicate key, first used by row 0", *["no image (empty image)"] * 2]


def test_a_cell_too_long_for_a_path_is_named_and_never_printed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"image,caption\n{'A' * 9000},x\n")
    with pytest.raises(DataError, match=r"image is no path \(9,000 bytes\)"):
        open_pairs(config(tmp_path / "t.csv"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "data"])
@pytest.mark.parametrize("table", ["t.csv", "t.parquet"])
def test_pictures_written_as_text_are_named_and_never_printed(tmp_path: Path, kind: str, table: str) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG" if kind == "data" else kind)
    text = ("data:image/png," if kind == "data" else "") + base64.b64encode(file.getvalue()).decode()
    rows = pa.table({"image": ["a.jpg", text], "caption": ["x", "y"]})
    if table.endswith("csv"):
        pyarrow.csv.write_csv(rows, tmp_path / table)
    else:
        pyarrow.parquet.write_table(rows, tmp_path / table)

    with pytest.raises(DataError, match=rf"holds pictures \(such as one of {len(text):,} bytes\)") as error:
        open_pairs(config(tmp_path / table))
    assert text[:60] not in str(error.value)


def test_a_path_that_begins_like_a_picture_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "UklGR").mkdir()
    (tmp_path / "UklGR/a.jpg").write_bytes(b"image")
    (tmp_path / "t.csv").write_text("image,caption\nUklGR/a.jpg,x\n")
    assert open_pairs(config(tmp_path / "t.csv")).read(0).image == b"image"


def test_a_key_of_several_values_is_refused(tmp_path: Path) -> None:
    for kind in ([["a"], ["b"]], [{"a": 1}, {"a": 2}]):
        pyarrow.parquet.write_table(
            pa.table({"image": ["a", "b"], "caption": ["x", "y"], "id": kind}), tmp_path / "t.parquet"
        )
        with pytest.raises(DataError, match=r"column 'id' is of type (list|struct).*not one key a row"):
            open_pairs(config(tmp_path / "t.parquet", key_column="id"))


def test_bad_rows_of_a_table_keep_their_place(tmp_path: Path) -> None:
    images = make_images(tmp_path, 3)
    (tmp_path / "t.csv").write_bytes(
        b"image,caption\n"
        + f"{images[0]},good\n".encode()
        + b"missing.jpg,caption\nimages,a folder\n,no image\n"
        + f"{images[0]},again\n{images[1]},".encode()
        + b"caf\xe9\n"
        + f"{images[2]},  \ncaf".encode()
        + b"\xe9.jpg,caption\nhttp://host/a.jpg,caption\n"
        + f"./{images[2]},good\n".encode()
    )
    pairs = open_pairs(config(tmp_path / "t.csv"))
    assert read_all(pairs)[1:-1] == [
        f"image '{tmp_path}/missing.jpg' cannot be read (No such file or directory)",
        f"image '{tmp_path}/images' cannot be read (Is a directory)",
        "no image (empty image)",
        "duplicate key, first used by row 0",
        "caption 1 is not UTF-8 (byte 3)",
        "the caption is empty",
        "the key is not UTF-8",
        f"image '{tmp_path}/http://host/a.jpg' cannot be read (No such file or directory,"
        " it is an address: fetch the image first, or give tars)",
    ]
    assert [pairs.read(row).captions for row in (0, 9)] == [("good",), ("good",)]
    assert sorted(pairs.known_bad) == [3, 4, 7]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
def test_parquet_columns_of_text_are_read_in_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    (image,) = make_images(tmp_path, 1)
    table = pa.table({"image": pa.array([image], kind), "caption": pa.array(["é"], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert open_pairs(config(tmp_path / "t.parquet")).read(0).captions == ("é",)


def test_empty_cells_of_parquet_are_bad_samples(tmp_path: Path) -> None:
    images = make_images(tmp_path, 4)
    table = pa.table(
        {"image": [*images, None], "caption": [["a"], None, [], [None], ["a"]], "id": ["a", "b", "c", "d", "e"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pairs = open_pairs(config(tmp_path / "t.parquet", key_column="id"))
    no_caption = "no caption (empty caption)"
    assert pairs.known_bad == {1: no_caption, 2: no_caption, 3: no_caption, 4: "no image (empty image)"}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("with_index", [True, False])
def test_tables_are_cut_into_shards_that_hold_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, with_index: bool
) -> None:
    monkeypatch.setattr(tables, "SHARD_ROWS", 4)
    images = make_images(tmp_path, 10)
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        path.write_text("image,caption\n" + "".join(f"{name},of {name}\n" for name in images))
    else:
        table = pa.table({"image": images, "caption": [f"of {name}" for name in images]})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    pairs = open_pairs(config(path), index=tmp_path / "index" if with_index else None)
    assert [(shard.name, shard.first_row, shard.rows) for shard in pairs.shards] == [
        (f"{path}#00000", 0, 4),
        (f"{path}#00001", 4, 4),
        (f"{path}#00002", 8, 2),
    ]
    assert pairs.keys(0, 10) == images
    assert pairs.keys(3, 9) == images[3:9]
    assert [pairs.read(row).captions[0] for row in range(10)] == [f"of {name}" for name in images]


def test_a_table_with_other_columns_or_types_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Image,caption\na.jpg,x\n")
    with pytest.raises(DataError, match="column 'image' is not there; the table has Image, caption") as error:
        open_pairs(config(tmp_path / "t.csv"))
    assert error.value.fix.startswith("did you mean Image?")
    with pytest.raises(DataError, match="column 'Note' is not there"):
        open_pairs(config(tmp_path / "t.csv", image_column="Image", keep_fields=("Note",)))
    (tmp_path / "twice.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(DataError, match="column 'caption' is there more than once"):
        open_pairs(config(tmp_path / "twice.csv"))
    pyarrow.parquet.write_table(pa.table({"image": [1], "caption": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'image' is of type int64"):
        open_pairs(config(tmp_path / "t.parquet"))
    pyarrow.parquet.write_table(pa.table({"image": ["a"], "caption": [[1]]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'caption' is of type list<.*int64>"):
        open_pairs(config(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", b"", "cannot be read .*Empty CSV"),
        ("t.csv", b"image,caption\n", "an empty table"),
        ("t.csv", b"image,caption\na.jpg,x\nb.jpg,y,z\n", "cannot be read .*Expected 2 columns, got 3"),
        ("t.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("t.parquet", b"", "cannot be read"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    for where in (None, tmp_path / "index"):
        with pytest.raises(DataError, match=f"{name}: .*{problem}"):
            open_pairs(config(tmp_path / name), index=where)


# Folders


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("with_index", [True, False])
def test_a_folder_gives_its_images_sorted_with_one_caption_per_line(tmp_path: Path, with_index: bool) -> None:
    files = {
        "b/2.jpg": b"b2",
        "b/2.txt": b"one\r\n\n  two \n",
        "b.jpeg": b"b",
        "b.txt": b"\xef\xbb\xbfcaption",
        "a.x.PNG": b"ax",
        "a.x.txt": b"caption",
        "c.webp": b"c",
        "c.png": b"later",
        "c.txt": b"caption",
        "d.jpg": b"d",
        "e.jpg": b"e",
        "e.txt": b"\n",
        ".hidden/x.jpg": b"",
        "._a.jpg": b"",
        "notes.md": b"",
    }
    folder = make_folder(tmp_path / "f", files)
    pairs = open_pairs(config(folder, keep_fields=("x",)), index=tmp_path / "index" if with_index else None)
    assert read_all(pairs) == [
        Pair("a.x", b"ax", ("caption",), {"x": ""}),
        Pair("b", b"b", ("caption",), {"x": ""}),
        Pair("b/2", b"b2", ("one", "two"), {"x": ""}),
        Pair("c", b"later", ("caption",), {"x": ""}),
        "duplicate key, first used by row 3",
        "no caption (.txt beside the image)",
        "the caption is empty",
    ]
    assert [(shard.name, shard.rows) for shard in pairs.shards] == [(f"{folder}#00000", 7)]


def test_a_changed_folder_is_listed_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"sub/b.jpg": b"b", "sub/b.txt": b"b"})
    assert open_pairs(config(folder), index=tmp_path / "index").keys(0, 1) == ["sub/b"]
    make_folder(folder, {"sub/a.jpg": b"a", "sub/a.txt": b"a"})
    assert open_pairs(config(folder), index=tmp_path / "index").keys(0, 2) == ["sub/a", "sub/b"]


def test_what_a_folder_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "f", {"a.jpg": b"a", "a.txt": b"a", "README.txt": b""})
    (folder / "link").symlink_to(tmp_path)
    open_pairs(config(folder))
    assert "1 linked folders are not followed" in caplog.text
    assert "1 .txt files have no image of their name beside them, such as 'README.txt'" in caplog.text


def test_images_of_types_that_are_not_read_in_a_folder_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.jpg": b"a", "a.txt": b"a", "b.heic": b"b", "c/d.HEIC": b"d", "e.svg": b"e", "notes.md": b""}
    assert len(open_pairs(config(make_folder(tmp_path / "f", files)))) == 1
    assert "images of types that are not read, or beside one of the same name, are left out: 2 .heic, 1 .svg" in (
        caplog.text
    )


def test_every_type_of_image_that_can_be_decoded_is_one_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    files = {f"{kind}.{kind}": kind.encode() for kind in EXTENSIONS}
    captions = {f"{kind}.txt": b"x" for kind in EXTENSIONS}
    folder = make_folder(tmp_path / "f", files | captions)
    tar = write_tar(tmp_path / "t.tar", sorted([*files.items(), *captions.items()]))
    for source in (folder, tar):
        pairs = open_pairs(config(source))
        assert [pairs.read(row).image.decode() for row in range(len(pairs))] == sorted(EXTENSIONS)


def test_an_image_of_open_clips_types_is_taken_before_others_of_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.gif": b"preview", "a.jpg": b"image", "a.txt": b"x", "b.avif": b"alone", "b.txt": b"x"}
    folder = make_folder(tmp_path / "f", files)
    tar = write_tar(tmp_path / "t.tar", list(files.items()))
    for source in (folder, tar):
        pairs = open_pairs(config(source))
        assert [pairs.read(row).image for row in range(len(pairs))] == [b"image", b"alone"]
    assert "beside one of the same name, are left out: 1 .gif" in caplog.text


@pytest.mark.parametrize("name", ["x/0.tar", "0.parquet", "a/b/0.csv"])
def test_a_folder_of_sources_is_not_a_source(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "f", {name: b"", "README.md": b""})
    suffix = Path(name).suffix
    with pytest.raises(DataError, match=rf"f: a folder without images; it holds 1 {suffix} files") as error:
        open_pairs(config(folder))
    pattern = error.value.fix.removeprefix("Give the files themselves: ")
    with pytest.raises(DataError, match=r"empty|cannot be read"):
        open_pairs(config(pattern))


def test_odd_entries_of_a_folder_are_no_trap(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", {"a.jpg": b"a", "a.txt": b"a", "gone.txt": b"x"})
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jpg")  # opening it would wait for ever
    pairs = open_pairs(config(folder))
    assert pairs.keys(0, len(pairs)) == ["a", "gone"]
    assert "cannot be read" in reason(pairs, 1)


@pytest.mark.parametrize("files", [{}, {"a.txt": b"caption"}])
def test_a_folder_without_images_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = make_folder(tmp_path / "f", {"notes.md": b"", **files})
    with pytest.raises(DataError, match="an empty folder, without a single pair"):
        open_pairs(config(folder))


# Links and damage


def test_files_of_the_hubs_cache_have_the_names_of_their_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    make_folder(blobs, {"1f": b"image", "2f": b"caption", "3f": b"image,caption\npictures/a.jpg,of the table\n"})
    write_tar(blobs / "4f", sample("a"))
    (snapshot / "pictures").mkdir(parents=True)
    for blob, name in {"1f": "pictures/a.jpg", "2f": "pictures/a.txt", "3f": "t.csv", "4f": "0.tar"}.items():
        (snapshot / name).symlink_to(blobs / blob)
    found = {
        name: open_pairs(config(snapshot / name), index=tmp_path / "index") for name in ("pictures", "t.csv", "*.tar")
    }
    assert {name: (pairs.key(0), pairs.read(0).captions) for name, pairs in found.items()} == {
        "pictures": ("a", ("caption",)),
        "t.csv": ("pictures/a.jpg", ("of the table",)),
        "*.tar": ("a", ("caption of a",)),
    }
    assert found["pictures"].image_name(0) == "a.jpg"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some changed, zeroed, taken out, repeated, or all from a place on gone."""
    at, size = draw.randrange(len(data)), draw.choice([1, 8, 64, 512, 1024])
    return {
        "bit": data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
        "zero": data[:at] + bytes(min(size, len(data) - at)) + data[at + size :],
        "out": data[:at] + data[at + size :],
        "twice": data[: at + size] + data[at:],
        "cut": data[:at],
    }[draw.choice(["bit", "bit", "zero", "out", "twice", "cut"])]


@pytest.mark.parametrize("name", ["t.tar", "t.parquet"])
def test_damage_to_a_source_is_an_error_or_a_bad_sample_and_adds_no_pair(tmp_path: Path, name: str) -> None:
    path, draw = tmp_path / name, random.Random(0)
    images = make_images(tmp_path, 8)
    if name == "t.tar":
        write_tar(path, [member for image in images for member in sample(image[7:10], captions=["a", "b"], dup=1)])
    else:
        table = pa.table({"image": images, "caption": [["a", f"of {image}"] for image in images]})
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)

    whole = path.read_bytes()
    good = read_all(open_pairs(config(path)))
    for _ in range(200):
        path.write_bytes(damaged(whole, draw))
        try:
            found = read_all(open_pairs(config(path)))
        except DataError:
            continue
        assert len(found) <= len(good) + 1  # a key that changed leaves the rest of its sample behind
        if name == "t.parquet":
            assert found == good


# Index, processes, access


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that are read for an index."""
    seen: list[str] = []
    real: Callable[..., pa.RecordBatch] = scan_tar

    def counted(source: SourceFile, **options: Any) -> pa.RecordBatch:
        seen.append(Path(source.name).name)
        return real(source, **options)

    monkeypatch.setattr(tars, "scan_tar", counted)
    return seen


def test_an_index_is_used_again_until_its_tar_changes(tmp_path: Path, scans: list[str]) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", sample(name)) for name in "ab"]
    index = tmp_path / "index"
    before = read_all(open_pairs(config(*tars), index=index))
    assert read_all(open_pairs(config(*tars), index=index)) == before
    assert scans == ["a.tar", "b.tar"]
    status = tars[0].stat()
    write_tar(tars[0], sample("c"))  # as many bytes as before
    os.utime(tars[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert tars[0].stat().st_size == status.st_size
    assert open_pairs(config(*tars), index=index).keys(0, 2) == ["c", "b"]
    assert scans == ["a.tar", "b.tar", "a.tar"]


def test_another_order_of_the_same_tars_has_its_own_bad_rows(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", sample("a"))
    two = write_tar(tmp_path / "2.tar", [*sample("b"), *sample("a")])
    index = tmp_path / "index"
    assert list(open_pairs(config(one, two), index=index).known_bad) == [2]
    assert list(open_pairs(config(two, one), index=index).known_bad) == [2]
    assert open_pairs(config(two, one), index=index).keys(0, 3) == ["b", "a", "a"]


def test_an_index_that_cannot_be_read_is_made_again_with_a_word(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read_all(open_pairs(config(small), index=tmp_path / "index"))
    files = list((tmp_path / "index").iterdir())
    assert len(files) == 2
    for file in files:
        file.unlink()
        file.write_bytes(b"ARROW1 and then nothing")
    index._open_index.clear()
    index._mapped_batch.clear()
    assert read_all(open_pairs(config(small), index=tmp_path / "index")) == expected
    assert caplog.text.count("this index cannot be read") == 2


@pytest.mark.parametrize("damage", ["zeros", "one bit", "cut", "appended"])
def test_a_damaged_index_is_noticed_and_made_again(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = read_all(open_pairs(config(small), index=tmp_path / "index"))
    for file in (tmp_path / "index").iterdir():
        content = bytearray(file.read_bytes())
        at = len(content) // 2
        content[at : at + 64] = {
            "zeros": bytes(64),
            "one bit": bytes([content[at] ^ 1]) + content[at + 1 : at + 64],
            "cut": b"",
            "appended": content[at : at + 65],
        }[damage]
        file.unlink()
        file.write_bytes(content)
    for cached in (index._open_index, index._mapped_batch):
        cached.clear()
    index._is_whole.cache_clear()
    assert read_all(open_pairs(config(small), index=tmp_path / "index")) == expected
    assert caplog.text.count("this index cannot be read (its checksum is wrong); it is made again") == 2


def test_no_part_of_an_index_is_left_by_a_broken_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 3000)
    with pytest.raises(DataError):
        open_pairs(config(tmp_path / "a.tar"), index=tmp_path / "index")
    assert not list((tmp_path / "index").iterdir())


def test_a_tar_that_changes_after_it_was_indexed_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("a"), *sample("b")])
    pairs = open_pairs(config(path))
    write_tar(path, [*sample("b"), *sample("a")])
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="changed or went away after it was indexed"):
        pairs.read(0)
    path.unlink()
    with pytest.raises(DataError, match="changed or went away"):
        pairs.read(0)


def test_a_tar_cut_short_while_it_is_open_is_not_read(tmp_path: Path, small: Path) -> None:
    pairs = open_pairs(config(small))
    assert pairs.read(0).key == "a"
    os.truncate(small, 600)
    with pytest.raises(DataError, match="changed or went away"):
        pairs.read(2)


@pytest.mark.parametrize("with_index", [True, False])
def test_pairs_come_back_from_a_pickle_and_stay_small(tmp_path: Path, with_index: bool) -> None:
    path = write_tar(tmp_path / "a.tar", [member for number in range(400) for member in sample(f"{number:020d}")])
    pairs = open_pairs(config(path), index=tmp_path / "index" if with_index else None)
    read_all(pairs)
    pickled = pickle.dumps(pairs)
    assert read_all(pickle.loads(pickled)) == read_all(pairs)
    assert not with_index or len(pickled) < 4_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_this_one_reads(tmp_path: Path, method: str) -> None:
    tars = [
        write_tar(tmp_path / f"{shard}.tar", [member for row in range(50) for member in sample(f"{shard}-{row}")])
        for shard in range(2)
    ]
    pairs = open_pairs(config(*tars), index=tmp_path / "index")
    expected = read_all(pairs)  # every file is open when the fork happens
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(pairs.read, range(100), chunksize=7) == expected


@pytest.mark.slow
def test_threads_may_read_more_tars_than_stay_open(tmp_path: Path) -> None:
    count = 150
    tars = [write_tar(tmp_path / f"{shard:03d}.tar", sample(f"{shard}")) for shard in range(count)]
    pairs = open_pairs(config(*tars), index=tmp_path / "index")
    wrong: list[int] = []

    def read_in_order(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(count).tolist():
            if pairs.read(row).image != f"image of {row}".encode():
                wrong.append(row)

    threads = [threading.Thread(target=read_in_order, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) < 400


@pytest.mark.usefixtures("_pipes")
def test_relative_paths_hold_when_the_working_folder_changes(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = open_pairs(config(small.name), index=Path("index"))
    fetched = open_pairs(config(f"pipe:cat {small.name}"), index=Path("index"), cache_dir=Path("cache"))
    monkeypatch.chdir("/")
    index._open_index.clear()
    index._mapped_batch.clear()
    assert read_all(local) == read_all(fetched)


def test_rows_out_of_range_are_refused(small: Path) -> None:
    pairs = open_pairs(config(small))
    for row in (-1, 3):
        with pytest.raises(IndexError, match=f"want 0 <= row < 3, got {row}"):
            pairs.read(row)
        with pytest.raises(IndexError):
            pairs.key(row)
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="want 0 <= start <= stop <= 3"):
            pairs.keys(start, stop)
    assert pairs.keys(1, 1) == []
