"""The long rounds: `make faults`, or `python tests/faults --help`."""

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import disturbances
import mutants
from cases import CASES, Case, Cases
from commands import Commands
from disturbances import Outcome, Result, Trial
from mutants import Kind
from states import MAKERS

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
    options.add_argument("--mutants", type=int, default=0, metavar="N", help="damaged files of each kind")
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()

    rows: dict[str, collections.Counter[Outcome]] = {}
    kinds: dict[str, collections.Counter[Kind]] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=os.environ.get("FAULTS_FOLDER")) as folder:
        commands = Commands(Path(folder) / "server")
        cases = Cases(Path(folder) / "work", commands, MAKERS)
        for kind, trials in _KINDS.items():
            count = getattr(chosen, kind.replace("-", "_"))
            for case in CASES if count else ():
                if chosen.only in case.name:
                    results = _tried(
                        cases, trials(cases, case, count, random.Random(f"{chosen.seed} {kind} {case.name}"))
                    )
                    rows[f"{kind}: {case.name}"] = collections.Counter(result.outcome for result in results)
                    _say(f"{kind}: {case.name}: {len(results)} tried, {time.monotonic() - started:,.0f} s")
        for target in mutants.targets() if chosen.mutants else ():
            if chosen.only in target.name:
                kinds[target.name] = _judged(
                    cases, target, chosen.mutants, random.Random(f"{chosen.seed} {target.name}")
                )
                _say(f"mutants of {target.name}: {chosen.mutants} tried, {time.monotonic() - started:,.0f} s")
        commands.close()

    bad = _print_table("trials", rows, Outcome, good=(Outcome.RIGHT,))
    bad += _print_table("mutants of", kinds, Kind, good=[kind for kind in Kind if kind not in mutants.BAD])
    _say(f"{time.monotonic() - started:,.0f} s, seed {chosen.seed}")
    return int(bad > 0)


def _tried(cases: Cases, trials: Iterator[Trial]) -> list[Result]:
    results: list[Result] = []
    for trial in trials:
        result = disturbances.attempt(cases, trial)
        results.append(result)
        if result.outcome is not Outcome.RIGHT:
            _say(f"{result.outcome.upper()} {trial}: {result.words}")
    return results


def _judged(cases: Cases, target: mutants.Target, count: int, chance: random.Random) -> collections.Counter[Kind]:
    counts: collections.Counter[Kind] = collections.Counter()
    for mutant in mutants.mutants(target, count, chance):
        judged = mutants.judge(cases, mutant)
        counts[judged.kind] += 1
        if judged.kind in mutants.BAD:
            _say(f"{judged.kind.upper()} {mutant}: {judged.words}")
    return counts


def _print_table(
    title: str, rows: Mapping[str, collections.Counter[Any]], columns: Iterable[Any], good: Sequence[Any]
) -> int:
    """Print the counts; returns how many are not good."""
    total = sum(rows.values(), collections.Counter[Any]())
    if rows:
        _say(f"| {title} | {' | '.join(columns)} |\n|---|{'---|' * len([*columns])}")
    for name, counts in {**rows, "all": total}.items() if rows else ():
        _say(f"| {name} | {' | '.join(f'{counts[column]:,}' for column in columns)} |")
    return total.total() - sum(total[kind] for kind in good)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
