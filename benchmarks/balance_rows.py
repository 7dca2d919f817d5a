"""Memory of the process that drives the balance, by the number of rows: its slope in bytes a row.

    python benchmarks/balance_rows.py --rows 100000 1000000 4000000 --dim 64 --kind tight

Made-up rows of `balance_data.py`, float16. The tasks are done by two processes more, which are not counted. What is
counted is the peak of anonymous memory (RssAnon, sampled every 20 ms), which the system cannot take back. The slope is
that between a number of rows and the one before it, so that the libraries do not count.
"""

import itertools
from pathlib import Path

import numpy as np
import tyro
from balance_data import Kind, dataset
from balance_memory import Peaks, measure, result

_MIB = 1 << 20


def main(
    rows: tuple[int, ...] = (100_000, 1_000_000, 4_000_000),
    dim: int = 64,
    kind: Kind = "tight",
    checkouts: tuple[Path, ...] = (Path(),),
    work: Path = Path("data/balance-rows"),
) -> None:
    """Print a table a checkout; results are compared byte for byte between the checkouts."""
    digests: dict[int, set[str]] = {count: set() for count in rows}
    for checkout in checkouts:
        print(f"| {checkout}: rows | anonymous, MiB | bytes a row | mapped, MiB | s until the tasks | s over all |")
        print("|---|---|---|---|---|---|", flush=True)
        found: list[Peaks] = []
        for count in rows:
            given = dataset(kind, count, dim, work)
            np.load(given).sum(dtype=np.float64)  # into the cache
            found.append(measure(checkout, given, work / "run", processes=2))
            digests[count].add(result(work / "run"))
            slope = "-"
            for before, now in itertools.pairwise(found[-2:]):
                added = _MIB * (now.anonymous - before.anonymous)
                slope = f"{added / (count - rows[len(found) - 2]):.0f}"
            one = found[-1]
            print(
                f"| {count:,} | {one.anonymous:,.0f} | {slope} | {one.mapped:,.0f} | {one.ready_seconds:.1f}"
                f" | {one.seconds:.1f} |",
                flush=True,
            )
    print("results are " + ("equal" if all(len(each) == 1 for each in digests.values()) else "NOT EQUAL"))


if __name__ == "__main__":
    tyro.cli(main)
