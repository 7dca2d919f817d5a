"""Damaged files of every format that is read, and what a command says of each."""

import dataclasses
import enum
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import readers
import results
from cases import Case, Cases
from commands import Ended
from states import case_of

_LARGE = 3 << 30  # bytes that no command on the smallest sample needs
_SAID = re.compile(r"warning:|skipped|cannot be|could not|damaged|changed|stale|left out|missing|not as|again|of 48 ")
_WORDS = {
    "csv": (b'"', b"'", b"\\", b"\0", b"\n", b"\r", b",", b"\t", b'""', b'\n"', b"\xff\xfe", b"\xef\xbb\xbf"),
    "tsv": (b'"', b"'", b"\\", b"\0", b"\n", b"\r", b",", b"\t", b'""', b'"\t', b"\xff\xfe", b"\xef\xbb\xbf"),
    "txt": (b"\0", b"\n", b"\r", b"\xff", b"\xe2\x80\xa8", b" " * 300),
    "json": (b'"', b"{", b"[" * 3000, b"null", b"NaN", b"1e999", b"9" * 5000, b"\\ud800", b"\0", b",", b"\n"),
    "yaml": (b"!!int ''", b"&a [*a]", b"\t", b"2026-02-30", b"[" * 3000, b"{", b"9" * 5000, b".inf", b"\0", b": "),
    "npy": (b"9" * 20, b"-1", b"'<f8'", b"'|O'", b"True", b"(", b"\0"),
}
_WORDS["jsonl"] = _WORDS["json"]


class Kind(enum.StrEnum):
    """What comes of a damaged file, from good to bad."""

    RIGHT = "right"
    """As from the whole file: the damage does not count, or the file was made again."""
    ERROR = "clean error"
    COUNTED = "counted"
    """Other results, and words that say so."""
    OTHER = "other input"
    """The file says something else, and an independent reader reads the same."""
    WRONG = "wrong"
    TRACEBACK = "traceback"
    HANGS = "hangs"
    MEMORY = "memory"
    BRICKED = "bricked"
    """An error whose own advice does not help."""


BAD = (Kind.WRONG, Kind.TRACEBACK, Kind.HANGS, Kind.MEMORY, Kind.BRICKED)


