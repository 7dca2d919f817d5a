"""Stages on three Ray nodes that meet over a network: each has a network namespace of its own, with an address.

The results are compared by SHA-256 with those of one process: undisturbed; when the network of one node is cut; when a
process that does tasks, all processes of a node, or the command is killed (and started again), each after some tasks.
Needs Linux, root and `ip`; removes what it has made.

    python benchmarks/ray_namespaces.py --stages balance cluster embed
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine

_NODES, _PORT, _ATTEMPTS = 3, 6379, 8
_MARK = f"cc{os.getpid()}"  # of names of this process: the system forgets those of an earlier one after a while
BRIDGE = f"{_MARK}b"
INTERFACE = "net0"
_AFTER = {"balance": 5, "cluster": 12, "embed": 3}  # tasks that are done when something happens
_COMMAND = """
import sys, time
from pathlib import Path
from clip_cid import cli, engine
from clip_cid.method.balance import plan_choice
from clip_cid.method.cluster import range_tasks

sign, after, plan_choice._LEAST_CHUNK, range_tasks._LEAST_ROWS = Path(sys.argv[1]), *map(int, sys.argv[2:5])
run_tasks, done, range_tasks._ROWS_PER_CENTER = engine.run_tasks, [], 0

def counting(tasks, begin, *, on_done, **rest):
    def count(task):
        on_done(task)
        done.append(task)
        if len(done) == after:
            sign.touch()
            while sign.exists():  # until it has happened
                time.sleep(0.02)
    run_tasks(tasks, begin, on_done=count, **rest)

engine.run_tasks = counting
sys.exit(cli.main(sys.argv[5:]))
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def name(node: int) -> str:
    return f"{_MARK}n{node}"


def outside(node: int) -> str:
    """The end of its cable."""
    return f"{_MARK}o{node}"


@contextlib.contextmanager
def namespaces() -> Generator[None]:
    """A bridge, and a namespace with an address on it for each node."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for node in range(_NODES):
            ip("netns", "add", name(node))
            ip("link", "add", outside(node), "type", "veth", "peer", "name", INTERFACE, "netns", name(node))
            ip("link", "set", outside(node), "master", BRIDGE, "up")
            ip("-n", name(node), "addr", "add", f"{address(node)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                ip("-n", name(node), "link", "set", device, "up")
        yield
    finally:
        for node in range(_NODES):
            subprocess.run(["ip", "netns", "delete", name(node)], check=False)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def inside(node: int) -> list[int]:
    """The processes of a namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name(node)], check=True, capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def kill(processes: Sequence[int]) -> None:
    for number in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def cluster(environment: dict[str, str], work: Path) -> Generator[None]:
    """A node in each namespace."""
    try:
        for node in range(_NODES):
            start_node(node, environment, work)
        yield
    finally:
        for node in range(_NODES):
            kill(inside(node))


