"""Balance on three Ray nodes that meet over a network: each has a network namespace of its own, with an address.

The results are compared by SHA-256 with those of one process; then once more while one node is cut off, with the
interface down, after a few tasks. Needs Linux, root and `ip`; removes what it has made.

    python benchmarks/ray_namespaces.py --rows 30000
"""

import argparse
import contextlib
import datetime
import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also of a process that is started with this file
from process_costs import machine as this_machine

_NODES, _BRIDGE, _PORT, _ATTEMPTS = 3, "clipcid0", 6379, 8
_COMMAND = """
import sys
from pathlib import Path
from clip_cid import cli, engine
from clip_cid.method.balance import plan_choice

plan_choice._LEAST_CHUNK, sign, run_tasks, done = int(sys.argv[1]), Path(sys.argv[2]), engine.run_tasks, []

def counting(tasks, begin, *, on_done, **rest):
    def count(task):
        done.append(task)
        on_done(task)
        if len(done) == 5:
            sign.touch()
    run_tasks(tasks, begin, on_done=count, **rest)

engine.run_tasks = counting
sys.exit(cli.main(sys.argv[3:]))
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def name(node: int) -> str:
    return f"clipcid{node}"


@contextlib.contextmanager
def namespaces() -> Generator[None]:
    """A bridge, and a namespace with an address on it for each node."""
    try:
        ip("link", "add", _BRIDGE, "type", "bridge")
        ip("link", "set", _BRIDGE, "up")
        for node in range(_NODES):
            inside, outside = f"cc{node}in", f"cc{node}out"
            ip("netns", "add", name(node))
            ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name(node))
            ip("link", "set", outside, "master", _BRIDGE, "up")
            ip("-n", name(node), "addr", "add", f"{address(node)}/24", "dev", inside)
            for device in ("lo", inside):
                ip("-n", name(node), "link", "set", device, "up")
        yield
    finally:
        for node in range(_NODES):
            subprocess.run(["ip", "netns", "delete", name(node)], check=False)
        subprocess.run(["ip", "link", "delete", _BRIDGE], check=False)


@contextlib.contextmanager
def cluster(environment: dict[str, str], work: Path) -> Generator[None]:
    """A node in each namespace."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for node in range(_NODES):
            started.append(start_node(node, environment, work))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def start_node(node: int, environment: dict[str, str], work: Path) -> subprocess.Popen[bytes]:
    """Ray gives a node 30 seconds to start, which beside other work may be too few."""
    meets = ["--address", f"{address(0)}:{_PORT}"]
    if node == 0:
        meets = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory", "80000000"]
    command = [*ray, *meets, "--node-ip-address", address(node), "--num-cpus", "1"]
    said = work
    for attempt in range(_ATTEMPTS):
        said = work / f"node-{node}-{attempt}.log"
        with said.open("wb") as log:
            inside = ["ip", "netns", "exec", name(node), *command]
            process = subprocess.Popen(inside, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if b"Ray runtime started" in said.read_bytes():
                return process
            time.sleep(0.5)
    raise SystemExit(f"node {node} does not start: {said.read_text()[-500:]}")


def traffic(node: int) -> str:
    folder = Path("/sys/class/net") / f"cc{node}out" / "statistics"
    read, written = (int((folder / f"{way}_bytes").read_text()) / 1e6 for way in ("tx", "rx"))
    return f"node {node} read {read:.1f} MB and sent {written:.1f} MB"


def digests(run: Path) -> dict[str, str]:
    files = (path for path in (run / "balance").rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def balance(work: Path, run: str, chunk: int, environment: dict[str, str], *flags: str, cut: int | None = None) -> Any:
    """The stage, in the first namespace if it uses the cluster; with `cut`, that node is cut off after five tasks."""
    sign = work / f"{run}-sign"
    arguments = [str(chunk), str(sign), "balance", str(work / run), "--embeddings", str(work / "rows.npy"), *flags]
    inside = ["ip", "netns", "exec", name(0)] if flags else []
    start = time.perf_counter()
    with subprocess.Popen([*inside, sys.executable, "-c", _COMMAND, *arguments], env=environment) as process:
        while cut is not None and process.poll() is None:
            if sign.exists():
                ip("link", "set", f"cc{cut}out", "down")
                print(f"node {cut} is cut off")
                break
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{run}: failed")
    print(f"{run}: {time.perf_counter() - start:.0f} s")
    return digests(work / run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--chunk", type=int, default=2_500, help="rows in a chunk, at least")
    options = parser.parse_args()
    print(datetime.date.today(), this_machine())

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        work = Path(folder)
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((options.rows, 64))
        half = options.rows // 2
        rows[half:] = rows[:half] + 0.1 * rng.standard_normal((options.rows - half, 64))
        np.save(work / "rows.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))

        (work / "token").write_text(secrets.token_hex(32))
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
        environment["RAY_worker_niceness"] = "0"
        environment["RAY_AUTH_TOKEN_PATH"] = str(work / "token")
        here = balance(work, "one process", options.chunk, environment)
        with namespaces(), cluster(environment, work):
            there = f"{address(0)}:{_PORT}"
            whole = balance(work, "three nodes", options.chunk, environment, "--ray", there)
            print("; ".join(map(traffic, range(_NODES))))
            cut = balance(work, "one cut off", options.chunk, environment, "--ray", there, cut=_NODES - 1)
    print(f"{len(here)} files; equal bytes: three nodes {whole == here}, one cut off {cut == here}")


if __name__ == "__main__":
    main()
