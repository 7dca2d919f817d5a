"""Processes of several hosts: each has its own view of the files, and one of them may be refused."""

import builtins
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torchrun_recipes import BEFORE, TEACHER

from clip_cid import cli
from clip_cid.run_folder import RunFolder
from clip_cid.training.ranks import distributed

COMMON = {"student": "cid-tiny", "batch_size": 8, "steps": 6, "warmup_steps": 1, "log_every": 1, "alignment": "linear"}
STUDENTS = {
    "a head that learns": {**COMMON, "head_lr": 1e-3, "sample_rate": 0.5},
    "soft centers, several labels, the best": {
        **COMMON,
        "head_lr": 0.0,
        "sample_rate": 1.0,
        "labels": 2,
        "validation": {"share": 0.3, "every": 16, "keep": "best"},
    },
}
FORGETS = 3.0  # seconds until a host looks again for what was not there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `earlier`, whose stages before distill are done."""
    path = tmp_path_factory.mktemp("hosts")
    (path / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    for number, distill in enumerate(STUDENTS.values()):
        (path / f"student-{number}.yaml").write_text(yaml.safe_dump({**BEFORE, "distill": distill}))
    before = Path.cwd()
    os.chdir(path)
    try:
        assert cli.main(["sample", "data", "--pairs", "60"]) == 0
        assert cli.main(["run", "teacher", "--recipe", "teacher.yaml"]) == 0
        for stage in ("embed", "balance", "cluster"):
            assert cli.main([stage, "earlier", "--recipe", "student-0.yaml"]) == 0
    finally:
        os.chdir(before)
    return path


def start_both(
    folders: tuple[Path, Path], words: Path, *arguments: str, prepare: Callable[[int], None] | None = None
) -> tuple[list[int | None], list[str]]:
    """The exit codes of both, and what each says: a process in each folder, as on a host of its own."""
    port = processes.free_port()
    ranks = [
        processes.start(command, rank, port, folders[rank], words / f"{rank}", arguments, prepare) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.join(processes.PATIENCE)
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks], [(words / f"{rank}").read_text() for rank in (0, 1)]


def command(rank: int, port: int, folder: Path, words: Path, arguments: tuple[str, ...], prepare: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    with open(words, "w") as handle:
        os.dup2(handle.fileno(), sys.stdout.fileno())
        os.dup2(handle.fileno(), sys.stderr.fileno())
    if prepare is not None:
        prepare(rank)
    sys.exit(cli.main(list(arguments)))


def lines_of_errors(said: str) -> list[str]:
    """The line that tells an error, and the one below."""
    lines = said.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("clip-cid: "))
    assert "Traceback" not in said
    return lines[at : at + 2]


def test_a_refusal_by_the_main_process_is_told_by_all(work: Path, tmp_path: Path):
    """Before, the others waited for six hours."""
    shutil.copytree(work / "earlier", work / "stale")
    shutil.rmtree(work / "stale" / "balance")
    codes, said = start_both((work, work), tmp_path, "distill", "stale", "--recipe", "student-0.yaml")
    assert codes == [1, 1]
    (problem, fix), (told, same_fix) = map(lines_of_errors, said)
    assert problem == "clip-cid: stale: distill needs balance, which is missing (has not run yet)."
    assert told.startswith("clip-cid: rank 0 on ")
    assert told.endswith(f" has ended: {problem.removeprefix('clip-cid: ')}")
    assert fix == same_fix == "Run `clip-cid balance stale` first, or `clip-cid run stale` for all."
    assert not (work / "stale" / "distill.part").exists()


def test_the_recipe_of_the_run_is_read_by_the_main_process_for_all(work: Path, tmp_path: Path):
    """A host on which the run folder lies elsewhere has none, and says why it cannot take part."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    shutil.copytree(work / "earlier", work / "unshared")
    codes, said = start_both((work, elsewhere), tmp_path, "distill", "unshared", prepare=lose_patience)
    assert codes == [1, 1]
    for told, fix in map(lines_of_errors, said):
        assert "unshared: rank 1 on " in told
        assert "does not see what rank 0 on " in told
        assert fix.startswith("The run folder must be a shared one: ")
    assert not list((work / "unshared").rglob(".shared*"))
    assert list(elsewhere.iterdir()) == []


def test_a_copy_of_the_run_folder_is_not_a_shared_one(work: Path, tmp_path: Path):
    shutil.copytree(work, tmp_path / "copy")
    shutil.copytree(work / "earlier", work / "copied")
    shutil.copytree(work / "earlier", tmp_path / "copy" / "copied")
    codes, said = start_both((work, tmp_path / "copy"), tmp_path, "distill", "copied", prepare=lose_patience)
    assert codes == [1, 1]
    for told, _ in map(lines_of_errors, said):
        assert "copied: rank 1 on " in told


def lose_patience(_rank: int) -> None:
    distributed._UNSEEN_SECONDS = 0.5


def test_a_refusal_by_another_process_is_told_by_all(work: Path, tmp_path: Path):
    """Its recipe is not there."""
    shutil.copytree(work / "earlier", work / "without")
    shutil.copytree(work, tmp_path / "lacks", ignore=shutil.ignore_patterns("*.yaml"))
    arguments = ("distill", "without", "--recipe", "student-0.yaml")
    codes, said = start_both((work, tmp_path / "lacks"), tmp_path, *arguments)
    assert codes == [1, 2]
    assert "student-0.yaml" in lines_of_errors(said[1])[0]
    assert lines_of_errors(said[0])[0].startswith("clip-cid: rank 1 on ")
    assert "student-0.yaml" in lines_of_errors(said[0])[0]


@pytest.mark.parametrize("number", range(len(STUDENTS)), ids=list(STUDENTS))
def test_a_host_that_remembers_what_was_absent_trains_the_same_student(work: Path, tmp_path: Path, number: int):
    """As NFS does for up to a minute: here another host has looked for all that the training is about to make."""
    arguments = ("--recipe", f"student-{number}.yaml")
    for run, prepare in ((f"plain-{number}", None), (f"absent-{number}", remember_absences)):
        shutil.copytree(work / "earlier", work / run)
        codes, said = start_both((work, work), tmp_path, "distill", run, *arguments, prepare=prepare)
        assert codes == [0, 0], said
    ours, theirs = (
        load_file(work / f"{run}-{number}" / "distill" / "student" / "open_clip_model.safetensors")
        for run in ("absent", "plain")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    record = RunFolder(work / f"absent-{number}").record("distill")
    assert record is not None
    assert record.summary["processes"] == 2


def remember_absences(rank: int) -> None:
    """What the second process has once not found in a run folder is not there for it, for a while."""
    if rank == 0:
        return
    absent: dict[str, float] = {}

    def refuse(path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path))
        for one in (name, *map(str, Path(name).parents)):
            if time.monotonic() - absent.get(one, -FORGETS) < FORGETS:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def remembering(call: Callable[..., Any]) -> Callable[..., Any]:
        def looked_for(path: Any, *more: Any, **named: Any) -> Any:
            if isinstance(path, int) or "absent-" not in os.path.abspath(os.fsdecode(path)):
                return call(path, *more, **named)
            refuse(path)
            try:
                return call(path, *more, **named)
            except FileNotFoundError:
                absent[os.path.abspath(os.fsdecode(path))] = time.monotonic()
                raise

        return looked_for

    for owner, name in ((os, "stat"), (os, "lstat"), (os, "scandir"), (os, "listdir"), (os, "open"), (io, "open")):
        setattr(owner, name, remembering(getattr(owner, name)))
    builtins.open = io.open
    for run in Path.cwd().glob("absent-*"):
        for made in ("", "skipped.jsonl", "metrics.jsonl", "checkpoints", "soft_centers", "labels"):
            (run / "distill.part" / made).exists()
