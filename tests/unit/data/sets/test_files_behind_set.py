"""Which files a set stands for, whatever its layout."""

from pathlib import Path

import pytest
from tiny_sets import folder_set, tar_set

from clip_cid.data.sets.files_behind import files_behind_set


def names(root: Path, *, trained: bool = True) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_behind_set(str(root), trained=trained)]


def test_a_set_of_tars_stands_for_its_tars_class_names_prompts_and_counts(tmp_path: Path) -> None:
    root = tar_set(tmp_path / "colors", splits=("test",))
    assert names(root) == [
        "classnames.txt",
        "test/0.tar",
        "test/nshards.txt",
        "zeroshot_classification_templates.txt",
    ]


def test_a_set_of_folders_stands_for_every_image_also_behind_links(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "colors", each=1, splits=("test",))
    (tmp_path / "elsewhere").mkdir()
    (root / "test" / "red_thing").rename(tmp_path / "elsewhere" / "red")
    (root / "test" / "red_thing").symlink_to(tmp_path / "elsewhere" / "red")
    (root / "templates.txt").write_text("{c}")
    images = [f"test/{name}/0.jpg" for name in ("blue_thing", "green_thing", "red_thing")]
    assert names(root) == ["templates.txt", *images]


def test_a_link_back_up_does_not_make_a_set_endless(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "colors", each=1, splits=("test",))
    before = names(root)
    (root / "test" / "again").symlink_to(root)
    assert names(root) == before


def test_hidden_files_and_broken_links_are_no_part_of_a_set(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "colors", each=1, splits=("test",))
    before = names(root)
    (root / ".DS_Store").write_text("x")
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text("x")
    (root / "test" / "gone.jpg").symlink_to(tmp_path / "gone")
    assert names(root) == before


def test_training_images_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    root = folder_set(tmp_path / "colors", each=1)
    assert {name.partition("/")[0] for name in names(root, trained=False)} == {"test"}
    assert {name.partition("/")[0] for name in names(root)} == {"test", "train"}


@pytest.mark.parametrize("where", ["builtin:digits", "https://example.org/set/tree/main", "/gone", ""])
def test_what_is_no_folder_stands_for_no_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files_behind_set(where) == []
