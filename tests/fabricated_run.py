"""A finished run made in a second: real files of every stage, invented numbers, known duplicates."""

import functools
import json
import tempfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
from PIL import Image
from tiny_sets import folder_set, tiny_clip

from clip_cid.data.balance.forest_file import FOREST_FILE, write_forest
from clip_cid.data.balance.kinds import Kinds
from clip_cid.data.balance.tables import write_tables
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.method.balance.chaining import chain_summary
from clip_cid.method.balance.forest import Forest
from clip_cid.method.balance.semantic_balance import Balance, balance
from clip_cid.method.balance.set_explanation import explain
from clip_cid.method.cluster.cluster_quality import cluster_quality, margin_quantiles, size_quantiles
from clip_cid.method.cluster.clustering import Clusters, spherical_kmeans
from clip_cid.method.unit_rows import UnitRows
from clip_cid.models.clip import Clip
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder, StageRecord, write_json
from clip_cid.summaries import DistillSummary, Parameters, as_json

SQUARED = 0.1
GROUPS, COPIES, LONE, DIM = 4, 3, 32, 16
ROWS = GROUPS * COPIES + LONE
BAD = ROWS - 1
GROUP = "mean of 3/4"
TRAINED = as_json(
    DistillSummary(
        steps=300,
        pairs=14,
        pairs_seen=1200,
        epochs=85.7,
        unreadable_pairs=3,
        skipped_steps=0,
        processes=1,
        seconds=60.0,
        pairs_per_s=20.0,
        data_wait_share=0.01,
        losses={},
        collapse_alarm=False,
        precision="float32",
        peak_memory_gib=0.5,
        parameters=Parameters(image=20_000, text=400_000),
        device="cpu",
    )
)
HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single'"


def make_recipe(base: Path, **changed: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "pairs": {"source": [str(base / "pairs")]},
        "embed": {"teacher": "run:somewhere/the-teacher"},
        "balance": {"threshold": 0.05},
        "cluster": {"num_centers": 4},
        "distill": {"student": "cid-tiny", "weights": "paper-r1"},
        "evaluate": {
            "sets": {"one": "x", "two": str(base / "set"), "<b>three</b>": "x"},
            "compare": {"baseline": "local-dir:baseline", "teacher": "run:t"},
        },
        "draw": {"gallery_sets": 6},
    }
    return parse_recipe(
        {section: {**values.get(section, {}), **changed.get(section, {})} for section in {*values, *changed}},
        where="test",
    )


PLAIN: dict[str, dict[str, Any]] = {
    "embed": {"teacher": "none"},
    "distill": {"weights": "clip-only"},
    "evaluate": {"compare": {}},
}


def make_run(base: Path, recipe: Recipe) -> RunFolder:
    """Pairs in `base/pairs`, a labelled set in `base/set`, and in `base/run` every stage before `draw` that the recipe uses."""
    _make_pairs(base / "pairs")
    folder_set(base / "set")
    (base / "set" / "templates.txt").write_text("<i>a</i> {c}\nanother {c}\n")
    folder = RunFolder(base / "run")
    folder.path.mkdir()
    if recipe.has_teacher:
        embeddings = _embeddings()
        _embed(folder, recipe, embeddings)
        good = np.arange(ROWS - 1)
        result = balance(embeddings[good], threshold=recipe.balance.threshold)
        kept = result.kept if recipe.balance.enabled else good
        if recipe.balance.enabled:
            _balance(folder, recipe, embeddings[good], result)
        num_centers = recipe.cluster.num_centers
        assert num_centers != "auto"
        clusters = spherical_kmeans(embeddings[kept], num_centers=num_centers)
        part = folder.begin("cluster", {"key": "key"}, resumable=False).part
        np.save(part / "centers.npy", clusters.centers)
        np.save(part / "labels.npy", clusters.labels)
        publish(folder, "cluster", _cluster_summary(embeddings[kept], clusters))
    _distill(folder, recipe)
    if recipe.evaluate.sets:
        _evaluate(folder, recipe)
    return folder


