"""A short, seeded part of what `make faults` does at length."""

import random
import sys
from collections.abc import Iterator

import commands
import disturbances
import mutants
import pytest
from cases import CASES, Cases
from disturbances import Outcome
from states import MAKERS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.resume,
    pytest.mark.skipif(sys.platform != "linux", reason="the shim knows Linux only"),
    pytest.mark.skipif(commands.compiler() is None, reason="no C compiler (cc, gcc or clang) for the shim"),
]
BY_NAME = {case.name: case for case in CASES}
TRIED = [  # the kind of disturbance, the command, how often
    *(
        (disturbances.kills, name, 2)
        for name in ("embed", "balance", "cluster", "distill", "evaluate", "sample", "init")
    ),
    *((disturbances.power_cuts, name, 2) for name in ("embed", "balance, other threshold", "cluster")),
    *((disturbances.failures, name, 2) for name in ("balance", "subset --shards", "export")),
]
DAMAGED = ("pairs: csv", "pairs: tar", "embeddings: .npz", "embed's files", "manifests", "recipe", "unfinished balance")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    folder = tmp_path_factory.mktemp("faults")
    server = commands.Commands(folder / "server")
    yield Cases(folder / "work", server, MAKERS)
    server.close()


@pytest.mark.parametrize(("kind", "name", "count"), TRIED, ids=[f"{kind.__name__}-{name}" for kind, name, _ in TRIED])
def test_the_same_command_puts_right_what_a_disturbance_has_left(cases: Cases, kind, name: str, count: int):
    for trial in kind(cases, BY_NAME[name], count, random.Random(f"{kind.__name__} {name}")):
        result = disturbances.attempt(cases, trial)
        assert result.outcome is Outcome.RIGHT, f"{trial}: {result.words}"


@pytest.mark.parametrize("target", [target for target in mutants.targets() if target.name in DAMAGED], ids=str)
def test_a_damaged_file_is_an_error_in_two_lines_or_counted_or_made_again(cases: Cases, target: mutants.Target):
    for mutant in mutants.mutants(target, 2, random.Random(target.name)):
        judged = mutants.judge(cases, mutant)
        assert judged.kind not in mutants.BAD, f"{mutant}: {judged.words}"
