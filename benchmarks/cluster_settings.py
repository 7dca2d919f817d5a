"""What sigma, the weights and tau of the cluster losses do on real pairs.

Embeddings, kept rows and clusters are made once, in OUT/shared, by the recipe; every run takes them over and does `distill`
and `evaluate` of the student alone. A seed decides weights, order, crops and captions, so variants of one seed are
paired. The balanced pairs are the same for all, `clip-only` included.
"""

import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from clip_cid import pipeline
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.recipe import PRESETS, Recipe, parse_recipe, read_recipe
from clip_cid.run_folder import RunFolder

OURS = "1/1, sigma 16"
_LAST_LINES = 10  # a single batch is noisy: the end of a run is the mean of its last lines of metrics


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings of the cluster losses; all else is the recipe's."""

    cls: float = 1.0
    kl: float = 1.0
    sigma: float = 16.0
    tau: float = 1.0
    instance: float = 0.5

    def applied(self, values: dict[str, Any]) -> dict[str, Any]:
        weights = {
            "clip": 1.0,
            "cluster_cls": self.cls,
            "cluster_kl": self.kl,
            "instance_image": self.instance,
            "instance_text": self.instance,
        }
        return {**values, "weights": weights, "head_scale": self.sigma, "temperature": self.tau}


def _preset(name: str, sigma: float) -> Variant:
    weights = PRESETS[name].weights
    return Variant(weights["cluster_cls"], weights["cluster_kl"], sigma, instance=weights["instance_image"])


VARIANTS = {
    OURS: Variant(),
    "clip-only": _preset("clip-only", 16),
    "no cluster loss": Variant(0, 0),
    "1/1, sigma 1": Variant(sigma=1),
    "1/1, sigma 8": Variant(sigma=8),
    "1/1, sigma 32": Variant(sigma=32),
    "paper-r1, sigma 16": _preset("paper-r1", 16),
    "paper-r2, sigma 16": _preset("paper-r2", 16),
    "0.5/8, sigma 16, tau 4": Variant(0.5, 8, tau=4),
    "paper-r1, sigma 1": _preset("paper-r1", 1),
    "paper-r2, sigma 1": _preset("paper-r2", 1),
}
SCORES = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "image_to_text_R@10": "image to text R@10",
    "text_to_image_R@10": "text to image R@10",
}
SIGNS = {
    "loss/cluster_cls": "L_cls",
    "loss/cluster_kl": "L_kl",
    "own_center": "own center",
    "mean_image_norm": "mean image norm",
}


def settings(
    recipe: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    only: tuple[str, ...] = (),
    steps: int | None = None,
    jobs: int = 2,
    threads: int = 1,
    workers: Annotated[int, tyro.conf.arg(help="processes that decode images, for each job; 0 decodes in the job")] = 0,
    table: Annotated[bool, tyro.conf.arg(help="print the tables of what there is; run nothing")] = False,
) -> None:
    """Train and evaluate every variant with every seed; paths of the recipe are relative to the working folder."""
    page = _student_alone(read_recipe(recipe), steps=steps, threads=threads, workers=workers)
    chosen = only or tuple(VARIANTS)
    if not table:
        shared = RunFolder(out / "shared")
        for stage in ("embed", "balance", "cluster"):
            pipeline.run(shared, page, only=stage)
        _run_all(page, out, [(name, seed) for seed in seeds for name in chosen], jobs=jobs)
    lines = [line for line in _finished(page, out) if line["variant"] in chosen and line["seed"] in seeds]
    print("\n".join(_tables(lines, out / "shared")))


