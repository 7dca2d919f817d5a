import errno
import os
from pathlib import Path

import pytest

from clip_cid.errors import RunError
from clip_cid.new_folder import drop_left, new_folder, refuse_foreign
from clip_cid.run_folder import own_host

pytestmark = pytest.mark.resume

DEAD = f"{own_host()}-{2**22 + 1}-0123abcd"  # above every number that Linux gives


def fill(out: Path, words: str) -> None:
    with new_folder(out) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text(words)
        if not words:
            raise RuntimeError("cut short")


def is_marked(folder: Path) -> bool:
    return (folder / "mark").is_file()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_takes_the_place_of_another(tmp_path: Path):
    for words in ("one", "two"):
        fill(tmp_path / "new" / "out", words)
        assert (tmp_path / "new" / "out" / "inner" / "file").read_text() == words
    assert names(tmp_path / "new") == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path):
    fill(tmp_path / "out", "one")
    with pytest.raises(RuntimeError, match="cut short"):
        fill(tmp_path / "out", "")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_the_folder_before_comes_back_if_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "out", "one")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if ".part-" in source.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=f"error: '{tmp_path / 'out'}'"):
        fill(tmp_path / "out", "two")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_every_file_and_folder_is_synced_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    fill(tmp_path / "out", "one")
    parts = [Path(path).relative_to(tmp_path).parts for path in synced]
    assert [part[1:] for part in parts] == [("inner", "file"), ("inner",), (), ()]
    assert [part[0].partition(".part-")[0] for part in parts if part] == [".out"] * 3


def test_only_what_dead_processes_have_left_of_this_name_is_removed(tmp_path: Path):
    mine = f"{own_host()}-{os.getpid()}-0123abcd"
    kept = [f".out.part-{mine}", f".other.part-{DEAD}", f".out.part-elsewhere-{2**22 + 1}-0123abcd", ".out.part", "out"]
    for name in (*kept, f".out.part-{DEAD}", f".out.old-{DEAD}"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / f".out.tmp-{DEAD}").touch()
    drop_left(tmp_path / "out")
    assert names(tmp_path) == sorted(kept)


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for words in ("one", "two"):
        fill(tmp_path / "out", words)
        assert (tmp_path / "disk" / "out" / "inner" / "file").read_text() == words
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["out"]


def test_only_a_folder_of_the_same_kind_without_files_of_others_may_be_replaced(tmp_path: Path):
    def refuse(out: Path) -> None:
        refuse_foreign(out, "a thing", is_one=is_marked, names={"mark", "part"})

    out = tmp_path / "out"
    refuse(out)
    out.mkdir()
    refuse(out)
    (out / "part").touch()
    with pytest.raises(RunError, match="out: exists and is not a thing"):
        refuse(out)
    (out / "mark").touch()
    refuse(out)
    for name in (".git", "a", "b", "c"):
        (out / name).touch()
    with pytest.raises(RunError, match=r"would be replaced, but holds \.git, a, b and 1 more too"):
        refuse(out)
    with pytest.raises(RunError, match="mark: exists and is not a thing"):
        refuse(out / "mark")


def test_no_folder_of_a_stage_is_a_place_for_one(tmp_path: Path):
    stage = tmp_path / "run" / "distill"
    stage.mkdir(parents=True)
    refuse_foreign(stage / "student", "a thing", is_one=is_marked, names={"mark"})  # no run's: a name only
    (stage / "manifest.json").touch()
    for out in (stage / "student", stage / "student" / "deeper"):
        with pytest.raises(RunError, match="is in the folder of a stage"):
            refuse_foreign(out, "a thing", is_one=is_marked, names={"mark"})
    refuse_foreign(tmp_path / "run" / "student", "a thing", is_one=is_marked, names={"mark"})
