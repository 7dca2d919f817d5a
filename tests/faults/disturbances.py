"""Kills, failing file operations and power cuts: what is left, and whether the same command puts it right."""

import collections
import dataclasses
import enum
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import results
from cases import Case, Cases
from commands import CHANGE, READ, REMOVE, Action, Ended, Harm


class Outcome(enum.StrEnum):
    """How a trial ended, from good to bad."""

    RIGHT = "right"
    NOISY = "noisy"
    """The failing command said more or less than its two lines."""
    LEFTOVER = "leftover"
    WRONG = "wrong"
    TRACEBACK = "traceback"
    HANGS = "hangs"
    BRICKED = "bricked"
    """The same command fails from then on."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One disturbance of one command, by which it can be repeated."""

    case: Case
    how: str
    harm: Harm | None = None
    kill_after: float | None = None
    power_cut: str = ""
    """What becomes of files that were not synced: emptied, zeroed, or nothing."""

    def __str__(self) -> str:
        at = f"operation {self.harm.at}" if self.harm else f"{self.kill_after:.3f} s"
        error = f" {errno.errorcode[self.harm.error]}" if self.harm and self.harm.error else ""
        return f"{self.case.name}: {self.how}{error} at {at}{f', {self.power_cut}' if self.power_cut else ''}"


@dataclasses.dataclass(frozen=True)
class Result:
    trial: Trial
    outcome: Outcome
    words: str = ""
    """What was wrong."""


def operations(cases: Cases, case: Case, kinds: int) -> list[str]:
    """The operations of the undisturbed command, in order."""
    cases.begin(case)
    ended = cases.run(case, Harm(Action.COUNT, kinds=kinds))
    assert ended.code == 0, ended.stderr
    return [line.split(" ")[3] for line in ended.operations if line.startswith("#")]


def attempt(cases: Cases, trial: Trial) -> Result:
    """Disturb a command, then give it again."""
    expected = cases.expected(trial.case)
    cases.begin(trial.case)
    disturbed = cases.run(trial.case, trial.harm, kill_after=trial.kill_after)
    if trial.power_cut:
        cut_power(cases.here, disturbed, trial.power_cut)

    # The disturbed command itself.
    at = next((line for line in disturbed.operations if line.startswith("at ")), "")
    if disturbed.hangs:
        return Result(trial, Outcome.HANGS, at)
    if disturbed.has_traceback:
        return Result(trial, Outcome.TRACEBACK, f"{at}\n{disturbed.stderr[-1500:]}")
    if disturbed.code > 0 and not disturbed.is_clean_error:
        return Result(trial, Outcome.NOISY, f"{at} code {disturbed.code}\n{disturbed.stderr[-1500:]}")

    # The same command again.
    again = cases.run(trial.case)
    if again.hangs or again.has_traceback:
        outcome = Outcome.HANGS if again.hangs else Outcome.TRACEBACK
        return Result(trial, outcome, f"again, {at}\n{again.stderr[-1500:]}")
    if again.code != 0 and not (trial.case.whole_is_refused and again.is_clean_error):
        return Result(trial, Outcome.BRICKED, f"{at}\n{again.stderr[-1500:]}")

    # What it has left.
    different = results.differences(results.contents(cases.here), expected)
    different += [line for run in _runs(cases.here) for line in results.unrecorded(run)]
    left = [line for line in different if line.endswith("is extra")]
    wrong = [line for line in different if line not in left and not (left and "manifest.json" in line)]
    if left or wrong:
        outcome = Outcome.WRONG if wrong else Outcome.LEFTOVER
        return Result(trial, outcome, f"{at}; {'; '.join((wrong or left)[:5])}")
    return Result(trial, Outcome.RIGHT)


def kills(cases: Cases, case: Case, count: int, chance: random.Random) -> Iterator[Trial]:
    """Kills at `count` of the command's operations, all different; at every one if there are no more."""
    number = len(operations(cases, case, CHANGE | REMOVE))
    for at in sorted(chance.sample(range(1, number + 1), min(count, number))):
        yield Trial(case, "killed", Harm(Action.KILL, at))


def kills_in_time(cases: Cases, case: Case, count: int, chance: random.Random) -> Iterator[Trial]:
    cases.begin(case)
    seconds = cases.run(case).seconds
    for _ in range(count):
        yield Trial(case, "killed", kill_after=chance.uniform(0, seconds))


def power_cuts(cases: Cases, case: Case, count: int, chance: random.Random) -> Iterator[Trial]:
    """Kills after which everything that was not synced is lost."""
    for trial in kills(cases, case, count, chance):
        yield dataclasses.replace(trial, how="power cut", power_cut=chance.choice(("emptied", "zeroed")))


def failures(cases: Cases, case: Case, count: int, chance: random.Random) -> Iterator[Trial]:
    """A full disk from the k-th change on, or one change or read that fails."""
    changes = len(operations(cases, case, CHANGE))
    reads = len(operations(cases, case, READ))
    for _ in range(count):
        how = chance.choice(("full", "once", "read"))
        if how == "full":
            code = chance.choice((errno.ENOSPC, errno.EDQUOT, errno.EROFS))
            yield Trial(case, "fails", Harm(Action.FAIL_FROM_THEN_ON, chance.randint(1, changes), code, CHANGE))
        elif how == "once":
            code = chance.choice((errno.EIO, errno.EACCES, errno.ENOSPC, errno.EMFILE))
            yield Trial(case, "fails once", Harm(Action.FAIL_ONCE, chance.randint(1, changes), code, CHANGE))
        else:
            code = chance.choice((errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE))
            yield Trial(case, "does not read", Harm(Action.FAIL_ONCE, chance.randint(1, reads), code, READ))


def cut_power(folder: Path, ended: Ended, how: str) -> None:
    """Take from each file what was written and not synced since."""
    synced: dict[int, int] = collections.defaultdict(int)  # inode -> bytes at its last sync
    lost: set[int] = set()
    for line in ended.operations:
        what, inode, size, _ = line.split(" ", 3)
        if what == "write":
            lost.add(int(inode))
        elif what == "sync":
            lost.discard(int(inode))
            synced[int(inode)] = int(size)

    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and (status := path.stat()).st_ino in lost:
            os.truncate(path, min(synced[status.st_ino], status.st_size))
            if how == "zeroed":
                os.truncate(path, status.st_size)


def _runs(here: Path) -> list[Path]:
    return [path.parent for path in here.rglob("recipe.yaml")]
