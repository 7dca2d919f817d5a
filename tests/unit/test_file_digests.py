"""A digest is that of the bytes, read again only when size or time have changed, and lost lines cost a read."""

import hashlib
import os
from pathlib import Path

import pytest

from clip_cid.file_digests import FileDigests


def of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(path: Path, content: bytes, *, mtime: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime, mtime))


def test_it_is_the_digest_of_the_bytes_also_after_a_change_of_equal_size(tmp_path: Path) -> None:
    file, digests = tmp_path / "file", FileDigests(tmp_path / "digests.jsonl")
    write(file, b"one", mtime=1)
    assert digests.of(file) == of_bytes(b"one")
    write(file, b"two", mtime=2)
    assert digests.of(file) == of_bytes(b"two")


def test_equal_size_and_time_is_not_read_again_also_by_another_process(tmp_path: Path) -> None:
    file, store = tmp_path / "file", tmp_path / "digests.jsonl"
    write(file, b"one", mtime=1)
    FileDigests(store).of(file)
    write(file, b"two", mtime=1)  # nobody does this; it shows that the bytes were not read
    assert FileDigests(store).of(file) == of_bytes(b"one")


def test_a_link_counts_as_what_it_points_to(tmp_path: Path) -> None:
    write(tmp_path / "a", b"one", mtime=1)
    write(tmp_path / "b", b"two", mtime=1)
    digests, link = FileDigests(tmp_path / "digests.jsonl"), tmp_path / "link"
    link.symlink_to("a")
    assert digests.of(link) == of_bytes(b"one")
    link.unlink()
    link.symlink_to("b")
    assert digests.of(link) == of_bytes(b"two")


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'["f", '])
def test_a_damaged_store_costs_a_read_and_is_used_on(tmp_path: Path, damage: bytes) -> None:
    file, store = tmp_path / "file", tmp_path / "digests.jsonl"
    write(file, b"one", mtime=1)
    store.write_bytes(damage)
    for _ in range(2):  # the first of the new lines may join a torn one
        assert FileDigests(store).of(file) == of_bytes(b"one")
    write(file, b"two", mtime=1)
    assert FileDigests(store).of(file) == of_bytes(b"one")


def test_a_store_that_cannot_be_written_costs_a_read(tmp_path: Path) -> None:
    write(tmp_path / "file", b"one", mtime=1)
    digests = FileDigests(tmp_path / "file" / "digests.jsonl")
    assert digests.of(tmp_path / "file") == of_bytes(b"one")


def test_several_files_are_told_by_names_and_contents_not_by_place_or_time(tmp_path: Path) -> None:
    for folder, time in (("here", 1), ("there", 2)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a", b"one", mtime=time)
        write(tmp_path / folder / "b", b"two", mtime=time)
    digests = FileDigests(tmp_path / "digests.jsonl")

    def of(folder: str, **names: str) -> str:
        return digests.of_all({name: tmp_path / folder / file for name, file in names.items()})

    assert of("here", a="a", b="b") == of("there", a="a", b="b")
    assert of("here", a="a", b="b") != of("here", a="b", b="a") != of("here", a="b", c="a")
    before = of("here", a="a")
    write(tmp_path / "here" / "a", b"new", mtime=3)
    assert of("here", a="a") != before


def test_what_one_store_knows_another_learns(tmp_path: Path) -> None:
    one, other = FileDigests(tmp_path / "one"), FileDigests(tmp_path / "other")
    one.keep("state", "contents")
    other.learn_from(one)
    assert FileDigests(tmp_path / "other").recall("state") == "contents"
    assert other.recall("another state") is None
