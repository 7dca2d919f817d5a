"""Two processes under torchrun, through the command line, as a user starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import network_namespaces
import open_clip
import processes
import pytest
import torch
import torch.distributed as dist
import yaml
from network_namespaces import INTERFACE, Host
from safetensors.torch import load_file
from torchrun_recipes import BEFORE, TEACHER

from clip_cid import cli
from clip_cid.run_folder import RunFolder

STEPS = 24
STUDENT = {
    **BEFORE,
    "distill": {
        "student": "cid-tiny",
        "batch_size": 8,
        "steps": STEPS,
        "warmup_steps": 1,
        "log_every": 1,
        "head_lr": 1e-3,
        "sample_rate": 0.5,
        "alignment": "linear",
    },
}
PATIENCE = 120  # seconds until hanging processes are ended
HOSTS_PATIENCE = 400  # beyond the 90 seconds of the meeting; six hours were the fault
STAGE_FILES = ("student/open_clip_model.safetensors", "student/cid_head.safetensors", "metrics.jsonl")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose stages before distill are done."""
    path = tmp_path_factory.mktemp("torchrun")
    (path / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    (path / "student.yaml").write_text(yaml.safe_dump(STUDENT))
    before = Path.cwd()
    os.chdir(path)
    try:
        assert cli.main(["sample", "data", "--pairs", "60"]) == 0
        assert cli.main(["distill", "teacher", "--recipe", "teacher.yaml"]) == 0
        for stage in ("embed", "balance", "cluster"):
            assert cli.main([stage, "earlier", "--recipe", "student.yaml"]) == 0
    finally:
        os.chdir(before)
    return path


def torchrun(work: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "clip_cid", *arguments],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and all that was said."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill_all(process.pid)
    return process.returncode, said


def kill_all(pid: int) -> None:
    """`kill -9` of a process and of all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    numbers = [int(number) for number in children.read_text().split()] if children.exists() else []
    for number in (pid, *numbers):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def start(work: Path, run: str) -> tuple[int, str]:
    return finished(torchrun(work, "distill", run, "--recipe", "student.yaml"))


@pytest.fixture(scope="module")
def joint(work: Path) -> tuple[int, str]:
    """A run that two processes have finished."""
    shutil.copytree(work / "earlier", work / "joint")
    return start(work, "joint")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_leave_one_student_one_record_and_one_set_of_words(work: Path, joint: tuple[int, str]):
    code, said = joint
    assert code == 0, said
    folder = work / "joint" / "distill"
    assert [line["step"] for line in lines_of(folder)] == [*range(1, STEPS + 1)]
    record = RunFolder(work / "joint").record("distill")
    assert record is not None
    assert record.summary["processes"] == 2
    model: Any = open_clip.create_model_and_transforms(f"local-dir:{folder / 'student'}")[0]
    assert model.encode_image(torch.zeros(1, 3, *([model.visual.image_size[0]] * 2))).shape[0] == 1
    for words in ("distill   missing", "centers likely for an image", "steps, ", "clip_benchmark eval", "pairs seen"):
        assert said.count(words) == 1, f"{words}: {said}"
    assert "Traceback" not in said


def test_it_is_the_student_of_one_process(work: Path, joint: tuple[int, str], monkeypatch: pytest.MonkeyPatch):
    """And all that was learned beside it, the rows of the head that the two had between them included."""
    monkeypatch.chdir(work)
    shutil.copytree("earlier", "alone")
    assert cli.main(["distill", "alone", "--recipe", "student.yaml"]) == 0
    for name in STAGE_FILES[:2]:
        ours, theirs = (load_file(Path(run, "distill", name)) for run in ("joint", "alone"))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                ours[key], value, rtol=0.02, atol=2e-3, msg=lambda text, key=key: f"{key} {text}"
            )
    assert load_file("joint/distill/student/cid_head.safetensors")["head.weight"].shape[0] == 8
    for mine, other in zip(lines_of(Path("joint/distill")), lines_of(Path("alone/distill")), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_a_second_start_finds_it_up_to_date(work: Path, joint: tuple[int, str]):
    before = {path: path.stat().st_mtime_ns for path in (work / "joint" / "distill").rglob("*")}
    code, said = start(work, "joint")
    assert code == 0, said  # torchrun's is 0 only if every process ends with 0
    assert said.count("up to date") == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def start_ranks(work: Path, words: Path) -> list[BaseProcess]:
    """What torchrun starts, without it."""
    port = processes.free_port()
    return [processes.start(distill_as_rank, rank, port, work, words) for rank in range(2)]


def distill_as_rank(rank: int, port: int, work: Path, words: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(work)
    with open(words, "a") as handle:
        os.dup2(handle.fileno(), sys.stdout.fileno())
        os.dup2(handle.fileno(), sys.stderr.fileno())
    sys.exit(cli.main(["distill", "killed", "--recipe", "student.yaml"]))


@pytest.mark.resume
def test_all_killed_in_the_middle_the_same_command_goes_on_to_the_same_weights(work: Path, joint: tuple[int, str]):
    shutil.copytree(work / "earlier", work / "killed")
    ranks = start_ranks(work, work / "first words")
    checkpoints, deadline = work / "killed" / "distill.part" / "checkpoints", time.monotonic() + PATIENCE
    while not list(checkpoints.glob("step-00000[5-9].pt")) and time.monotonic() < deadline:
        assert all(rank.is_alive() for rank in ranks), (work / "first words").read_text()
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not (work / "killed" / "distill").exists()
    reached = max(int(path.stem[5:]) for path in checkpoints.glob("step-*.pt"))
    assert 5 <= reached < STEPS
    ranks = start_ranks(work, work / "second words")
    for rank in ranks:
        rank.join(PATIENCE)
        rank.kill()
    said = (work / "second words").read_text()
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert "; resuming" in said
    assert said.count("resuming after step") == 1
    for name in STAGE_FILES[:2]:
        ours, theirs = ((work / run / "distill" / name) for run in ("killed", "joint"))
        mine, others = load_file(ours), load_file(theirs)
        assert [key for key, value in mine.items() if not torch.equal(value, others[key])] == []
    ours, theirs = ([line["loss"] for line in lines_of(work / run / "distill")] for run in ("killed", "joint"))
    assert ours == theirs


REFUSAL = "torchrun has started several processes, but only the distill stage can use them."


def test_what_is_not_for_several_processes_is_refused(work: Path, joint: tuple[int, str]):
    code, said = finished(torchrun(work, "cluster", "joint"))
    assert code != 0
    assert REFUSAL in said
    assert "exitcode  : 2" in said
    assert "torchrun ... -m clip_cid distill RUN" in said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_whole_run_is_refused_by_every_process(work: Path, monkeypatch: pytest.MonkeyPatch, capsys, rank: str):
    monkeypatch.chdir(work)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", "earlier"]) == 2
    assert REFUSAL in capsys.readouterr().err


# Two hosts that meet by c10d


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if reason := network_namespaces.why_not():
        pytest.skip(reason)
    with network_namespaces.hosts(2) as made:
        yield made


def start_on_each(hosts: list[Host], work: Path, run: str) -> list[subprocess.Popen[str]]:
    """The command of docs/training.md on every host, with a process on each."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29500", "--rdzv-id", run]
    started: list[subprocess.Popen[str]] = []
    for host in hosts:
        here = ["--nnodes", str(len(hosts)), "--nproc-per-node", "1", "--local-addr", host.address]
        here += ["--rdzv-conf", f"is_host={int(host is hosts[0])}"]
        command = [sys.executable, "-m", "torch.distributed.run", *here, *meeting, "-m", "clip_cid", "distill", run]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        started.append(host.start([*command, "--recipe", "student.yaml"], work, environment))
    return started