@dataclasses.dataclass(frozen=True)
class Target:
    """Files of a kind, and the command that reads them."""

    name: str
    before: str
    """The state that holds them, of `cases.CASES`, or one of `states.MAKERS`."""
    files: str
    """A pattern, from the folder of the state."""
    arguments: tuple[str, ...]
    differs: Callable[[Path, Path], bool] | None = None
    """Whether the results differ from what an independent reader finds in the damaged file; None if nothing tells."""
    has_digest: bool = False
    """Whether a record tells the file's bytes: then other results are wrong in any case."""

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A damaged file; `seed` repeats it."""

    target: Target
    seed: str

    def __str__(self) -> str:
        return f"{self.target.name}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Judged:
    mutant: Mutant
    kind: Kind
    words: str = ""


def _read(*names: str) -> Iterator[Target]:
    """Pairs in each format, read by embed."""
    for name, files, differs in (
        ("csv", "pairs/table.csv", readers.csv_differs),
        ("tsv", "pairs/table.tsv", readers.tsv_differs),
        ("parquet", "pairs/table.parquet", readers.parquet_differs),
        ("tar", "data/pairs/*.tar", readers.most_rows_differ),
        ("folder", "pairs/images/*", readers.most_rows_differ),
        ("image of a table", "pairs/images/*.jpg", readers.most_rows_differ),
    ):
        state = {"tar": "data", "image of a table": "csv"}.get(name, name)
        yield Target(f"pairs: {name}", state, files, ("embed", "run", "--recipe", "student.yaml"), differs)


def targets() -> tuple[Target, ...]:
    embed = ("embed", "run", "--recipe", "student.yaml")
    return (
        *_read(),
        Target("embeddings: .npy", "npy", "pairs/rows.npy", embed, readers.npy_differs),
        Target("embeddings: .npz", "npz", "pairs/*.npz", embed),
        Target("embeddings: .parquet", "npz", "pairs/*.parquet", embed),
        Target("embed's files", "embed", "run/embed/**/*", ("balance", "run"), has_digest=True),
        Target("balance's files", "balance", "run/balance/*", ("cluster", "run"), has_digest=True),
        Target("balance's files, grown", "report", "run/balance/*", ("balance", "run", "--balance.threshold", "0.001")),
        Target("cluster's files", "cluster", "run/cluster/*", ("distill", "run"), has_digest=True),
        Target("distill's files", "distill", "run/distill/**/*", ("evaluate", "run"), has_digest=True),
        Target("evaluate's files", "evaluate", "run/evaluate/**/*", ("draw", "run"), has_digest=True),
        Target("draw's files", "draw", "run/draw/*.csv", ("report", "run"), has_digest=True),
        Target("index", "embed", "run/index/*", ("embed", "run", "--force")),
        Target("recipe", "embed", "run/recipe.yaml", ("status", "run")),
        Target("recipe of --recipe", "data", "student.yaml", ("embed", "run", "--recipe", "student.yaml")),
        Target("manifests", "report", "run/*/manifest.json", ("status", "run")),
        Target("teacher", "data", "teacher/distill/student/*", embed),
        Target("evaluation set", "distill", "data/sets/scenes/**/*", ("evaluate", "run")),
        Target("retrieval set", "distill", "data/heldout/*.tar", ("evaluate", "run")),
        Target("features", "report", "run/features/*/*", ("evaluate", "run", "--evaluate.seed", "1")),
        *(
            Target(f"unfinished {stage}", f"unfinished {stage}", f"run/{stage}.part/**/*", (stage, "run"))
            for stage in ("embed", "balance", "cluster", "distill", "evaluate")
        ),
        Target("unfinished subset", "unfinished subset", "subset/**/*", case_of("subset --shards").arguments),
    )


def mutants(target: Target, count: int, chance: random.Random) -> Iterator[Mutant]:
    for _ in range(count):
        yield Mutant(target, f"{chance.getrandbits(32):08x}")


def judge(cases: Cases, mutant: Mutant) -> Judged:
    """Damage a file, give the command that reads it, and see what it says and leaves."""
    target, chance = mutant.target, random.Random(mutant.seed)
    case = Case(f"mutants of {target.name}", target.before, target.arguments)
    expected = cases.expected(case)
    cases.begin(case)
    files = [path for path in sorted(cases.here.glob(target.files)) if path.is_file() and path.stat().st_size]
    path = chance.choice(files)
    how = damage(path, chance)
    where = f"{path.relative_to(cases.here)}: {how}"

    ended = cases.run(case)
    if ended.hangs or ended.has_traceback:
        return Judged(mutant, Kind.HANGS if ended.hangs else Kind.TRACEBACK, f"{where}\n{ended.stderr[-1800:]}")
    if ended.memory > _LARGE or "memory ran out" in ended.stderr:
        return Judged(mutant, Kind.MEMORY, f"{where}: {ended.memory >> 20:,} MiB\n{ended.stderr[-500:]}")
    if ended.code != 0:
        if not ended.is_clean_error:
            return Judged(mutant, Kind.TRACEBACK, f"{where}: code {ended.code}\n{ended.stdout}{ended.stderr[-1500:]}")
        return _follow_advice(cases, case, mutant, where, ended)

    found = {**results.contents(cases.here), str(path.relative_to(cases.here)): ""}
    if not results.differences(found, {**expected, str(path.relative_to(cases.here)): ""}):
        return Judged(mutant, Kind.RIGHT)
    if target.differs is not None and not target.differs(cases.here, path):
        return Judged(mutant, Kind.OTHER)
    if _says_so(ended, case, cases):
        return Judged(mutant, Kind.COUNTED)
    if target.differs is not None or target.has_digest:
        differ = "; ".join(results.differences(found, expected)[:4])
        return Judged(mutant, Kind.WRONG, f"{where}; {differ}\n{ended.stdout[-300:]}{ended.stderr[-700:]}")
    return Judged(mutant, Kind.OTHER)


def damage(path: Path, chance: random.Random) -> str:
    """Change the bytes of a file; in half of the cases its time stays, as when a disk rots. Returns what was done."""
    before, content = path.stat(), bytearray(path.read_bytes())
    size = len(content)
    start = chance.randrange(size)
    if chance.random() < 0.3:
        start = min(start, chance.randrange(min(size, 256)))  # headers are short
    length = min(chance.choice((1, 2, 8, 64, 512, 4096)), size - start)
    words = _WORDS.get(path.suffix.removeprefix("."), ())
    how = chance.choice(("flip", "cut", "zero", "insert", "double", "drop", "swap", "append", *("word",) * bool(words)))
    if how == "flip":
        for place in range(start, start + min(length, 8)):
            content[place] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[start:]
    elif how == "zero":
        content[start : start + length] = bytes(length)
    elif how == "insert":
        content[start:start] = chance.randbytes(length)
    elif how == "double":
        content[start:start] = content[start : start + length]
    elif how == "drop":
        del content[start : start + length]
    elif how == "swap":
        other = chance.randrange(size)
        content[start], content[other] = content[other], content[start]
    elif how == "append":
        content += chance.randbytes(length)
    else:
        content[start:start] = chance.choice(words)
    path.write_bytes(content)

    if rots := chance.random() < 0.5:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{how} {length:,} at {start:,} of {size:,}{', same time' if rots else ''}"


def _follow_advice(cases: Cases, case: Case, mutant: Mutant, where: str, ended: Ended) -> Judged:
    """A command that the message names must put things right."""
    advice = re.findall(r"`clip-cid (\w+) run( --force)?`", ended.stderr.strip().splitlines()[-1])
    for stage, force in advice[:1]:
        done = cases.commands.run((stage, "run", *([force.strip()] if force else [])), cases.here)
        again = cases.run(case)
        if done.code != 0 or again.code != 0:
            said = "\n".join(part.stderr[-700:] for part in (ended, done, again))
            return Judged(mutant, Kind.BRICKED, f"{where}\n{said}")
    return Judged(mutant, Kind.ERROR)


def _says_so(ended: Ended, case: Case, cases: Cases) -> bool:
    """Whether the command said something of it that the undisturbed one does not say."""
    usual = _lines(cases.said(case))
    return any(_SAID.search(line) for line in _lines(ended) - usual)


def _lines(ended: Ended) -> set[str]:
    return {re.sub(r"[\d.,]+ ?(s|ms|images/s)?\b", "", line) for line in (ended.stdout + ended.stderr).splitlines()}