def start_node(
    node: int, environment: dict[str, str], work: Path, *, cores: int = 1, before: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Ray gives a node 30 seconds to start, which beside other work may be too few.

    Args:
        node: Its number; 0 is the head.
        environment: Of its processes.
        work: Where it leaves what it says.
        cores: Tasks at once.
        before: A command that starts the one it is given.
    """
    meets = ["--address", f"{address(0)}:{_PORT}"]
    if node == 0:
        meets = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory", "80000000"]
    command = [*before, *ray, *meets, "--node-ip-address", address(node), "--num-cpus", str(cores)]
    said = work
    for attempt in range(_ATTEMPTS):
        said = work / f"node-{node}-{attempt}.log"
        with said.open("wb") as log:
            there = ["ip", "netns", "exec", name(node), *command]
            process = subprocess.Popen(there, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if b"Ray runtime started" in said.read_bytes():
                return process
            time.sleep(0.5)
    raise SystemExit(f"node {node} does not start: {said.read_text()[-500:]}")


def traffic() -> list[tuple[int, int]]:
    """Bytes that each node has read and sent so far."""
    folders = (Path("/sys/class/net") / outside(node) / "statistics" for node in range(_NODES))
    return [(int((at / "tx_bytes").read_text()), int((at / "rx_bytes").read_text())) for at in folders]


class Work(NamedTuple):
    """What all runs share."""

    folder: Path
    environment: dict[str, str]
    least: tuple[int, int]
    """Rows of a chunk, and of a range."""
    flags: dict[str, list[str]]
    """Of each stage."""

    def command(self, stage: str, run: str, *flags: str) -> list[str]:
        sign = [str(self.folder / "sign"), str(_AFTER[stage]), *map(str, self.least)]
        arguments = [stage, str(self.folder / run), *self.flags[stage], *flags]
        there = ["ip", "netns", "exec", name(0)] if flags else []
        return [*there, sys.executable, "-c", _COMMAND, *sign, *arguments]

    def run(self, stage: str, run: str, *flags: str, act: Callable[[], None] | None = None) -> int:
        """The exit code of the stage, in the first namespace if it has flags; after some tasks something happens."""
        (sign := self.folder / "sign").unlink(missing_ok=True)
        with (
            self.log(run).open("ab") as log,
            subprocess.Popen(
                self.command(stage, run, *flags), env=self.environment, cwd=self.folder, stderr=log
            ) as process,
        ):
            while process.poll() is None:
                if sign.exists():
                    if act is not None:
                        act()
                    sign.unlink()
                time.sleep(0.02)
        return process.returncode

    def log(self, run: str) -> Path:
        """What the command says."""
        return self.folder / f"{run.replace('/', '-')}.log"

    def digests(self, stage: str, run: str) -> dict[str, str]:
        """Of its result files."""
        results = self.folder / run / stage
        files = (path for path in results.rglob("*") if path.is_file() and path.name != "manifest.json")
        return {str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_worker() -> None:
    """One of the processes of the last node that do tasks."""
    kill([number for number in inside(_NODES - 1) if is_worker(number)][:1])


def is_worker(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith((b"ray::_do", b"ray::IDLE"))
    return False


def kill_node() -> None:
    kill(inside(_NODES - 1))


def cut() -> None:
    ip("link", "set", outside(_NODES - 1), "down")


def kill_command() -> None:
    """The one that hands out tasks."""
    kill([number for number in inside(0) if _COMMAND.encode() in Path(f"/proc/{number}/cmdline").read_bytes()])


_HAPPENS: dict[str, Callable[[], None] | None] = {
    "three nodes": None,
    "the network of one cut": cut,
    "a process killed": kill_worker,
    "a node killed": kill_node,
    "the command killed, and started again": kill_command,
}


def compare(stage: str, work: Work, happens: Sequence[str]) -> bool:
    """Whether the stage leaves the bytes of one process, whatever happens."""
    began = time.perf_counter()
    if work.run(stage, f"{stage}-here"):
        raise SystemExit(f"{stage} in one process: failed, see {work.folder}")
    here = work.digests(stage, f"{stage}-here")
    print(f"{stage}, one process: {time.perf_counter() - began:.0f} s, {len(here)} files", flush=True)

    whole = True
    for number, what in enumerate(happens):
        act = _HAPPENS[what]
        run, began, before = f"{stage}-{number}", time.perf_counter(), traffic()
        flags = "--ray", f"{address(0)}:{_PORT}"
        code = work.run(stage, run, *flags, act=act)
        if act is kill_command:
            assert code == -signal.SIGKILL, f"it was killed, and ended with {code}"
            code = work.run(stage, run, *flags)
        seconds = time.perf_counter() - began
        sent = ", ".join(f"{(now - then) / 1e6:.1f}" for (_, now), (_, then) in zip(traffic(), before, strict=True))
        equal = not code and work.digests(stage, run) == here
        print(f"{stage}, {what}: {seconds:.0f} s, equal bytes: {equal}; the nodes sent {sent} MB", flush=True)
        whole &= equal

        if act in (cut, kill_node):
            kill_node()
            ip("link", "set", outside(_NODES - 1), "up")
            start_node(_NODES - 1, work.environment, work.folder)
    return whole


def prepare(folder: Path, rows: int, chunk: int, range_rows: int) -> Work:
    """The inputs of the stages: rows of which many are alike, and pairs of a small sample with a small teacher."""
    rng = np.random.default_rng(0)
    given = rng.standard_normal((rows, 64))
    half = rows // 2
    given[half:] = given[:half] + 0.1 * rng.standard_normal((rows - half, 64))
    np.save(folder / "rows.npy", (given / np.linalg.norm(given, axis=1, keepdims=True)).astype(np.float16))
    np.save(folder / "kept.npy", np.arange(rows))

    (folder / "token").write_text(secrets.token_hex(32))
    path = os.pathsep.join(part for part in sys.path if part)
    environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_worker_niceness": "0", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1"}

    both = ["--embeddings", str(folder / "rows.npy")]
    clusters = ["--cluster.num-centers", str(rows // 50), "--cluster.iterations", "4"]
    flags = {
        "balance": both,
        "cluster": [*both, "--kept", str(folder / "kept.npy"), *clusters],
        "embed": ["--pairs.source", f"{folder}/pairs/*.tar", "--embed.teacher", "run:teacher"],
    }
    flags["embed"] += ["--machine.workers", "0", "--machine.threads", "1", "--machine.device", "cpu"]
    return Work(folder, environment, (chunk, range_rows), flags)


def make_pairs(work: Work, pairs: int) -> None:
    """A sample in shards of 25 pairs, and a run that has made a teacher of it."""
    clip_cid = [sys.executable, "-m", "clip_cid"]
    subprocess.run([*clip_cid, "sample", "sample", "--pairs", str(pairs)], cwd=work.folder, check=True)
    recipe = {
        "pairs": {"source": ["sample/pairs/*.tar"]},
        "embed": {"teacher": "none"},
        "distill": {"student": "cid-tiny", "weights": "clip-only", "batch_size": 32, "steps": 4, "warmup_steps": 1},
        "machine": {"workers": 0, "threads": 1, "tensorboard": "off"},
    }
    (work.folder / "teacher.yaml").write_text(json.dumps(recipe))
    command = [*clip_cid, "run", "teacher", "--recipe", "teacher.yaml"]
    subprocess.run(command, cwd=work.folder, env=work.environment, check=True, capture_output=True)

    (work.folder / "pairs").mkdir()
    taken: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    for path in sorted((work.folder / "sample" / "pairs").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                handle = tar.extractfile(member)
                assert handle is not None, "files only"
                taken.setdefault(member.name.partition(".")[0], []).append((member, handle.read()))
    keys = sorted(taken)
    for shard in range(0, len(keys), 25):
        with tarfile.open(work.folder / "pairs" / f"{shard:05d}.tar", "w") as tar:
            for member, data in (one for key in keys[shard : shard + 25] for one in taken[key]):
                tar.addfile(member, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(_AFTER), default=list(_AFTER))
    parser.add_argument("--happens", nargs="+", choices=list(_HAPPENS), default=list(_HAPPENS))
    parser.add_argument("--rows", type=int, default=6_000)
    parser.add_argument("--chunk", type=int, default=600, help="rows in a chunk of balance, at least")
    parser.add_argument("--range", type=int, default=1_000, help="rows in a range of cluster, at least")
    parser.add_argument("--pairs", type=int, default=300, help="that are embedded, 25 a shard")
    options = parser.parse_args()
    print(datetime.date.today(), this_machine())

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        work = prepare(Path(folder), options.rows, options.chunk, options.range)
        if "embed" in options.stages:
            make_pairs(work, options.pairs)
        with namespaces(), cluster(work.environment, work.folder):
            whole = [compare(stage, work, options.happens) for stage in options.stages]
    sys.exit(not all(whole))


if __name__ == "__main__":
    main()
