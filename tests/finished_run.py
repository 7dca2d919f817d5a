"""A run folder as a finished run leaves it, with a student of a few thousand weights that was never trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip_cid.models.clip import Clip
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.recipe import parse_recipe
from clip_cid.run_folder import RunFolder, StageRecord, write_json

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
LOCAL = "/home/ada/secret"
RECIPE: dict[str, Any] = {
    "pairs": {"source": [f"{LOCAL}/pairs/{{00..09}}.tar", "https://ada:pw@host.example/x/more.tar?sig=SECRET/x"]},
    "embed": {"teacher": f"local-dir:{LOCAL}/teacher", "existing": f"{LOCAL}/store"},
    "balance": {"grow_from": f"{LOCAL}/earlier/balance", "threshold": 0.05},
    "distill": {"student": f"{LOCAL}/models/tiny.json", "steps": 3, "batch_size": 16},
    "evaluate": {
        "sets": {"cifar|10": f"{LOCAL}/cifar", "flowers": "~/ada/flowers"},
        "compare": {"base": "ViT-B-32/laion400m_e32", "old": f"run:{LOCAL}/runs/old"},
    },
    "report": {"title": "ada's secret"},
}

CLUSTERS: dict[str, Any] = {
    "images": 900,
    "centers": 64,
    "empty": 0,
    "singletons": 0,
    "smallest": 3,
    "median": 14.0,
    "largest": 40,
    "gini": 0.25,
    "size_quantiles": {},
    "within_cosine": None,
    "all_pairs_cosine": None,
    "margin_quantiles": {},
    "margin_sample": 0,
}


def tiny(folder: Path, *, seed: int = 1, **changed: Any) -> Clip:
    (folder / "tiny.json").write_text(json.dumps(TINY | changed))
    return build_student(str(folder / "tiny.json"), embed_dim=None, seed=seed)


def finished_run(path: Path, *, seed: int = 1, head: bool = True, evaluated: bool = True) -> RunFolder:
    """Embed, balance, cluster, distill and (on request) evaluate, each with a record of made-up numbers."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    recipe = parse_recipe(RECIPE, where="test").model_dump(mode="json", exclude={"machine"})
    embed = {"images": 1234, "ok": 1200, "dim": 12, "teacher": "none", "bytes": 9, "skipped": {}, "images_per_s": None}
    publish(run, "embed", embed, ())
    balance = {
        "images": 1234,
        "ok": 1200,
        "sets_with_duplicates": 100,
        "largest_set": 9,
        "kept": 900,
        "removed": 300,
        "removed_share": 0.25,
        "threshold": {"cosine": 0.05, "squared_euclidean": 0.1, "euclidean": 0.316},
    }
    publish(run, "balance", balance, ("embed",))
    publish(run, "cluster", CLUSTERS, ("embed", "balance"))
    part = run.begin("distill", {"key": "distill-1"}, resumable=False).part
    provenance = {
        "recipe": recipe,
        "steps": 3,
        "pairs_seen": 48,
        "teacher": {
            "reference": f"local-dir:{LOCAL}/teacher",
            "weights_sha256": "abc123",
            "model_cfg": {},
            "precision": "fp32",
        },
        "versions": {"torch": "9.9"},
    }
    head_state = {"head.weight": torch.full((64, 12), 0.5)} if head else {}
    export_student(tiny(path, seed=seed), part / "student", head_state=head_state, provenance=provenance)
    (path / "tiny.json").unlink()
    summary = {
        "steps": 3,
        "pairs": 890,
        "pairs_seen": 48,
        "epochs": 0.0539,
        "unreadable_pairs": 0,
        "skipped_steps": 0,
        "processes": 1,
        "seconds": 1.0,
        "pairs_per_s": 48.0,
        "data_wait_share": 0.0,
        "collapse_alarm": False,
        "peak_memory_gib": 0.5,
        "device": "cpu",
        "precision": "float32",
        "parameters": {"image": 20_000, "text": 400_000},
    }
    run.publish(record("distill", summary, results(run, "embed", "balance", "cluster")))
    if evaluated:
        part = run.begin("evaluate", {"key": "evaluate-1"}, resumable=False).part
        _results(part)
        run.publish(record("evaluate", {}, results(run, "distill"), settings={"evaluate": recipe["evaluate"]}))
    return run


def publish(run: RunFolder, stage: str, summary: dict[str, Any], needs: Sequence[str], *, version: int = 1) -> None:
    run.begin(stage, {"key": f"{stage}-{version}"}, resumable=False)
    run.publish(record(stage, summary, results(run, *needs), version=version))


def results(run: RunFolder, *stages: str) -> dict[str, str]:
    """What a stage that reads these notes as its inputs."""
    found = {stage: run.record(stage) for stage in stages}
    return {stage: record.results for stage, record in found.items() if record is not None}


def record(
    stage: str,
    summary: dict[str, Any],
    inputs: dict[str, str],
    *,
    version: int = 1,
    settings: dict[str, Any] | None = None,
) -> StageRecord:
    return StageRecord(
        stage=stage,
        key=f"{stage}-{version}",
        version=1,
        settings=settings or {},
        inputs=inputs,
        summary=summary,
        versions={"clip-cid": "0.1.0", "open_clip_torch": "3.3.0"},
        device="cpu",
        started="2026-11-21T10:00:00+00:00",
        seconds=1.0,
    )


def _results(folder: Path) -> None:
    rows = [
        _row("student", "cifar|10", "zero_shot", 0.5), _row("base", "cifar|10", "zero_shot", 0.625),
        _row("student", "cifar|10", "linear_probe", 0.75), _row("student", "heldout", "retrieval", 0.25),
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("zero_shot", "linear_probe", "retrieval"):
        missing = {"flowers": f"{LOCAL}/flowers is not there"} if task == "zero_shot" else {}
        write_json(folder / f"{task}.json", {"mean": {}, "mean_of": "1/2", "missing": missing, "differences": []})


def _row(model: str, name: str, task: str, score: float) -> dict[str, Any]:
    return {
        "model": model,
        "set": name,
        "task": task,
        "metric": "image_to_text_R@1" if task == "retrieval" else "top1",
        "score": score,
        "low": score - 0.125,
        "high": score + 0.125,
        "n": 1000,
        "chance": 0.1,
    }