def finished_on_each(hosts: list[Host], started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The exit code on each host, and what was said there; what hangs is killed."""
    with ThreadPoolExecutor(len(started)) as pool:  # all are read at once, so that none waits for its pipe
        said = [pool.submit(process.communicate) for process in started]
        wait(said, timeout=HOSTS_PATIENCE)
        for host in hosts:
            host.kill()
        return [(process.wait(), one.result()[0]) for process, one in zip(started, said, strict=True)]


@pytest.mark.resume
def test_two_hosts_train_the_student_of_one_also_after_one_of_them_was_killed(
    work: Path, joint: tuple[int, str], hosts: list[Host]
):
    shutil.copytree(work / "earlier", work / "apart")
    started = start_on_each(hosts, work, "apart")
    deadline = time.monotonic() + HOSTS_PATIENCE
    while not list((work / "apart").glob("distill.part/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    hosts[1].kill()
    (code, said), (killed, _) = finished_on_each(hosts, started)
    assert code != 0, said
    assert killed != 0
    assert not (work / "apart" / "distill").exists(), "it was killed before the end"
    assert "lost another process, which was killed or whose machine or network failed" in said

    ends = finished_on_each(hosts, start_on_each(hosts, work, "apart"))
    assert [code for code, _ in ends] == [0, 0], ends
    for name in STAGE_FILES[:2]:
        ours, theirs = ((work / run / "distill" / name).read_bytes() for run in ("apart", "joint"))
        assert ours == theirs, name
    assert [line["step"] for line in lines_of(work / "apart" / "distill")] == [*range(1, STEPS + 1)]


def test_rank_0_that_refuses_ends_the_processes_of_all_hosts(work: Path, hosts: list[Host]):
    """Which took six hours before."""
    shutil.copytree(work / "earlier", work / "refused")
    shutil.rmtree(work / "refused" / "balance")
    refusal = "refused: distill needs balance, which is missing (has not run yet)."
    for code, said in finished_on_each(hosts, start_on_each(hosts, work, "refused")):
        assert code != 0
        assert refusal in said
    assert not (work / "refused" / "distill.part").exists()