def _student_alone(page: Recipe, *, steps: int | None, threads: int, workers: int) -> Recipe:
    """The recipe with the student as the only model evaluated, on the sets whose mean docs/results.md gives."""
    values = page.model_dump(mode="json")
    values["evaluate"]["compare"] = {}
    values["evaluate"]["sets"].pop("digits", None)
    if steps is not None:
        values["distill"] |= {"steps": steps, "warmup_steps": steps // 10}
    values["machine"] |= {"threads": threads, "workers": workers}
    return parse_recipe(values, where="settings")


def _finished(page: Recipe, out: Path) -> list[dict[str, Any]]:
    """Lines of earlier runs of the same length."""
    return [line for line in _read(out / "runs.jsonl") if page.distill.steps in (None, line["steps"])]


def _run_all(page: Recipe, out: Path, runs: list[tuple[str, int]], *, jobs: int) -> None:
    done = {(line["variant"], line["seed"]) for line in _finished(page, out)}
    todo = [run for run in runs if run not in done]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are done, {len(todo)} to do, {jobs} at a time", flush=True)
    os.environ |= {name: str(page.machine.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(_run_one, _recipe_of(page, out, *run), out, *run) for run in todo]
        for future in as_completed(futures):
            line = future.result()
            with open(out / "runs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps({name: line[name] for name in ("variant", "seed", "seconds", *SCORES)}), flush=True)


def _recipe_of(page: Recipe, out: Path, name: str, seed: int) -> Recipe:
    values, shared = page.model_dump(mode="json"), (out / "shared").resolve()
    values["embed"]["existing"] = str(shared / "embed")
    values["balance"]["existing"] = str(shared / "balance" / "kept.npy")
    values["cluster"]["existing"] = str(shared / "cluster")
    values["distill"] = VARIANTS[name].applied(values["distill"]) | {"seed": seed}
    return parse_recipe(values, where=name)


def _run_one(page: Recipe, out: Path, name: str, seed: int) -> dict[str, Any]:
    folder = RunFolder(out / "runs" / f"{name.replace(', ', '_').replace(' ', '').replace('/', '-')}_seed{seed}")
    folder.path.mkdir(parents=True, exist_ok=True)
    _quiet(folder.path / "output.log")
    for stage in ("distill", "evaluate"):
        pipeline.run(folder, page, only=stage)
    summary = {stage: record.summary for stage in ("distill", "evaluate") if (record := folder.record(stage))}
    results = list(_read(folder.stage("evaluate") / "results.jsonl"))
    metrics = list(_read(folder.stage("distill") / "metrics.jsonl"))
    return {
        "variant": name,
        "seed": seed,
        "steps": summary["distill"]["steps"],
        "seconds": summary["distill"]["seconds"],
        **_scores(results),
        **{sign: _end_of(metrics, sign) for sign in SIGNS},
        "results": [{part: row[part] for part in ("set", "task", "metric", "score")} for row in results],
    }


def _quiet(path: Path) -> None:
    """Send everything this process prints to a file: several runs at once would mix their progress bars."""
    with open(path, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _scores(results: list[dict[str, Any]]) -> dict[str, float]:
    found = {row["metric"]: row["score"] for row in results if row["task"] == "retrieval"}
    for task in ("zero_shot", "linear_probe"):
        found[task] = statistics.mean(row["score"] for row in results if row["task"] == task)
    return {score: found[score] for score in SCORES}


def _end_of(metrics: list[dict[str, Any]], sign: str) -> float | None:
    values = [line[sign] for line in metrics[-_LAST_LINES:] if sign in line]
    return statistics.mean(values) if values else None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _tables(lines: list[dict[str, Any]], shared: Path) -> Iterator[str]:
    """Scores; signs at the end of the run; differences to our default, seed by seed. Mean and, in brackets, half the range."""
    runs = {name: {line["seed"]: line for line in lines if line["variant"] == name} for name in VARIANTS}
    runs = {name: of_name for name, of_name in runs.items() if of_name}
    yield from _table(
        "variant", runs, SCORES, lambda of_name, score: _spread([100 * run[score] for run in of_name.values()])
    )
    perplexity = functools.cache(functools.partial(teacher_perplexity, shared))
    signs = {**SIGNS, "perplexity": "teacher perplexity"}
    for name, of_name in runs.items():
        used = VARIANTS[name].cls or VARIANTS[name].kl
        for run in of_name.values():
            run["perplexity"] = perplexity(VARIANTS[name].sigma / VARIANTS[name].tau) if used else None
    yield from _table(
        "end of training", runs, signs, lambda of_name, sign: _known([run[sign] for run in of_name.values()])
    )
    ours = runs.get(OURS, {})
    others = {name: of_name for name, of_name in runs.items() if name != OURS and of_name.keys() & ours.keys()}
    yield from _table(f"minus {OURS}", others, SCORES, lambda of_name, score: _difference(of_name, ours, score))


def _table(
    title: str,
    runs: dict[str, dict[int, dict[str, Any]]],
    columns: dict[str, str],
    cell: Callable[[dict[int, dict[str, Any]], str], str],
) -> Iterator[str]:
    yield f"| {title} | seeds | " + " | ".join(columns.values()) + " |"
    yield "|---|---|" + "---|" * len(columns)
    for name, of_name in runs.items():
        yield f"| {name} | {len(of_name)} | " + " | ".join(cell(of_name, column) for column in columns) + " |"
    yield ""


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({(max(values) - min(values)) / 2:.1f})"


def _known(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3g}" if known else "-"


def _difference(of_name: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]], score: str) -> str:
    """Mean over the seeds both have, plus or minus its standard error."""
    each = [100 * (of_name[seed][score] - ours[seed][score]) for seed in sorted(of_name.keys() & ours.keys())]
    error = f" ± {statistics.stdev(each) / len(each) ** 0.5:.1f}" if len(each) > 1 else ""
    return f"{statistics.mean(each):+.1f}{error}"


def teacher_perplexity(shared: Path, scale: float) -> float:
    """How many centers the teacher's distribution is as wide as: exp of its mean entropy over the kept images, all centers."""
    kept = np.load(shared / "balance" / "kept.npy")
    images = torch.from_numpy(EmbeddingStore.open(shared / "embed").images.select(kept)[:].astype(np.float32))
    centers = torch.from_numpy(np.load(shared / "cluster" / "centers.npy").astype(np.float32))
    logits = scale * torch.nn.functional.normalize(images, dim=1) @ centers.T
    return float(torch.distributions.Categorical(logits=logits).entropy().mean().exp())
