"""The size and time of each install in a fresh environment, what fills it, and whether the light one balances.

A wheel is built once. For each way in, an environment is made, the wheel is installed without pip's cache, and the
environment is removed. In the light one, balance and subset run on embeddings made up here, after a look that none of
the large packages that they do not need is there. Of the install of all, the part of each way is told too: the sum of
what its requirements name.

    python benchmarks/install_sizes.py [--ways light distill ...] [--torch 2.13.0+cpu]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIGHT = "light"
WAYS = (LIGHT, "distill", "evaluate", "report", "all")
NOT_IN_LIGHT = ("open_clip", "torchvision", "timm", "sklearn", "matplotlib")
OF_CUDA = ("nvidia", "triton", "cuda")  # packages that a build of PyTorch without CUDA does not bring
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The environment of the commands, in which this checkout is not to be found."""
PROBE = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name)]))
"""
PARTS = """
import json, sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement

def closure(name, extras, found):
    if (name, extras) in found:
        return
    found.add((name, extras))
    for line in metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras or ("",)):
            try:
                closure(needed.name.lower().replace("_", "-"), tuple(sorted(needed.extras)), found)
            except metadata.PackageNotFoundError:
                found.discard((needed.name.lower().replace("_", "-"), tuple(sorted(needed.extras))))

def size(name):
    files = metadata.files(name) or ()
    return sum(path.stat().st_size for file in files if (path := file.locate()).is_file())

parts = {}
for way in sys.argv[1:]:
    found = set()
    closure("clip-cid", () if way == "light" else (way,), found)
    parts[way] = sum(size(name) for name in {name for name, _ in found})
print(json.dumps(parts))
"""
EMBEDDINGS = """
import sys, numpy as np
rows = np.random.default_rng(0).normal(size=(2_000, 64)).astype(np.float32)
rows[1_000:] = rows[:1_000] + 0.01 * rows[1_000:]
np.save(sys.argv[1], rows / np.linalg.norm(rows, axis=1, keepdims=True))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--torch", help="install this version of PyTorch first, such as a build without CUDA")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e3:,.0f} kB", flush=True)
        for way in given.ways:
            measure(way, wheel, given.torch)


def build_wheel(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def measure(way: str, wheel: Path, torch: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=True)
        before, started, worked = packages_in(environment), time.perf_counter(), cpu_seconds()

        if torch is not None:
            install(environment, f"torch=={torch}")
        install(environment, str(wheel) if way == LIGHT else f"{wheel}[{way}]")
        seconds, worked = time.perf_counter() - started, cpu_seconds() - worked

        sizes = {name: size for name, size in packages_in(environment).items() if name not in before}
        cuda = sum(size for name, size in sizes.items() if name.startswith(OF_CUDA))
        largest = sorted(sizes, key=lambda name: -sizes[name])[:8]
        print(
            f"\n{way}: {sum(sizes.values()) / 1e6:,.0f} MB in {seconds:,.0f} s, of which CPU {worked:,.0f} s",
            flush=True,
        )
        print(f"  of CUDA, beside torch itself: {cuda / 1e6:,.0f} MB")
        print(f"  largest: {', '.join(f'{name} {sizes[name] / 1e6:,.0f}' for name in largest)}", flush=True)
        if way == LIGHT:
            try_balance(environment, Path(folder))
        if way == "all":
            parts = json.loads(output_of([environment / "bin/python", "-c", PARTS, *WAYS]))
            print(f"  parts, MB: {', '.join(f'{part} {size / 1e6:,.0f}' for part, size in parts.items())}")


def install(environment: Path, what: str) -> None:
    pip = [environment / "bin/python", "-m", "pip", "install", "-q", "--no-cache-dir", what]
    subprocess.run(pip, check=True, env=OUTSIDE)


def output_of(command: list[Any]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=OUTSIDE).stdout


def cpu_seconds() -> float:
    """Of all commands so far, which other work on the machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def packages_in(environment: Path) -> dict[str, int]:
    """Bytes of each folder and file of site-packages."""
    site = next(environment.glob("lib/python*/site-packages"))
    return {entry.name: size_of(entry) for entry in site.iterdir()}


def size_of(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def try_balance(environment: Path, folder: Path) -> None:
    """A deduplicated list of made-up embeddings, of which half repeat the others."""
    python, embeddings, run = environment / "bin/python", folder / "embeddings.npy", folder / "run"
    found = output_of([python, "-c", PROBE, *NOT_IN_LIGHT])
    assert json.loads(found) == [], found

    subprocess.run([python, "-c", EMBEDDINGS, embeddings], check=True, env=OUTSIDE)
    for command in (["balance", run, "--embeddings", embeddings], ["subset", run, folder / "out"]):
        subprocess.run([environment / "bin/clip-cid", *command], check=True, cwd=folder, env=OUTSIDE)
    print(f"  without {', '.join(NOT_IN_LIGHT)}: {', '.join(sorted(file.name for file in (folder / 'out').iterdir()))}")


if __name__ == "__main__":
    main()
