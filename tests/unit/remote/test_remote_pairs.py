"""Pairs elsewhere: the same rows as of local files, read by range, nothing twice, changes noticed."""

import io
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remote_servers import Answers, Handler, Place, hub, needs_s3, place, s3, web

from clip_cid import extras, os_errors
from clip_cid.data.pairs.contents import contents_of_pairs, state_of_pairs
from clip_cid.data.pairs.pair import BadSample
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import DataError, MissingExtraError
from clip_cid.file_digests import FileDigests
from clip_cid.recipe import PairsConfig
from clip_cid.remote.remembered import forget

__all__ = ["hub", "place", "s3", "web"]

PIXELS = b"\x00image" * 5000


def tar_of(*keys: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            for suffix, data in (("jpg", key.encode() + PIXELS), ("txt", f"a {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(*keys: str) -> bytes:
    images = [{"bytes": key.encode() + PIXELS, "path": f"{key}.jpg"} for key in keys]
    table = pa.table({"image": images, "caption": [f"a {key}" for key in keys], "other": [PIXELS * 20] * len(keys)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=1, compression="none", use_dictionary=False)
    return buffer.getvalue()


CSV = b"image,caption\nimages/a.jpg,a a\nimages/b.jpg,a b\n"


def rows(*sources: str, cache: Path, index: Path | None = None) -> list[tuple[str, bytes, tuple[str, ...]]]:
    pairs = open_pairs(PairsConfig(source=sources), index=index, cache_dir=cache)
    read = [pairs.read(row) for row in range(len(pairs))]
    return [(pair.key, pair.image[: -len(PIXELS)], pair.captions) for pair in read]


def test_tars_parquet_csv_and_folders_elsewhere_are_the_pairs_they_hold(place: Place, tmp_path: Path) -> None:
    wanted = [(key, key.encode(), (f"a {key}",)) for key in "ab"]
    assert rows(place.put("x.tar", tar_of("a", "b")), cache=tmp_path) == wanted
    parquet = place.put("x.parquet", parquet_of("a", "b"))
    assert rows(parquet, cache=tmp_path) == [(f"{key}.jpg", *rest) for key, *rest in wanted]

    for key in "ab":
        place.put(f"images/{key}.jpg", key.encode() + PIXELS)
        place.put(f"images/{key}.txt", f"a {key}".encode())
    csv = place.put("x.csv", CSV)
    assert rows(csv, cache=tmp_path) == [(f"images/{key}.jpg", *rest) for key, *rest in wanted]
    folder = csv.removesuffix("x.csv") + "images"
    if place.kind == "web":
        with pytest.raises(DataError, match="images: not there"):
            rows(folder, cache=tmp_path)
    else:
        assert rows(folder, cache=tmp_path) == wanted


def test_what_is_read_is_kept_so_that_nothing_is_fetched_twice(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    tar = answers.files["/x.tar"] = tar_of(*"abcdef")
    wanted = rows(f"{url}/x.tar", cache=tmp_path / "cache", index=tmp_path / "index")
    assert answers.sent == len(tar) + 1  # the first byte was asked for to see how large it is
    forget()
    assert rows(f"{url}/x.tar", cache=tmp_path / "cache", index=tmp_path / "index") == wanted
    assert answers.sent == len(tar) + 2


def test_of_a_parquet_file_only_the_columns_that_count_are_fetched(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    parquet = answers.files["/x.parquet"] = parquet_of(*"abcdefgh")
    assert len(parquet) > 8 * 20 * len(PIXELS)
    assert len(rows(f"{url}/x.parquet", cache=tmp_path)) == 8
    assert answers.sent < len(parquet)


def test_where_the_cache_has_no_room_ranges_are_read_as_they_are_asked_for(
    web: tuple[str, Answers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = web
    answers.files["/x.parquet"] = parquet_of(*"abcdefgh")
    monkeypatch.setattr("clip_cid.remote.kept._ROOM", 1 << 62)
    assert len(rows(f"{url}/x.parquet", cache=tmp_path)) == 8
    assert answers.sent < 12 * len(PIXELS) + (1 << 20)
    assert not [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["block", "checksum", "cut"])
def test_a_damaged_block_of_the_cache_is_fetched_again(web: tuple[str, Answers], tmp_path: Path, damage: str) -> None:
    url, answers = web
    answers.files["/x.tar"] = tar_of(*"abc")
    wanted = rows(f"{url}/x.tar", cache=tmp_path)
    (kept,) = (path for path in (tmp_path / "remote").rglob("*") if path.is_file())
    data = bytearray(kept.read_bytes())
    place = {"block": 600, "checksum": len(data) - 8, "cut": 0}[damage]
    data[place] ^= 1
    kept.write_bytes(data[: 2000 if damage == "cut" else None])
    assert rows(f"{url}/x.tar", cache=tmp_path) == wanted


def test_a_server_without_ranges_gives_the_whole_file_once(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    answers.by_range = False
    for name, data in (("/x.tar", tar_of("a", "b")), ("/x.parquet", parquet_of("a", "b"))):
        answers.files[name] = data
        wanted = rows(url + name, cache=tmp_path)
        assert [image for _, image, _ in wanted] == [b"a", b"b"]
        forget()
        answers.requests.clear()
        assert rows(url + name, cache=tmp_path) == wanted
        assert answers.requests == [f"{name} bytes=0-0"]


def test_a_server_that_tells_no_versions_is_named(
    web: tuple[str, Answers], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, answers = web
    answers.tags = False
    answers.files["/x.tar"] = tar_of("a")
    with caplog.at_level("WARNING", "clip_cid"):
        assert len(rows(f"{url}/x.tar", cache=tmp_path)) == 1
    assert "gives no ETag and no date" in caplog.text


def test_braces_and_wildcards_name_many_files(place: Place, tmp_path: Path) -> None:
    for number in range(3):
        place.put(f"{number:02d}.tar", tar_of(f"k{number}"))
    base = place.put("x", b"").removesuffix("/x")
    assert [key for key, *_ in rows(f"{base}/{{00..02}}.tar", cache=tmp_path)] == ["k0", "k1", "k2"]
    if place.kind == "web":
        with pytest.raises(DataError, match="a web server does not list its files") as error:
            rows(f"{base}/*.tar", cache=tmp_path)
        assert "{00000..00099}" in error.value.fix
    else:
        assert [key for key, *_ in rows(f"{base}/0[12].tar", cache=tmp_path)] == ["k1", "k2"]
        place.put("more/folders/03.tar", tar_of("k3"))
        assert [key for key, *_ in rows(f"{base}/**/0[23].tar", cache=tmp_path)] == ["k2", "k3"]
        with pytest.raises(DataError, match="matches no file"):
            rows(f"{base}/*.parquet", cache=tmp_path)
    with pytest.raises(DataError, match=r"names .*00\.tar twice"):
        rows(f"{base}/00.tar", f"{base}/00.tar", cache=tmp_path)


def test_a_changed_object_is_another_index_and_another_state(place: Place, tmp_path: Path) -> None:
    address = place.put("x.tar", tar_of("a", "b"))
    settings = PairsConfig(source=(address,))
    before = state_of_pairs(settings, index=None, cache_dir=tmp_path)
    assert [key for key, *_ in rows(address, cache=tmp_path, index=tmp_path / "index")] == ["a", "b"]
    place.put("x.tar", tar_of("a", "c"))  # as many bytes
    assert state_of_pairs(settings, index=None, cache_dir=tmp_path) != before
    assert [key for key, *_ in rows(address, cache=tmp_path, index=tmp_path / "index")] == ["a", "c"]
    place.put("x.tar", tar_of("a", "b"))
    assert state_of_pairs(settings, index=None, cache_dir=tmp_path) == before


def test_contents_of_pairs_are_the_same_here_and_elsewhere(place: Place, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of("a", "b"))
    contents = [
        contents_of_pairs(
            PairsConfig(source=(source,)), FileDigests(tmp_path / f"{number}.jsonl"), index=None, cache_dir=tmp_path
        )
        for number, source in enumerate((str(tmp_path / "x.tar"), place.put("x.tar", tar_of("a", "b"))))
    ]
    assert contents[0] == contents[1]


def test_an_object_that_changes_while_it_is_read_is_refused(place: Place, tmp_path: Path) -> None:
    if place.kind == "hub":
        pytest.skip("the Hub is read at one commit; this stand-in keeps no other")
    address = place.put("x.tar", tar_of("a", "b"))
    pairs = open_pairs(PairsConfig(source=(address,)), cache_dir=tmp_path / "one")
    place.put("x.tar", tar_of("a", "c"))
    for kept in (tmp_path / "one" / "remote").rglob("*"):
        if kept.is_file():
            kept.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar: changed after it was indexed"):
        pairs.read(1)


def test_the_hub_is_read_at_the_commit_that_was_asked_for(hub: Answers, tmp_path: Path) -> None:
    hub.files["me/set/x.tar"] = tar_of("a")
    rows("hf://datasets/me/set/x.tar", cache=tmp_path)
    read = [request for request in hub.requests if "/resolve/" in request]
    assert read
    assert all(re.search(r"/resolve/[0-9a-f]{40}/x\.tar", request) for request in read)


def test_branches_of_the_hub_can_be_named(hub: Answers, tmp_path: Path) -> None:
    hub.files["me/set/data/x.tar"] = tar_of("a")
    pairs = open_pairs(PairsConfig(source=("hf://datasets/me/set@dev/data/*.tar",)), cache_dir=tmp_path)
    assert pairs.shards[0].name == "hf://datasets/me/set@dev/data/x.tar"
    assert any("/revision/dev" in request for request in hub.requests)


# Bad input


def test_a_file_that_is_not_there_is_named_in_two_lines(place: Place, tmp_path: Path) -> None:
    there = place.put("x.tar", tar_of("a"))
    with pytest.raises(DataError, match=r"y\.tar: not there") as error:
        rows(there.replace("x.tar", "y.tar"), cache=tmp_path)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("address", ["hf://datasets/no/where/x.tar", "hf://datasets/no/where/*.tar"])
def test_a_name_that_the_hub_does_not_have(hub: Answers, address: str) -> None:
    with pytest.raises(DataError, match=r"no/where.*not there") as error:
        open_pairs(PairsConfig(source=(address,)))
    assert "logged in" in error.value.fix


def check_rights(client: Any, *, after: int) -> None:
    """Let moto refuse whoever has no rights, after so many requests."""
    address = f"{client.meta.endpoint_url}/moto-api/reset-auth"
    request = urllib.request.Request(address, data=str(after).encode(), headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


@needs_s3
@pytest.mark.parametrize("source", ["s3://bucket/x.tar", "s3://bucket/*.tar", "s3://bucket/folder"])
def test_a_bucket_without_permission(s3: Any, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    check_rights(s3, after=0)
    try:
        with pytest.raises(DataError, match="access is denied") as error:
            open_pairs(PairsConfig(source=(source,)))
    finally:
        check_rights(s3, after=1 << 30)
    assert "AWS_ACCESS_KEY_ID" in error.value.fix
    assert "the-secret-of-the-test" not in str(error.value)


def test_a_server_that_fails_midway_is_asked_again_and_then_told(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    tar = answers.files["/x.tar"] = tar_of("a", "b")
    answers.failures = [lambda handler: handler.send(503, b""), lambda handler: handler.send_file(tar), Handler.cut]
    assert len(rows(f"{url}/x.tar", cache=tmp_path / "one")) == 2
    assert len(answers.requests) == 4

    forget()
    answers.failures = [lambda handler: handler.send(503, b"")] * 99
    with pytest.raises(DataError, match=r"x\.tar: cannot be read, after 5 tries \(HTTP 503") as error:
        rows(f"{url}/x.tar", cache=tmp_path / "two")
    assert os_errors.may_pass(error.value.__cause__)

    # The same command goes on.
    forget()
    answers.failures.clear()
    assert len(rows(f"{url}/x.tar", cache=tmp_path / "two")) == 2


def test_cut_files_behind_an_address_are_told_as_cut(place: Place, tmp_path: Path) -> None:
    tar, parquet = tar_of("a", "b"), parquet_of("a", "b")
    with pytest.raises(DataError, match=r"x\.tar: cut short at byte 50,000"):
        rows(place.put("x.tar", tar[:50_000]), cache=tmp_path)
    with pytest.raises(DataError, match=r"x\.parquet: this table cannot be read"):
        rows(place.put("x.parquet", parquet[:-100]), cache=tmp_path)
    with pytest.raises(DataError, match=r"y\.tar: an empty"):
        rows(place.put("y.tar", b""), cache=tmp_path)


def test_an_address_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.MODULES, "gs", ("no_such_module",))
    with pytest.raises(MissingExtraError, match=r"gs:// needs an optional part: no_such_module") as error:
        open_pairs(PairsConfig(source=("gs://bucket/x.tar",)))
    assert error.value.fix == 'pip install "clip-cid[gs]"'


# Secrets and paths


def test_no_secret_of_an_address_is_shown_or_kept(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    answers.login = "ada:PASSWORD"
    answers.files["/x.tar"] = tar_of("a")
    address = url.replace("//", "//ada:PASSWORD@") + "/x.tar?X-Amz-Signature=SIGNED&file=3"
    pairs = open_pairs(PairsConfig(source=(address,)), index=tmp_path / "index", cache_dir=tmp_path / "cache")
    assert pairs.shards[0].name == f"{url}/x.tar?X-Amz-Signature=...&file=3"
    assert "PASSWORD" not in repr(pairs._index.sources) + str(list(tmp_path.rglob("*")))

    forget()
    answers.login = "ada:OTHER"
    with pytest.raises(DataError, match="access is denied") as error:
        rows(address, cache=tmp_path / "cache")
    assert not re.search("PASSWORD|SIGNED", str(error.value))


def test_another_signature_is_the_same_file(web: tuple[str, Answers], tmp_path: Path) -> None:
    url, answers = web
    tar = answers.files["/x.tar"] = tar_of("a")
    for signature in ("one", "two"):
        rows(f"{url}/x.tar?sig={signature}", cache=tmp_path / "cache", index=tmp_path / "index")
    assert answers.sent == len(tar) + 2
    assert len(list((tmp_path / "index").glob("x.tar-*"))) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "http://127.0.0.1:9/x.jpg"])
def test_a_table_elsewhere_names_nothing_outside_of_its_folder(
    web: tuple[str, Answers], tmp_path: Path, name: str
) -> None:
    url, answers = web
    answers.files |= {"/set/x.csv": f"image,caption\n{name},c\n".encode(), "/secret.jpg": PIXELS}
    pairs = open_pairs(PairsConfig(source=(f"{url}/set/x.csv",)), cache_dir=tmp_path)
    with pytest.raises(BadSample, match="is not below the folder of"):
        pairs.read(0)


def test_an_image_of_a_table_that_is_missing_costs_its_row(place: Place, tmp_path: Path) -> None:
    place.put("images/a.jpg", b"a" + PIXELS)
    pairs = open_pairs(PairsConfig(source=(place.put("x.csv", CSV),)), cache_dir=tmp_path)
    assert pairs.read(0).image[:1] == b"a"
    with pytest.raises(BadSample, match=r"image 'images/b\.jpg' cannot be read"):
        pairs.read(1)