def _cluster_summary(kept: np.ndarray, clusters: Clusters) -> dict[str, Any]:
    quality = cluster_quality(kept, clusters.centers, clusters.labels)
    return {
        "images": len(kept),
        "centers": len(clusters.centers),
        "empty": 0,
        "singletons": 0,
        "smallest": 1,
        "median": 2.0,
        "largest": 9,
        "gini": 0.25,
        "objective": clusters.objective,
        "history": clusters.history,
        "size_quantiles": size_quantiles(np.bincount(clusters.labels, minlength=len(clusters.centers))),
        "within_cosine": quality.within_cosine,
        "all_pairs_cosine": quality.all_pairs_cosine,
        "margin_quantiles": margin_quantiles(quality.margins),
        "margin_sample": len(quality.margins),
        "truth": {"field": "<thing>", "share": 0.8125, "shuffled": 0.25, "rows": 1234, "classes": 6},
    }


def publish(
    folder: RunFolder, stage: str, summary: dict[str, Any], *, settings: dict[str, Any] | None = None, **changed: Any
) -> None:
    """Record what lies in `stage.part/` as the stage's result."""
    record = StageRecord(
        stage=stage,
        key=f"key-of-{stage}",
        version=1,
        settings=settings or {},
        inputs={},
        summary=summary,
        versions={"numpy": "9.9.9"},
        device="cpu",
        started="2026-01-02T03:04:05+00:00",
        seconds=61.5,
    )
    folder.publish(replace(record, **changed))


@functools.cache
def fake_clip(reference: str, *, device: str = "cpu") -> Clip:
    """Stands for a trained model: a random ViT, another one for each reference."""
    seed = zlib.crc32(Path(reference).name.encode())  # of the name alone, as folders differ from test to test
    with tempfile.TemporaryDirectory() as folder:
        return tiny_clip(Path(folder), seed=seed, image_size=32, patch_size=8, width=32, layers=2, head_width=16)


def _make_pairs(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for row in range(ROWS):
        pixels = random.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 16)).save(folder / f"{row:03d}.png")
        caption = f"{HOSTILE} {row}" if row < GROUPS * COPIES else f"picture {row}"
        (folder / f"{row:03d}.txt").write_text(caption, encoding="utf-8")


