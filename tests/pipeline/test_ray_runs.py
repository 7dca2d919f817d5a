"""Stages on Ray nodes: the same bytes as in one process, whatever dies meanwhile."""

import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import processes
import pytest
import ray_clusters
from PIL import Image

from clip_cid import cli, engine, extras, ray_tasks
from clip_cid.data.embeddings import from_pairs
from clip_cid.data.pairs import index
from clip_cid.evaluation import features
from clip_cid.file_digests import sha256_file
from clip_cid.method.balance import plan_choice
from clip_cid.method.cluster import range_tasks
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(extras.absent(extras.RAY)), reason="needs clip-cid[ray]"),
]
LEAST_CHUNK = 20
LEAST_ROWS = 40
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    rows = oracles.unit(rng.standard_normal((160, 12)))
    rows[100:] = oracles.unit(rows[:60] + rng.choice([0, 0.02, 0.1], (60, 1)) * rng.standard_normal((60, 12)))
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, rows.astype(np.float16))
    return str(path)


@pytest.fixture
def balance(rows, tmp_path, monkeypatch) -> Callable[..., dict[str, str]]:
    """Runs the stage in a folder of this name; returns the digests of its results."""
    monkeypatch.setattr(plan_choice, "_LEAST_CHUNK", LEAST_CHUNK)

    def balance(name: str, *flags: str) -> dict[str, str]:
        assert cli.main(["balance", str(tmp_path / name), "--embeddings", rows, *flags]) == 0
        return digests(tmp_path / name / "balance")

    return balance


@pytest.fixture
def cluster(rows, tmp_path, monkeypatch) -> Callable[..., dict[str, str]]:
    """As `balance`, of clusters."""
    monkeypatch.setattr(range_tasks, "_LEAST_ROWS", LEAST_ROWS)
    monkeypatch.setattr(range_tasks, "_ROWS_PER_CENTER", 0)

    def cluster(name: str, *flags: str) -> dict[str, str]:
        assert cli.main(["cluster", str(tmp_path / name), *clustering(rows), *flags]) == 0
        return digests(tmp_path / name / "cluster")

    return cluster


def clustering(rows: str) -> list[str]:
    """The flags: 64 centers, which start in groups."""
    np.save(kept := Path(rows).with_name("kept.npy"), np.arange(160))
    return ["--embeddings", rows, "--kept", str(kept), "--cluster.num-centers", "64", "--cluster.iterations", "3"]


