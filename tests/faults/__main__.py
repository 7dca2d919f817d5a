"""The long rounds: `make faults`, or `python tests/faults --help`."""

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import disturbances
from cases import CASES, Case, Cases
from commands import Commands
from disturbances import Outcome, Result, Trial

_KINDS: dict[str, Callable[[Cases, Case, int, random.Random], Iterator[Trial]]] = {
    "kills": disturbances.kills,
    "kills-in-time": disturbances.kills_in_time,
    "power-cuts": disturbances.power_cuts,
    "failures": disturbances.failures,
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    for kind in _KINDS:
        options.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"{kind} of each command")
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    bad: list[Result] = []
    rows: dict[str, collections.Counter[Outcome]] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAULTS_FOLDER")) as folder:
        commands = Commands(Path(folder) / "server")
        cases = Cases(Path(folder) / "work", commands)
        for kind, trials in _KINDS.items():
            count = getattr(chosen, kind.replace("-", "_"))
            for case in CASES if count else ():
                if chosen.only in case.name:
                    results = _tried(cases, trials(cases, case, count, random.Random(f"{chosen.seed} {kind} {case}")))
                    rows[f"{kind}: {case.name}"] = collections.Counter(result.outcome for result in results)
                    bad += [result for result in results if result.outcome is not Outcome.RIGHT]
        commands.close()

    _print_table(rows, time.monotonic() - started)
    return int(bool(bad))


def _tried(cases: Cases, trials: Iterator[Trial]) -> list[Result]:
    results: list[Result] = []
    for trial in trials:
        result = disturbances.attempt(cases, trial)
        results.append(result)
        if result.outcome is not Outcome.RIGHT:
            _say(f"{result.outcome.upper()} {trial}: {result.words}")
    return results


def _print_table(rows: dict[str, collections.Counter[Outcome]], seconds: float) -> None:
    _say(f"| trials | {' | '.join(Outcome)} |\n|---|{'---|' * len(Outcome)}")
    for name, counts in rows.items():
        _say(f"| {name} | {' | '.join(str(counts[outcome]) for outcome in Outcome)} |")
    total = sum(rows.values(), collections.Counter[Outcome]())
    _say(f"| all | {' | '.join(str(total[outcome]) for outcome in Outcome)} |")
    _say(f"{total.total():,} trials in {seconds:,.0f} s")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
