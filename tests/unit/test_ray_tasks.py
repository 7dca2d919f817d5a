import contextlib
import functools
import http.server
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import ray_clusters

from clip_cid import extras, ray_tasks
from clip_cid.errors import ConfigError, DataError, MissingExtraError, RunError

needs_ray = pytest.mark.skipif(bool(extras.absent(extras.RAY)), reason="needs clip-cid[ray]")


@pytest.fixture(scope="module")
def nodes():
    with ray_clusters.cluster(1, 1) as nodes:
        yield nodes


@pytest.fixture
def run(nodes, tmp_path):
    """Runs tasks on two nodes; returns those that it was told of."""

    def run(*names: str, begin=ray_clusters.open_work) -> list[str]:
        told: list[str] = []
        begin = functools.partial(begin, tmp_path)
        ray_tasks.run_tasks(names, begin, address=nodes.address, folder=tmp_path, on_done=told.append)
        return told

    yield run
    ray_tasks.disconnect()


def numbers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.isdecimal()}


@needs_ray
@pytest.mark.slow
def test_every_task_is_done_and_told_once_by_both_nodes_which_open_once(run, tmp_path):
    names = [f"{number} waits" for number in range(9)]
    assert sorted(run(*names)) == sorted(names)
    assert numbers(tmp_path) == {str(number) for number in range(9)}
    workers = {(tmp_path / number).read_text() for number in numbers(tmp_path)}
    assert len(workers) == 2
    assert {path.name for path in tmp_path.glob("begun-*")} == {f"begun-{process}" for process in workers}
    assert not list(tmp_path.glob(".*"))


@needs_ray
@pytest.mark.slow
def test_a_task_whose_process_is_killed_is_done_again(run, tmp_path):
    assert len(run("1", "2 dies once", "3")) == 3
    assert numbers(tmp_path) == {"1", "2", "3"}


@needs_ray
@pytest.mark.slow
def test_a_task_that_hangs_is_handed_out_twice_and_told_once(run, tmp_path):
    assert sorted(run("1", "2 hangs once", "3")) == ["1", "2 hangs once", "3"]
    assert numbers(tmp_path) == {"1", "2", "3"}


class LosesNode:
    """A cluster of two nodes with a core each. The first attempts go to `b`, of which nothing is heard any more."""

    def __init__(self, on_lost: int) -> None:
        self.on_lost, self.alive, self.started, self.first_seconds = on_lost, frozenset("ab"), list[bytes](), 0.0

    def slots(self, gpus: int) -> tuple[int, frozenset[str]]:
        return len(self.alive), self.alive

    def start(self, order: object, task: bytes, gpus: int) -> int:
        self.started.append(task)
        return len(self.started) - 1

    def ended(self, attempts: dict[int, object]) -> list[tuple[int, bytes | None]]:
        here = [attempt for attempt in attempts if attempt >= self.on_lost]
        if not here:
            assert self.alive == frozenset("ab"), "nothing is left to wait for"
            self.alive = frozenset("a")
        return [(attempt, None) for attempt in here]


@pytest.mark.parametrize(("tasks", "on_lost"), [(1, 1), (3, 3), (4, 4), (9, 4), (4, 2)])
def test_what_was_on_a_lost_node_is_handed_out_again_though_ray_says_nothing_of_it(tasks, on_lost):
    """As when the network of a node is cut: all that is in flight may be there, and no task need have ended before."""
    nodes: Any = LosesNode(on_lost)
    order = ray_tasks._Order("", 0.0, "", {}, {}, 1, b"")
    work = ray_tasks._Round(nodes, order, range(tasks), 0)
    assert sorted(work.finished()) == [*range(tasks)]
    assert len(nodes.started) == tasks + on_lost


class Waits(LosesNode):
    """A cluster of two nodes that never loses one: all is done at once but the last task."""

    def __init__(self, first_seconds: float, looks: float) -> None:
        super().__init__(0)
        self.first_seconds, self.looks = first_seconds, looks

    def ended(self, attempts: dict[int, object]) -> list[tuple[int, bytes | None]]:
        self.looks -= 1
        return [(attempt, None) for attempt in attempts if attempt != 3 or self.looks < 0]


@pytest.mark.parametrize(("first_seconds", "looks", "copies"), [(1e-9, math.inf, 1), (600.0, 50, 0)])
def test_a_task_that_waits_for_a_new_process_is_not_late(first_seconds, looks, copies):
    """Its copy would be done first, end that process, and make the next tasks wait for another one."""
    nodes: Any = Waits(first_seconds, looks)
    order = ray_tasks._Order("", 0.0, "", {}, {}, 1, b"")
    assert sorted(ray_tasks._Round(nodes, order, range(4), 0).finished()) == [*range(4)]
    assert len(nodes.started) == 4 + copies


@needs_ray
@pytest.mark.slow
def test_errors_come_back_as_they_were_and_stop_the_rest(run, tmp_path):
    with pytest.raises(DataError) as error:
        run("1 refuses", *(f"{number} waits for 1" for number in range(2, 90)))
    assert (error.value.problem, error.value.fix) == ("Row 1 is broken.", "Embed again.")
    assert len(numbers(tmp_path)) < 60  # those done in the time that the error needs to come back
    with pytest.raises(DataError, match="changed"):
        run("1", "2", begin=ray_clusters.refuse)
    with pytest.raises(RunError, match="memory ran out on node") as memory:
        run("1", "2 takes memory")
    assert "--num-cpus" in memory.value.fix


