"""Pairs are known again by what they hold: moved or touched they are the same, edited at equal size they are not."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clip_cid.data.pairs.contents import contents_of_pairs, read_contents, state_of_pairs
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.file_digests import FileDigests
from clip_cid.recipe import PairsConfig


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "bmp")  # of equal size for every shade
    buffer.seek(0)
    return buffer.read()


def make_folder(root: Path) -> Path:
    root.mkdir(parents=True)
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(picture(number))
        (root / f"{number}.txt").write_text(f"caption {number}")
    return root


def make_table(root: Path) -> Path:
    make_folder(root)
    rows = "".join(f"{number}.jpg,caption {number}\n" for number in range(3))
    (root / "pairs.csv").write_text("image,caption\n" + rows)
    return root / "pairs.csv"


def make_tar(root: Path) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "0.tar", "w") as tar:
        for number in range(3):
            for name, data in ((f"{number}.jpg", picture(number)), (f"{number}.txt", b"caption %d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root / "0.tar"


def replace_in(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert (content.count(old), len(old)) == (1, len(new))
    path.write_bytes(content.replace(old, new))


FORMATS = [make_folder, make_table, make_tar]
Make = Callable[[Path], Path]


def contents(path: Path, run: Path) -> str:
    settings = PairsConfig(source=(str(path),))
    return contents_of_pairs(settings, FileDigests(run / "digests"), index=run / "index", cache_dir=None)


def state(path: Path, run: Path) -> str:
    return state_of_pairs(PairsConfig(source=(str(path),)), index=run / "index", cache_dir=None)


@pytest.mark.parametrize("make", FORMATS)
def test_touched_or_moved_pairs_are_the_same(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "data")
    before, before_state = contents(source, tmp_path), state(source, tmp_path)
    for file in (tmp_path / "data").iterdir():
        os.utime(file, ns=(1, 1))
    assert state(source, tmp_path) != before_state
    assert contents(source, tmp_path) == before

    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / source.relative_to(tmp_path / "data")
    assert contents(moved, tmp_path) == before


@pytest.mark.parametrize(
    ("make", "file", "old", "new"),
    [
        (make_folder, "1.txt", b"caption 1", b"caption 9"),
        (make_folder, "1.jpg", picture(1)[-16:], picture(9)[-16:]),
        (make_table, "pairs.csv", b"caption 1", b"caption 9"),
        (make_table, "1.jpg", picture(1)[-16:], picture(9)[-16:]),
        (make_tar, "0.tar", b"caption 1", b"caption 9"),
        (make_tar, "0.tar", picture(1), picture(9)),
    ],
)
def test_an_edit_of_equal_size_changes_the_contents(
    make: Make, file: str, old: bytes, new: bytes, tmp_path: Path
) -> None:
    source = make(tmp_path / "data")
    before = contents(source, tmp_path)
    path = tmp_path / "data" / file
    path.write_bytes(path.read_bytes()[: -len(old)] + new) if file.endswith("jpg") else replace_in(path, old, new)
    os.utime(path, ns=(1, 1))
    assert contents(source, tmp_path) != before


@pytest.mark.parametrize("make", FORMATS)
def test_an_image_behind_a_link_counts_as_what_it_points_to(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "data")
    before = contents(source, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    linked = tmp_path / "link" / source.relative_to(tmp_path / "data")
    assert contents(linked, tmp_path) == before


def test_what_is_known_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "data")
    before = contents(source, tmp_path)
    monkeypatch.setattr("clip_cid.data.pairs.contents.read_contents", lambda *_: pytest.fail("read again"))
    assert contents(source, tmp_path) == before


def test_one_edited_shard_changes_its_own_contents_only(tmp_path: Path) -> None:
    for name in "abc":
        make_tar(tmp_path / name)
    settings = PairsConfig(source=tuple(str(tmp_path / name / "0.tar") for name in "abc"), max_bad_share=1)
    digests = FileDigests(tmp_path / "digests")

    def of_shards() -> list[str]:
        return read_contents(open_pairs(settings, index=tmp_path / "index"), digests)

    before = of_shards()
    replace_in(tmp_path / "b" / "0.tar", b"caption 1", b"caption 9")
    os.utime(tmp_path / "b" / "0.tar", ns=(1, 1))
    after = of_shards()
    assert (after[0], after[2]) == (before[0], before[2])
    # The keys of b repeat those of a, so none of its rows is used, whatever their captions are.
    assert after[1] == before[1]
    replace_in(tmp_path / "a" / "0.tar", b"caption 2", b"caption 9")
    os.utime(tmp_path / "a" / "0.tar", ns=(1, 1))
    assert of_shards()[0] != before[0]
