"""How quick `clip-cid review` is on a million made-up embeddings with small pictures.

    python benchmarks/review_speed.py OUT [--rows 1000000] [--dim 64]

OUT is made by the first call: embeddings with planted sets, a balance of them, and a table of pairs whose rows share a
thousand pictures. Then the page is served as a user would serve it, and asked over HTTP. A table on the console has the
wall time of each answer and the CPU seconds of the server.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.recipe import read_run_recipe

PICTURES = 1_000
SIDE = 256
THRESHOLD, LIMIT = 0.05, 0.15  # cosine
TOPICS, SPREAD = 4_000, 0.35  # their rows are farther from each other than the limit
REPEATS = 60
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    arguments = parser.parse_args()

    run = arguments.out / "run"
    if not (run / "balance").is_dir():
        make(arguments.out, run, arguments.rows, arguments.dim)
    measure(run)


def make(out: Path, run: Path, rows: int, dim: int) -> None:
    """A finished balance of made-up rows, and pairs whose pictures can be read."""
    for folder in ("embeddings/img_emb", "embeddings/metadata", "pictures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    np.save(out / "embeddings/img_emb/img_emb_0.npy", planted(rows, dim))
    keys = [f"{row:07d}" for row in range(rows)]
    captions = [f"picture {row % PICTURES} of number {row}" for row in range(rows)]
    pq.write_table(pa.table({"key": keys, "caption": captions}), out / "embeddings/metadata/metadata_0.parquet")

    rng = np.random.default_rng(1)
    for number in range(PICTURES):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out / f"pictures/{number}.jpg")
    images = [f"pictures/{row % PICTURES}.jpg" for row in range(rows)]
    pq.write_table(pa.table({"key": keys, "image": images, "caption": captions}), out / "pairs.parquet")

    command = [sys.executable, "-m", "clip_cid"]
    settings = ["--balance.threshold", str(THRESHOLD), "--balance.max-threshold", str(LIMIT)]
    embeddings = ["--embeddings", str(out / "embeddings")]
    subprocess.run([*command, "balance", str(run), *embeddings, *settings], check=True)

    # Only now: embed would read every picture, which says nothing about the page.
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["pairs"] |= {"source": [str((out / "pairs.parquet").absolute())], "key_column": "key"}
    recipe["machine"]["cache_dir"] = str((out / "cache").absolute())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    open_pairs(read_run_recipe(run / "recipe.yaml").pairs, index=run / "index")  # as embed leaves it


def planted(rows: int, dim: int) -> np.ndarray:
    """Unit rows around some thousand topics; two in five lie near another one, at distances up to the limit."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, dim)).astype(np.float32)
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    units = topics[rng.integers(0, TOPICS, rows)] + scattered(rng, np.full((rows, 1), SPREAD), dim)

    copies = np.sort(rng.permutation(rows)[: 2 * rows // 5])
    originals = (rows * rng.random(len(copies)) ** 2).astype(np.int64)  # some have many copies
    units[copies] = units[originals] + scattered(rng, 2 * LIMIT * rng.random((len(copies), 1)), dim)
    return (units / np.linalg.norm(units, axis=1, keepdims=True)).astype(np.float16)


def scattered(rng: np.random.Generator, squared: np.ndarray, dim: int) -> np.ndarray:
    """Vectors in any direction, of these squared lengths."""
    away = rng.standard_normal((len(squared), dim)).astype(np.float32)
    return away * np.sqrt(squared / (away**2).sum(axis=1, keepdims=True)).astype(np.float32)


def measure(run: Path) -> None:
    decisions = run / "benchmark.jsonl"
    decisions.unlink(missing_ok=True)
    shutil.rmtree(run.parent / "cache", ignore_errors=True)
    command = [sys.executable, "-m", "clip_cid", "review", str(run), "--decisions", str(decisions)]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        assert server.stdout is not None
        address = re.search(r"http://([\d.]+):(\d+)(/[\w-]+/)", server.stdout.readline())
        assert address is not None
        page = Page(address[1], address[2], address[3], server.pid)
        print(f"{'':34}{'wall, median':>14}{'wall, worst':>14}{'CPU, mean':>12}   answers")
        page.say("start until the address is there", [time.perf_counter() - began], page.cpu())
        try:
            ask_all(page)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    peak = max(page.peaks)
    print(f"memory of the server: {peak / 2**20:.0f} MiB at most")


def ask_all(page: "Page") -> None:
    squared = page.get("api/about")["squared"]
    page.time("first page (sets, counts, curve)", lambda at: page.first(), 1)
    time.sleep(20)  # what the server reads beside the first page
    rng = np.random.default_rng(2)
    thresholds = rng.uniform(0, 2 * LIMIT, 1_000).tolist()
    page.time("slider", lambda at: page.get(f"api/threshold?squared={thresholds[at]}"), REPEATS)
    page.time("sets at another threshold", lambda at: page.get(f"api/sets?squared={thresholds[at]}"), 10)
    for order in ("size", "width", "weakest%20link", "distance%20to%20the%20threshold", "random"):
        question = f"api/sets?squared={squared}&order={order}&page="
        name = order.replace("%20", " ")
        page.time(f"a page of sets by {name}"[:34], lambda at, question=question: page.get(f"{question}{at}"), 10)
    page.time("search", lambda at: page.get(f"api/sets?squared={squared}&text=number%20{at}77"), 10)
    rows = [
        card["row"] for number in range(3) for card in page.get(f"api/sets?squared={squared}&page={number}")["sets"]
    ]
    page.time("open a set", lambda at: page.get(f"api/set?squared={squared}&row={rows[at]}"), 20)
    page.time("thumbnail, first time", lambda at: page.bytes(f"small/{rows[0] + at}"), REPEATS)
    page.time("thumbnail, from the cache", lambda at: page.bytes(f"small/{rows[0] + at}"), REPEATS)
    page.time("decision: keep", lambda at: page.decide("keep", [rows[at]]), 10)
    pairs = [page.get(f"api/set?squared={squared}&row={row}")["links"][0] for row in rows[20:30]]
    page.time(
        "decision: not duplicates",
        lambda at: page.decide("not_duplicates", [pairs[at]["left"], pairs[at]["right"]]),
        10,
    )
    page.time("the sets after it", lambda at: page.get(f"api/sets?squared={squared}&page={at}"), 10)


class Page:
    """The server, asked as its page asks it."""

    def __init__(self, host: str, port: str, path: str, pid: int) -> None:
        self._connection, self._path, self._pid = http.client.HTTPConnection(host, int(port), timeout=600), path, pid
        self._origin = {"Origin": f"http://{host}:{port}", "Content-Type": "application/json"}
        self.peaks: list[int] = []

    def bytes(self, path: str, body: str | None = None) -> bytes:
        method, headers = ("GET", {}) if body is None else ("POST", self._origin)
        self._connection.request(method, self._path + path, body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return content

    def get(self, path: str) -> dict:
        return json.loads(self.bytes(path))

    def first(self) -> None:
        """All that the page asks for before it shows the sets."""
        for path in ("", "review.css", "review.js", "api/about"):
            self.bytes(path)
        squared = self.get("api/about")["squared"]
        for path in (f"api/threshold?squared={squared}", f"api/sets?squared={squared}", "api/decisions"):
            self.bytes(path)

    def decide(self, decision: str, rows: list[int]) -> None:
        self.bytes("api/decide", json.dumps({"decision": decision, "rows": rows}))

    def cpu(self) -> float:
        """CPU seconds of the server so far."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{self._pid}/status").read_text()
        self.peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024)  # type: ignore[index]
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def time(self, name: str, ask, times: int) -> None:
        self._connection.close()  # the server has ended one that was quiet
        walls, before = [], self.cpu()
        for number in range(times):
            began = time.perf_counter()
            ask(number)
            walls.append(time.perf_counter() - began)
        self.say(name, walls, (self.cpu() - before) / times)

    def say(self, name: str, walls: list[float], cpu: float) -> None:
        median, worst = 1_000 * statistics.median(walls), 1_000 * max(walls)
        print(f"{name:34}{median:>11,.0f} ms{worst:>11,.0f} ms{1_000 * cpu:>9,.0f} ms   {len(walls)}", flush=True)


if __name__ == "__main__":
    main()