@pytest.fixture(scope="module")
def embedding(tmp_path_factory) -> list[str]:
    """The flags that name pairs in six shards, one image of which is broken, and a tiny teacher."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for shard in range(6):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(3):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(image, "PNG")
                broken = (shard, row) == (2, 1)
                add(tar, f"{shard}-{row}.png", b"no image" if broken else image.getvalue())
                add(tar, f"{shard}-{row}.txt", f"picture {row} of {shard}".encode())
    (folder / "tiny.json").write_text(json.dumps(TINY))
    clip = build_student(str(folder / "tiny.json"), embed_dim=None, seed=0)
    export_student(clip, folder / "teacher", head_state={}, provenance={})
    flags = ["--pairs.source", f"{folder}/{{0..5}}.tar", "--pairs.max-bad-share", "0.5", "--machine.workers", "0"]
    return [*flags, "--embed.teacher", f"local-dir:{folder / 'teacher'}", "--machine.device", "cpu"]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def embed(embedding, tmp_path) -> Callable[..., dict[str, str]]:
    """Runs the stage in a folder of this name; returns the digests of its results."""

    def embed(name: str, *flags: str) -> dict[str, str]:
        assert cli.main(["embed", str(tmp_path / name), *embedding, *flags]) == 0
        return digests(tmp_path / name / "embed")

    return embed


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


@pytest.fixture
def after(monkeypatch) -> Callable[[int, Callable[[], Any]], None]:
    """Has something done when a command has finished so many tasks."""
    original = engine.run_tasks

    def after(count: int, act: Callable[[], Any]) -> None:
        def run_tasks(tasks: Any, begin: Any, *, on_done: Callable[[Any], Any], **rest: Any) -> None:
            def counting(task: Any) -> None:
                nonlocal count
                count -= 1
                if count == 0:
                    act()
                on_done(task)

            original(tasks, begin, on_done=counting, **rest)

        monkeypatch.setattr(engine, "run_tasks", run_tasks)

    return after


@pytest.fixture(scope="module")
def nodes():
    with ray_clusters.cluster(1) as nodes:
        yield nodes


def test_balance_leaves_the_same_bytes_on_any_number_of_nodes(balance, nodes):
    here = balance("here")
    for count in (1, 2, 3):
        ray_clusters.grow(nodes, count)
        assert balance(f"on {count}", "--ray", nodes.address) == here


@pytest.mark.resume
def test_balance_leaves_the_same_bytes_when_a_process_and_then_a_node_dies(balance, nodes, after):
    ray_clusters.grow(nodes, 3)
    after(3, lambda: os.kill(ray_clusters.workers(nodes)[0], signal.SIGKILL))
    killed = balance("process", "--ray", nodes.address)
    after(3, lambda: nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False))
    assert balance("node", "--ray", nodes.address) == killed == balance("here")


@pytest.mark.resume
def test_clusters_have_the_same_bytes_on_1_and_2_nodes_and_when_a_process_and_then_a_node_dies(cluster, nodes, after):
    here = cluster("here")
    for count in (1, 2):
        ray_clusters.grow(nodes, count)
        assert cluster(f"on {count}", "--ray", nodes.address) == here
    after(12, lambda: os.kill(ray_clusters.workers(nodes)[0], signal.SIGKILL))
    assert cluster("process", "--ray", nodes.address) == here
    after(12, lambda: nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False))
    assert cluster("node", "--ray", nodes.address) == here


@pytest.mark.resume
def test_embed_leaves_the_same_bytes_when_a_process_and_then_a_node_dies(embed, nodes, after, tmp_path, monkeypatch):
    ray_clusters.grow(nodes, 3)
    here = embed("here")
    write = index._write
    monkeypatch.setattr(index, "_write", lambda path, *rest: write(path, *rest) if "known-bad" in path.name else 1 / 0)
    monkeypatch.setattr(from_pairs, "_begin", lambda *_: 1 / 0)  # neither is done in this process
    after(2, lambda: os.kill(ray_clusters.workers(nodes)[0], signal.SIGKILL))
    assert embed("process", "--ray", nodes.address) == here
    after(2, lambda: nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False))
    assert embed("node", "--ray", nodes.address) == here
    assert not (tmp_path / "node" / "embed" / "work").exists()


def test_evaluate_finds_the_features_that_nodes_have_computed(embedding, nodes, tmp_path, monkeypatch):
    ray_clusters.grow(nodes, 2)
    model = embedding[embedding.index("--embed.teacher") + 1]
    flags = ["--model", model, "--evaluate.sets", "digits", "builtin:digits", "--machine.device", "cpu"]
    flags += ["--machine.workers", "0", "--evaluate.no-linear-probe"]
    assert cli.main(["evaluate", str(tmp_path / "here"), *flags]) == 0
    monkeypatch.setattr(features.Encoder, "_compute", None)  # in this process
    assert cli.main(["evaluate", str(tmp_path / "ray"), *flags, "--ray", nodes.address]) == 0
    for folder in ("evaluate", "features"):
        assert digests(tmp_path / "ray" / folder) == digests(tmp_path / "here" / folder)


def killed(left: int, command: list[str]) -> None:
    """The command, in a process that is killed when it is told of so many tasks."""
    plan_choice._LEAST_CHUNK = LEAST_CHUNK
    range_tasks._LEAST_ROWS, range_tasks._ROWS_PER_CENTER = LEAST_ROWS, 0
    original = ray_tasks.run_tasks

    def killing(tasks: Any, begin: Any, *, on_done: Any, **rest: Any) -> None:
        def counting(task: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        original(tasks, begin, on_done=counting, **rest)

    ray_tasks.run_tasks = killing
    cli.main(command)


@pytest.mark.resume
def test_a_killed_command_on_ray_goes_on_with_the_tasks_that_are_missing(balance, nodes, rows, tmp_path, capsys):
    ray_clusters.grow(nodes, 2)
    command = ["balance", str(tmp_path / "cut"), "--embeddings", rows, "--ray", nodes.address]
    assert processes.exit_code(killed, 5, command) == -signal.SIGKILL
    assert balance("cut", "--ray", nodes.address) == balance("here")
    assert "tasks were done before" in capsys.readouterr().err


@pytest.mark.resume
def test_a_killed_clustering_on_ray_goes_on_with_the_tasks_that_are_missing(cluster, nodes, rows, tmp_path):
    ray_clusters.grow(nodes, 2)
    command = ["cluster", str(tmp_path / "cut"), *clustering(rows), "--ray", nodes.address]
    for tasks in (2, 14):  # in the start, and in a round
        assert processes.exit_code(killed, tasks, command) == -signal.SIGKILL
    assert cluster("cut", "--ray", nodes.address) == cluster("here")
    assert "tasks were done before" in (tmp_path / "cut" / "run.log").read_text()


@pytest.mark.resume
def test_a_killed_embed_on_ray_goes_on_there_or_on_this_machine(embed, embedding, nodes, tmp_path):
    ray_clusters.grow(nodes, 2)
    for name, flags in (("there", ["--ray", nodes.address]), ("in one process", ["--machine.ray", "None"])):
        command = ["embed", str(tmp_path / name), *embedding, "--ray", nodes.address]
        assert processes.exit_code(killed, 3, command) == -signal.SIGKILL
        assert len(list((tmp_path / name / "embed.part" / "work" / "shards").glob("[0-9a-f]*"))) >= 2
        assert embed(name, *flags) == embed("here")


def losing(servers: list[int], command: list[str], said: Path) -> None:
    """The command, in a process that kills these servers when it is told of eight tasks; what it says is in a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    range_tasks._LEAST_ROWS, range_tasks._ROWS_PER_CENTER = LEAST_ROWS, 0
    original, left = ray_tasks.run_tasks, 8

    def watching(tasks: Any, begin: Any, *, on_done: Any, **rest: Any) -> None:
        def counting(task: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                for server in servers:
                    os.kill(server, signal.SIGKILL)
            on_done(task)

        original(tasks, begin, on_done=counting, **rest)

    ray_tasks.run_tasks, ray_tasks._WITHOUT_HEAD_SECONDS = watching, 1.0
    sys.exit(cli.main(command))


@pytest.mark.resume
def test_a_head_node_that_dies_is_told_in_two_lines_and_the_same_command_goes_on_without(cluster, rows, tmp_path):
    run, stderr = tmp_path / "run", tmp_path / "stderr.txt"
    with ray_clusters.cluster(1) as nodes:
        kinds = nodes.head_node.all_processes
        servers = [server.process.pid for kind in ("gcs_server", "raylet") for server in kinds[kind]]
        command = ["cluster", str(run), *clustering(rows), "--ray", nodes.address]
        assert processes.exit_code(losing, servers, command, stderr) == 1
    said = stderr.read_text().splitlines()
    assert "the head node of this Ray cluster does not answer any more" in said[-2]
    assert "run the same command again; finished tasks are kept" in said[-1]
    assert cluster("run", "--machine.ray", "None") == cluster("here")


def test_the_command_line_names_what_is_wrong_in_two_lines_and_the_same_command_goes_on(
    balance, rows, tmp_path, capsys
):
    run = str(tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["balance", run, "--embeddings", rows, "--ray", f"127.0.0.1:{processes.free_port()}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "no Ray cluster at 127.0.0.1" in said[-2]
    assert "run the same command again" in said[-1]
    assert balance("run", "--machine.ray", "None") == balance("here")
    assert Path(run, "balance").is_dir()
