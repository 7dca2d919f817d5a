"""The commands that are disturbed, each with the folder it begins in; made once, on the smallest sample."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results
from commands import Commands, Ended, Harm

PAIRS, CAPTIONS = 48, "captions.json"
TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
TEACHER: dict[str, Any] = {
    "pairs": {"source": ["data/pairs/*.tar"]},
    "embed": {"teacher": "none"},
    "distill": {"student": "tiny.json", "weights": "clip-only", "batch_size": 16, "steps": 6, "warmup_steps": 1},
    "machine": {"workers": 0, "threads": 1},
}
STUDENT: dict[str, Any] = {
    "pairs": {"source": ["data/pairs/*.tar"], "keep_fields": ["dup", "object"]},
    "embed": {"teacher": "run:teacher"},
    "balance": {"threshold": 0.002, "truth_field": "dup"},
    "cluster": {"num_centers": 4, "iterations": 3, "truth_field": "object"},
    "distill": {
        "student": "tiny.json",
        "batch_size": 8,
        "steps": 6,
        "warmup_steps": 1,
        "log_every": 1,
        "head_lr": 1e-3,
    },
    "evaluate": {
        "sets": {"scenes": "data/sets/scenes"},
        "retrieval": {"heldout": ["data/heldout/*.tar"]},
        "compare": {"teacher": "run:teacher"},
    },
    "machine": {"workers": 0, "threads": 1, "checkpoint_minutes": 1e-6},  # a checkpoint after every step
}
STAGES = ("embed", "balance", "cluster", "distill", "evaluate", "draw", "report")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, and the state it begins from."""

    name: str
    before: str
    """The state it begins in: `data`, or the stage that was the last."""
    arguments: tuple[str, ...]
    whole_is_refused: bool = False
    """Whether a second call is refused because the result is there."""


CASES = (
    *(
        Case(stage, before, (stage, "run", *(("--recipe", "student.yaml") if stage == "embed" else ())))
        for before, stage in zip(("data", *STAGES), STAGES, strict=False)
    ),
    Case("embed, two workers", "data", ("embed", "run", "--recipe", "student.yaml", "--machine.workers", "2")),
    Case("distill, two workers", "cluster", ("distill", "run", "--machine.workers", "2")),
    Case("embed --force", "report", ("embed", "run", "--force")),
    Case("balance, other threshold", "report", ("balance", "run", "--balance.threshold", "0.001")),
    Case("cluster, other number", "report", ("cluster", "run", "--cluster.num-centers", "3")),
    Case("distill, other rate", "report", ("distill", "run", "--distill.lr", "0.002")),
    Case("evaluate --force", "report", ("evaluate", "run", "--force")),
    Case("draw --force", "report", ("draw", "run", "--force")),
    Case("report --no-images", "report", ("report", "run", "--no-images")),
    Case("balance --sweep", "report", ("balance", "run", "--sweep")),
    Case("run", "data", ("run", "run", "--recipe", "student.yaml")),
    Case("run, other threshold", "report", ("run", "run", "--balance.threshold", "0.001")),
    Case("subset --shards", "report", ("subset", "run", "subset", "--shards", "--shard-size", "5")),
    Case("export", "report", ("export", "run", "exported")),
    Case(
        "ablate", "data", ("ablate", "threshold", "student.yaml", "table", "--seeds", "1", "--values", "0.001", "0.002")
    ),
    Case("sample", "data", ("sample", "more", "--pairs", "20")),
    Case("init", "data", ("init", "new.yaml"), whole_is_refused=True),
)


def read_tars(folder: Path) -> dict[str, dict[str, bytes]]:
    """The samples of tars by key: extension -> content."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(stem, {})[suffix] = content.read()
    return samples


def _split(folder: Path) -> None:
    """The one tar of so small a sample as several, so that embed has shards to resume at."""
    samples = list(read_tars(folder).items())
    for path in folder.glob("*.tar"):
        path.unlink()
    for number, start in enumerate(range(0, len(samples), PAIRS // 3)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for stem, files in samples[start : start + PAIRS // 3]:
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


class Cases:
    """The states, the undisturbed result of each command, and a folder in which they are tried."""

    def __init__(
        self, scratch: Path, commands: Commands, makers: Mapping[str, Callable[["Cases"], None]] | None = None
    ) -> None:
        self.commands, self._makers = commands, makers or {}
        self._states, self.here = scratch / "states", scratch / "here"  # one path in all trials: it is in some results
        self._undisturbed: dict[str, tuple[Ended, Mapping[str, str]]] = {}

    def expected(self, case: Case) -> Mapping[str, str]:
        """What the undisturbed command leaves."""
        return self._of(case)[1]

    def said(self, case: Case) -> Ended:
        """How the undisturbed command ends."""
        return self._of(case)[0]

    def begin(self, case: Case) -> None:
        """Put the folder into the case's state."""
        self.restore(case.before)

    def run(self, case: Case, harm: Harm | None = None, *, kill_after: float | None = None) -> Ended:
        return self.commands.run(case.arguments, self.here, harm=harm, kill_after=kill_after)

    def restore(self, state: str) -> None:
        """Put the folder into a state."""
        if not (self._states / state).exists():
            self._make(state)
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self._states / state, self.here, symlinks=True)

    def _of(self, case: Case) -> tuple[Ended, Mapping[str, str]]:
        if case.name not in self._undisturbed:
            self.begin(case)
            ended = self.run(case)
            assert ended.code == 0, ended.stderr
            self._undisturbed[case.name] = ended, results.contents(self.here)
        return self._undisturbed[case.name]

    def _make(self, state: str) -> None:
        """Make a state, from the one before it."""
        if state in self._makers:
            self._makers[state](self)
        elif state == "data":
            self.here.mkdir(parents=True, exist_ok=True)
            for name, content in (("tiny.json", TINY), ("teacher.yaml", TEACHER), ("student.yaml", STUDENT)):
                (self.here / name).write_text(json.dumps(content))  # which is YAML too
            self._must("sample", "data", "--pairs", str(PAIRS))
            _split(self.here / "data" / "pairs")
            captions = {stem: files["txt"].decode() for stem, files in read_tars(self.here / "data" / "pairs").items()}
            (self.here / CAPTIONS).write_text(json.dumps(captions))
            self._must("distill", "teacher", "--recipe", "teacher.yaml")
        else:
            case = CASES[STAGES.index(state)]
            self.restore(case.before)
            self._must(*case.arguments)
        shutil.copytree(self.here, self._states / state, symlinks=True)

    def _must(self, *arguments: str) -> None:
        ended = self.commands.run(arguments, self.here)
        assert ended.code == 0, ended.stderr