def _embeddings() -> np.ndarray:
    """Groups of near-duplicates first, then rows on their own, the last of them broken."""
    random = np.random.default_rng(1)
    centers = random.standard_normal((GROUPS + LONE, DIM))
    rows = np.concatenate([np.repeat(centers[:GROUPS], COPIES, axis=0), centers[GROUPS:]])
    rows[: GROUPS * COPIES] += 0.1 * random.standard_normal((GROUPS * COPIES, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[BAD] = 0
    return rows.astype(np.float16)


def _embed(folder: RunFolder, recipe: Recipe, embeddings: np.ndarray) -> None:
    part = folder.begin("embed", {"key": "key"}, resumable=False).part
    pairs = open_pairs(recipe.pairs, index=folder.path / "index")
    writer = StoreWriter(part, teacher={}, dim=DIM, fields=(), num_shards=1)
    writer.add(
        ShardRows(
            name="pairs",
            images=embeddings,
            texts=embeddings,
            more_texts=embeddings[:0],
            ok=np.arange(ROWS) != BAD,
            keys=pairs.keys(0, ROWS),
            captions=[pairs.read(row).captions for row in range(ROWS)],
            sizes=[(24, 16)] * ROWS,
            fields={},
            skipped=[
                {
                    "row": BAD,
                    "key": pairs.key(BAD),
                    "shard": "pairs",
                    "reason": "image <i>cannot</i> be decoded (OSError: 3)",
                }
            ],
        )
    )
    writer.finish()
    publish(
        folder,
        "embed",
        {
            "images": ROWS,
            "ok": ROWS - 1,
            "dim": DIM,
            "teacher": "run:somewhere",
            "bytes": 1000,
            "skipped": {"image <i>cannot</i> be decoded": 1},
            "images_per_s": 5.0,
        },
    )


def _balance(folder: RunFolder, recipe: Recipe, rows: np.ndarray, result: Balance) -> None:
    part = folder.begin("balance", {"key": "key"}, resumable=False).part
    kept, set_of = result.kept, np.append(result.set_of, -1)
    images = UnitRows(rows, name="rows", any_length=False)
    forest = _forest(images, limit=0.2)
    explanation = explain(images, kept, result.set_of, forest, SQUARED)
    write_forest(part / FOREST_FILE, forest)
    # Of each group one is told to be perceptual and one semantic, whatever the pictures show.
    kinds = Kinds(np.resize(np.array([1, 2, 0, 3], dtype=np.int8), int(explanation.removed.sum())))
    write_tables(
        part,
        EmbeddingStore.open(folder.stage("embed")).keys.packed,
        explanation.set_columns("cosine"),
        explanation.member_columns("cosine"),
        metric="cosine",
        threshold=recipe.balance.threshold,
        kinds=kinds.number,
    )
    np.save(part / "kept.npy", kept)
    np.save(part / "set_of.npy", set_of)
    sizes = np.bincount(set_of[set_of >= 0])
    summary = {
        "images": ROWS,
        "ok": ROWS - 1,
        "kept": len(kept),
        "removed": ROWS - 1 - len(kept),
        "removed_share": 1 - len(kept) / (ROWS - 1),
        "sets_with_duplicates": int((sizes > 1).sum()),
        "largest_set": int(sizes.max()),
        "chains": asdict(chain_summary(explanation, rows=len(rows), squared=SQUARED, metric="cosine")),
        "kinds": asdict(kinds.summary()),
        "threshold": {"cosine": 0.05, "squared_euclidean": 0.1, "euclidean": 0.1**0.5},
        "truth": {"field": "dup", "precision": 0.9375, "recall": 0.8125, "redundant_share": 0.2},
    }
    publish(folder, "balance", summary)


def _forest(images: UnitRows, *, limit: float) -> Forest:
    links, squared = oracles.spanning_forest(images[0 : len(images)], limit)
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    return Forest(len(images), ends[:, 0], ends[:, 1], np.array(squared), limit)


def _distill(folder: RunFolder, recipe: Recipe) -> None:
    part = folder.begin("distill", {"key": "key"}, resumable=False).part
    names = [name for name, weight in recipe.distill.weights.model_dump().items() if weight]
    with open(part / "metrics.jsonl", "w", encoding="utf-8") as handle:
        for step in range(10, 310, 10):
            parts = {f"loss/{name}": 2.0 + 1 / step for name in names}
            line = {"step": step, "pairs_seen": 4 * step, "loss": sum(parts.values()), **parts, "lr": 0.1}
            line |= {"pairs_per_s": 1000.0 + step, "data_wait_share": 1 / step, "skipped_steps": 0}
            handle.write(json.dumps(line) + "\n")
    publish(folder, "distill", TRAINED, settings={"distill": recipe.distill.model_dump(mode="json")})


def _evaluate(folder: RunFolder, recipe: Recipe) -> None:
    part = folder.begin("evaluate", {"key": "key"}, resumable=False).part
    with open(part / "results.jsonl", "w", encoding="utf-8") as handle:
        for place, model in enumerate(("student", *recipe.evaluate.compare)):
            for task in ("zero_shot", "linear_probe"):
                for index, name in enumerate(recipe.evaluate.sets):
                    score = 0.3 + 0.1 * index + 0.07 * place
                    line = {"model": model, "set": name, "task": task, "metric": "top1", "score": score}
                    line |= {"low": score - 0.02, "high": score + 0.02, "n": 1234, "classes": 10, "chance": 0.1}
                    handle.write(json.dumps(line) + "\n")
    for task in ("zero_shot", "linear_probe"):
        write_json(part / f"{task}.json", _score_table(recipe))
    summary = {
        "models": {},
        "mean_of": {"zero_shot": "3/4", "linear_probe": "3/4"},
        "missing": {"lost": "lost: no such <folder>"},
        "headline": "student",
    }
    publish(folder, "evaluate", summary)


def _score_table(recipe: Recipe) -> dict[str, Any]:
    """What the evaluate stage says beside the scores: the baseline is 7 points ahead, the teacher 14, each by 3 points."""
    models = ["student", *recipe.evaluate.compare]
    means = {model: 0.4 + 0.07 * place for place, model in enumerate(models)}
    pairs = [(other, 0.07 * place) for place, other in enumerate(models) if place]
    lines = [
        {**where, "model": "student", "other": other, "difference": -gap, "low": -gap - 0.03, "high": -gap + 0.03}
        for other, gap in pairs
        for where in (
            *({"set": name, "metric": "top1"} for name in recipe.evaluate.sets),
            {"group": GROUP, "metric": "mean"},
        )
    ]
    return {
        "mean": means,
        "mean_of": "3/4",
        "groups": [{"title": GROUP, "of": "3/4", "sets": list(recipe.evaluate.sets), "mean": means}],
        "missing": {"lost": "lost: no such <folder>"},
        "differences": lines,
    }
