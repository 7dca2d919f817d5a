"""The collapse that the paper warns of, small: on made-up points, or on the teacher's embeddings of a run.

Head and student learn from the cluster losses alone. `not detached` lets the gradient of `L_kl` reach the head through the
teacher's side too, which the product never does: so the losses are written out here, densely, for autograd.

- Made up: latent points of unevenly sized classes; the teacher's embedding is a random network of the point plus one direction that
  all share, the student is a small network that sees the point through noise. k-NN is on the classes.
- `--run`: the kept images of a run, its embeddings, centers and labels; the student sees 16 x 16 pixels. k-NN is on 30 coarse
  clusters of the teacher's embeddings, for lack of true classes.
"""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.method.cluster.clustering import spherical_kmeans
from clip_cid.method.distill.collapse import CollapseAlarm
from clip_cid.recipe import read_recipe
from clip_cid.run_folder import RunFolder

POINTS, TEST_POINTS, CLASSES, CENTERS = 12_000, 2_000, 60, 300
LATENT, SEEN, DIM, COARSE = 16, 32, 32, 30
BATCH, RATE, SIGMA = 256, 1e-3, 16.0
_EVERY = 10
_NEIGHBORS = 20
_HEALTHY = "R2, centers, frozen"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the head starts and learns, and which loss leads."""

    cls: float
    kl: float
    detached: bool = True
    head_rate: float = RATE
    random_rows: bool = False


VARIANTS = {
    "R2, centers, not detached": Variant(0.001, 0.999, detached=False),
    "KL only, centers, not detached": Variant(0, 1, detached=False),
    "R2, random rows, not detached": Variant(0.001, 0.999, detached=False, random_rows=True),
    "KL only, random rows, not detached": Variant(0, 1, detached=False, random_rows=True),
    "R2, centers, not detached, head at 1e-6": Variant(0.001, 0.999, detached=False, head_rate=1e-6),
    "1/1, centers, not detached": Variant(1, 1, detached=False),
    "R2, centers, detached": Variant(0.001, 0.999),
    "R2, random rows, detached": Variant(0.001, 0.999, random_rows=True),
    _HEALTHY: Variant(0.001, 0.999, head_rate=0),
    "1/1, centers, frozen": Variant(1, 1, head_rate=0),
    "1/1, centers, detached": Variant(1, 1),
    "R1, centers, frozen": Variant(0.999, 0.001, head_rate=0),
    "R1, random rows, detached": Variant(0.999, 0.001, random_rows=True),
}


class Task(NamedTuple):
    """What all runs of a table share."""

    steps: int
    noise: float
    cone: float
    run: Path | None

    @property
    def name(self) -> str:
        data = f"noise {self.noise:g} cone {self.cone:g}" if self.run is None else f"of {self.run.name}"
        return f"steps {self.steps} {data}"


@dataclasses.dataclass(frozen=True)
class Data:
    """Points as both networks see them; the last `TEST_POINTS` are for testing."""

    seen: Tensor
    teacher: Tensor
    classes: Tensor
    centers: Tensor
    labels: Tensor


def collapse(
    out: tyro.conf.Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1_500,
    noise: float = 2.0,
    cone: float = 0.5,
    run: Path | None = None,
    threads: int = 1,
    curves: tuple[Path, ...] = (),
) -> None:
    """Train every variant with every seed and print where it ends and when the alarm fires.

    Args:
        out: Folder of the curves, one file a run; a finished run is not repeated.
        seeds: Of data, weights and order.
        steps: How long each run is.
        noise: How badly the student sees, against a latent point of unit spread: with 1 it sees too well to collapse.
        cone: Length of the direction that all of the teacher's embeddings share, against unit spread of the rest.
        run: A run folder with finished embed, balance and cluster stages, instead of made-up data.
        threads: CPU threads.
        curves: metrics.jsonl of other runs, all healthy, on which the alarm must stay silent.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    task = Task(steps, noise, cone, run)
    runs = {(name, seed): _run(out, name, seed, task) for seed in seeds for name in VARIANTS}
    print("\n".join(_table(runs, seeds)))
    for path in curves:
        lines = _read(path)
        found = first_alarm(lines, patience=int(lines[-1]["step"]) // 5)
        print(f"{path}: {'silent' if found is None else f'step {found[0]}: {found[1]}'}")


def _run(out: Path, name: str, seed: int, task: Task) -> list[dict[str, float]]:
    file = f"{name} seed {seed} {task.name}.jsonl"
    path = out / file.replace(", ", "_").replace(" ", "-").replace("/", "-")
    if not path.is_file():
        started, lines = time.perf_counter(), list(_train(_data(task, seed), VARIANTS[name], seed, task.steps))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{path.name}: {time.perf_counter() - started:.1f} s", flush=True)
    return _read(path)


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@functools.lru_cache(maxsize=1)
def _data(task: Task, seed: int) -> Data:
    """Data of a seed; the same for all variants."""
    if task.run is None:
        return _made_up(task, seed)
    real = _of_run(task.run)
    order = torch.randperm(len(real.seen), generator=torch.Generator().manual_seed(seed))
    shuffled = {name: getattr(real, name)[order] for name in ("seen", "teacher", "classes", "labels")}
    return dataclasses.replace(real, **shuffled)


@functools.cache
def _of_run(path: Path) -> Data:
    folder, recipe = RunFolder(path), read_recipe(path / "recipe.yaml")
    kept = np.load(folder.stage("balance") / "kept.npy")
    pairs = open_pairs(recipe.pairs, index=path / "index")
    images = (decode_image(pairs.read(int(row)).image, max_pixels=recipe.pairs.max_pixels) for row in kept)
    pixels = np.stack([np.asarray(image.resize((16, 16)), dtype=np.float32).ravel() for image in images])
    seen = (pixels - pixels.mean(axis=0)) / pixels.std(axis=0)
    teacher = EmbeddingStore.open(folder.stage("embed")).images.select(kept)[:].astype(np.float32)
    coarse = spherical_kmeans(teacher, num_centers=COARSE, seed=0).labels
    centers, labels = (np.load(folder.stage("cluster") / f"{name}.npy") for name in ("centers", "labels"))
    arrays = (seen, teacher, coarse.astype(np.int64), centers.astype(np.float32), labels.astype(np.int64))
    found = Data(*map(torch.from_numpy, arrays))
    return dataclasses.replace(found, teacher=F.normalize(found.teacher, dim=1))


def _made_up(task: Task, seed: int) -> Data:
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    share = 1 / torch.arange(1, CLASSES + 1) ** 0.5
    classes = torch.multinomial(share, POINTS + TEST_POINTS, replacement=True, generator=random)
    latent = 1.5 * normal(CLASSES, LATENT)[classes] + normal(POINTS + TEST_POINTS, LATENT)
    hidden = torch.tanh(latent @ normal(LATENT, 64) / LATENT**0.5)
    cone = task.cone * DIM**0.5 * F.normalize(normal(DIM), dim=0)
    teacher = F.normalize(hidden @ normal(64, DIM) / 64**0.5 + cone, dim=1)
    seen = latent @ normal(LATENT, SEEN) / LATENT**0.5 + task.noise * normal(POINTS + TEST_POINTS, SEEN)
    found = spherical_kmeans(teacher[:POINTS].numpy(), num_centers=CENTERS, iterations=10, seed=seed)
    return Data(
        seen, teacher, classes, torch.from_numpy(found.centers), torch.from_numpy(np.asarray(found.labels)).long()
    )


def _train(data: Data, variant: Variant, seed: int, steps: int) -> Iterator[dict[str, float]]:
    """A line every few steps, in the names of metrics.jsonl; `knn` at some of them."""
    torch.manual_seed(seed)
    seen, dim = data.seen.shape[1], data.teacher.shape[1]
    student = nn.Sequential(nn.Linear(seen, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, dim))
    rows = F.normalize(torch.randn_like(data.centers), dim=1) if variant.random_rows else data.centers
    head = nn.Parameter(rows.clone(), requires_grad=variant.head_rate > 0)
    groups = [{"params": list(student.parameters()), "weight_decay": 0.2, "peak": RATE}]
    if variant.head_rate > 0:
        groups.append({"params": [head], "weight_decay": 0.0, "peak": variant.head_rate})
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share(step, steps)
        batch = torch.randint(len(data.seen) - TEST_POINTS, (BATCH,))
        image = F.normalize(student(data.seen[batch]), dim=1)
        logits, ce, kl = _losses(image, data.teacher[batch], data.labels[batch], head, detached=variant.detached)
        optimizer.zero_grad()
        (variant.cls * ce + variant.kl * kl).backward()
        optimizer.step()
        if (step + 1) % _EVERY == 0:
            moved = torch.linalg.vector_norm(head.detach() - rows) / torch.linalg.vector_norm(rows)
            line = {
                "step": step + 1,
                "loss/cluster_cls": ce.item(),
                "loss/cluster_kl": kl.item(),
                "own_center": (logits.argmax(dim=1) == data.labels[batch]).float().mean().item(),
                "mean_image_norm": torch.linalg.vector_norm(image.detach().mean(dim=0)).item(),
                "head_drift": moved.item(),
                "centers": len(data.centers),
            }
            last = step + 1 == steps
            yield {**line, "knn": _knn(student, data)} if last or (step + 1) % (10 * _EVERY) == 0 else line


def _share(step: int, steps: int) -> float:
    warmup = steps // 10
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _losses(
    image: Tensor, teacher: Tensor, labels: Tensor, head: Tensor, *, detached: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the student, `L_cls` and `L_kl`; all centers, nothing sampled."""
    rows = F.normalize(head, dim=1)
    logits, theirs = SIGMA * image @ rows.T, SIGMA * teacher @ rows.T
    target = F.log_softmax(theirs.detach() if detached else theirs, dim=1)
    kl = F.kl_div(F.log_softmax(logits, dim=1), target, log_target=True, reduction="batchmean")
    return logits, F.cross_entropy(logits, labels), kl


@torch.no_grad()
def _knn(student: nn.Module, data: Data) -> float:
    """Share of the test points whose class most of their nearest training points have."""
    embedding = F.normalize(student(data.seen), dim=1)
    train, test = embedding[:-TEST_POINTS], embedding[-TEST_POINTS:]
    nearest = (test @ train.T).topk(_NEIGHBORS, dim=1).indices
    votes = F.one_hot(data.classes[nearest], int(data.classes.max()) + 1).sum(dim=1)
    return (votes.argmax(dim=1) == data.classes[-TEST_POINTS:]).float().mean().item()


def first_alarm(lines: list[dict[str, float]], *, patience: int) -> tuple[int, str] | None:
    """The step at which the alarm fires, and what it says."""
    alarm = CollapseAlarm(patience=patience)
    for line in lines:
        message = alarm.update(
            int(line["step"]),
            mean_image_norm=line["mean_image_norm"],
            own_center=line.get("own_center"),
            cluster_kl=line.get("loss/cluster_kl"),
            head_drift=line.get("head_drift"),
            centers=line.get("centers"),
        )
        if message is not None:
            return int(line["step"]), message
    return None


def _table(runs: dict[tuple[str, int], list[dict[str, float]]], seeds: tuple[int, ...]) -> Iterator[str]:
    """Means over the seeds at the end of the runs; k-NN against a frozen head, seed by seed; when the alarm fired."""
    columns = {
        "loss/cluster_cls": "L_cls",
        "loss/cluster_kl": "L_kl",
        "own_center": "own center",
        "mean_image_norm": "mean image norm",
        "head_drift": "drift",
        "knn": "k-NN",
    }
    yield "| head | " + " | ".join(columns.values()) + " | k-NN minus frozen | alarm at step |"
    yield "|---|" + "---|" * (len(columns) + 2)
    for name in VARIANTS:
        of_seed = [runs[name, seed] for seed in seeds]
        means = [f"{statistics.mean(_end(lines, column) for lines in of_seed):.3g}" for column in columns]
        knn = [runs[name, seed][-1]["knn"] - runs[_HEALTHY, seed][-1]["knn"] for seed in seeds]
        found = [first_alarm(lines, patience=int(lines[-1]["step"]) // 5) for lines in of_seed]
        steps = ", ".join("-" if alarm is None else f"{alarm[0]} ({alarm[1].partition(':')[0]})" for alarm in found)
        yield f"| {name} | {' | '.join(means)} | {min(knn):+.3f} to {max(knn):+.3f} | {steps} |"


def _end(lines: list[dict[str, float]], column: str) -> float:
    """Mean of the last ten lines that have it: one batch is noisy."""
    if column == "knn":
        return lines[-1]["knn"]
    return statistics.mean(line[column] for line in lines[-10:])
