"""CPU seconds of `balance.against`: every image is compared with every image of an evaluation.

Beside them stand those of the matrix products alone, as `torch` multiplies the same blocks on the CPU.

    python benchmarks/against_speed.py --rows 100000 400000 --targets 10000 --dim 512

The rows are made up, unit vectors in float16, a hundredth of them near a target.
"""

import argparse
import time

import numpy as np
import torch

from clip_cid.method.balance.near_targets import near_targets
from clip_cid.method.unit_rows import UnitRows

_BLOCK = 4096  # rows and targets
LIMIT = 0.14  # a squared distance: 0.07 on the scale of cosines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--targets", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)

    random = np.random.default_rng(0)
    targets = _unit(random.standard_normal((options.targets, options.dim), dtype=np.float32))
    for count in options.rows:
        rows = _unit(random.standard_normal((count, options.dim), dtype=np.float32))
        copies = random.choice(count, count // 100, replace=False)
        rows[copies] = targets[random.integers(0, options.targets, len(copies))]

        images, evaluation = (
            UnitRows(each, name=name, any_length=True) for each, name in ((rows, "images"), (targets, "targets"))
        )
        began, wall = time.process_time(), time.perf_counter()
        near = near_targets(images, evaluation, LIMIT, device=options.device)
        cpu, wall = time.process_time() - began, time.perf_counter() - wall
        assert len(near.rows) == len(copies)
        alone = _products_alone(rows, targets)
        products = count * options.targets
        print(
            f"{count:,} x {options.dim} with {options.targets:,}: {cpu:.1f} CPU s, {wall:.1f} s of the clock,"
            f" {1e9 * cpu / products:.2f} CPU ns a pair; {len(near.rows):,} near; the products alone {alone:.1f} CPU s,"
            f" so {cpu / alone:.2f} of them"
        )


def _products_alone(rows: np.ndarray, targets: np.ndarray) -> float:
    """CPU seconds of float32 products of blocks."""
    others = torch.from_numpy(targets.astype(np.float32))
    began = time.process_time()
    for start in range(0, len(rows), _BLOCK):
        block = torch.from_numpy(rows[start : start + _BLOCK].astype(np.float32))
        for first in range(0, len(others), _BLOCK):
            torch.mm(block, others[first : first + _BLOCK].T)
    return time.process_time() - began


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


if __name__ == "__main__":
    main()