@needs_ray
@pytest.mark.slow
def test_what_may_be_the_fault_of_a_node_names_it(run, tmp_path):
    with pytest.raises(RunError, match=r"/there/x: the disk is full, seen from node \S+ \(\d+\..*\)") as disk:
        run("1", "2 finds a full disk")
    assert "Finished tasks are kept" in disk.value.fix
    with pytest.raises(DataError, match=r"^node \S+ \(\d+\..*\): s3://bucket/x: access is denied") as bucket:
        run("1", "2 may not read")
    assert bucket.value.fix == "Give it rights."
    with pytest.raises(MissingExtraError, match=r"^node \S+ \(\d+\..*\): s3:// needs an optional part"):
        run("1", "2 lacks an extra")


@needs_ray
@pytest.mark.slow
def test_a_task_that_kills_every_process_is_named(run, tmp_path):
    with pytest.raises(RunError, match=r"task 2 dies: the processes that did it died .* 4 times"):
        run("1", "2 dies")


@needs_ray
@pytest.mark.slow
def test_a_node_of_other_versions_is_named(run, monkeypatch):
    monkeypatch.setattr(ray_tasks, "_versions", lambda: {**original, "numpy": "1.0"})
    with pytest.raises(RunError, match=r"node \S+ \(\d+\..*\) has other versions: numpy \S+, not 1\.0\.") as error:
        run("1", "2")
    assert "finished tasks are kept" in error.value.fix


original = ray_tasks._versions()


@needs_ray
@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_tasks, "_UNSEEN_SECONDS", 0.5)
    monkeypatch.setattr(ray_tasks, "_shared_sign", lambda folder: contextlib.nullcontext(folder / "of another host"))
    with pytest.raises(RunError, match=rf"{tmp_path}: node \S+ \(\d+\..*\) does not see") as error:
        run("1", "2")
    assert "every node has the same folder" in error.value.fix
    assert not numbers(tmp_path)


class OneSeesNothing(LosesNode):
    """A cluster of two nodes: all tasks that the second one gets come back, as it does not see the folder."""

    def __init__(self) -> None:
        super().__init__(0)
        self.warnings: list[str] = []

    def warn_once(self, text: str) -> None:
        self.warnings.append(text)

    def ended(self, attempts: dict[int, object]) -> list[tuple[int, bytes | None]]:
        unseen = ray_tasks._UnseenError(Path("/run"), "second (10.0.0.2)", fix="Share it.")
        return [(attempt, pickle.dumps(unseen) if attempt % 2 else None) for attempt in attempts]


def test_the_tasks_of_a_node_that_does_not_see_the_folder_are_done_by_others_and_it_is_named():
    nodes: Any = OneSeesNothing()
    order = ray_tasks._Order("", 60.0, "", {}, {}, 1, b"")
    assert sorted(ray_tasks._Round(nodes, order, range(9), 0).finished()) == [*range(9)]
    assert {*nodes.warnings} == {
        "/run: node second (10.0.0.2) does not see what the command has written there; other nodes do its tasks"
    }
    with pytest.raises(RunError, match=r"^/run: node second \(10.0.0.2\) does not see .* there\.\nShare it\."):
        list(ray_tasks._Round(nodes, order._replace(patience=0.0), range(9), 0).finished())


@needs_ray
@pytest.mark.slow
def test_a_node_without_the_folder_of_the_command_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_tasks.os, "getcwd", lambda: str(tmp_path / "gone"))
    with pytest.raises(RunError, match=r"gone: the command was started there, and node \S+ \(.*\) has no such folder"):
        run("1", "2")


@pytest.mark.parametrize(
    "address", ["ray://127.0.0.1:10001", "localhost", "http://localhost:8265", "host:port", ":6379"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="no address of a Ray cluster"):
        ray_tasks._address(address)


def test_auto_is_the_cluster_of_this_host_or_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_tasks, "_CURRENT_CLUSTER", tmp_path / "current")
    with pytest.raises(RunError, match="no Ray runs on this host"):
        ray_tasks._address("auto")
    (tmp_path / "current").write_text("10.0.0.1:6379\n")
    assert ray_tasks._address("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6380")
    assert ray_tasks._address("auto") == "10.0.0.2:6380"


def test_an_address_where_no_ray_is_is_refused_at_once():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(RunError, match=rf"no Ray cluster at {address} .something else answers"):
            ray_tasks._look_for_server(address)
        server.shutdown()
    with pytest.raises(RunError, match=rf"no Ray cluster at {address} .*refused"):
        ray_tasks._look_for_server(address)


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "absent", lambda extra: ("ray",))
    ray_tasks._connected.cache_clear()
    with pytest.raises(MissingExtraError) as error:
        ray_tasks.run_tasks([1], lambda: print, address="auto", folder=tmp_path, on_done=id)
    assert error.value.fix == 'pip install "clip-cid[ray]"'
