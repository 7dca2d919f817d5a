"""Our zero-shot against CLIP_benchmark's, image by image, and its own command on the folder our export makes.

CLIP_benchmark lives in an environment of its own (it does not run with every numpy). Every set of an evaluated run that lies in
CLIP_benchmark's layout is classified there by its code and by its command line, in float32, with the exported model.
"""

import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from clip_cid.evaluation.results import ANSWERS, RESULTS
from clip_cid.models.export import copy_student
from clip_cid.recipe import read_recipe

_THEIRS = """
import sys
import numpy as np
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from clip_benchmark.models import load_clip
model_name, root, out = sys.argv[1:]
model, transform, tokenizer = load_clip("open_clip", model_name, "", None, "cpu")
model.eval()
data = build_dataset("wds/set", root=root, transform=transform, split="test")
weights = zero_shot_classifier(model, tokenizer, data.classes, data.templates, "cpu", amp=False)
loader = torch.utils.data.DataLoader(data.batched(256), batch_size=None)
logits, labels = run_classification(model, weights, loader, "cpu", amp=False)
np.savez(out, predicted=logits.argmax(dim=1).numpy(), labels=labels.numpy())
"""


def agreement(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    clip_benchmark_python: Annotated[Path, tyro.conf.arg(help="the Python that has clip-benchmark")],
    model: Annotated[str | None, tyro.conf.arg(help="which of the models; the first when absent")] = None,
) -> None:
    """Compare one model of a run that was evaluated; its reference must be run: or local-dir:."""
    rows = [json.loads(line) for line in (run / "evaluate" / RESULTS).read_text().splitlines()]
    model = str(model or rows[0]["model"])
    recipe = read_recipe(run / "recipe.yaml")
    folder = out / "export"
    copy_student(_student(run, recipe.evaluate.compare.get(model)), folder)
    print(
        "| set | images | classes | same answers | acc1 here / there | acc5 | mean per class |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        root = Path(recipe.evaluate.sets.get(row["set"], ""))
        if row["model"] == model and row["task"] == "zero_shot" and (root / "classnames.txt").is_file():
            _compare(row, root, run, folder, out, clip_benchmark_python)


def _student(run: Path, reference: str | None) -> Path:
    if reference is None:
        return run / "distill" / "student"
    kind, _, path = reference.partition(":")
    return {"run": Path(path) / "distill" / "student", "local-dir": Path(path)}[kind]


def _compare(row: dict[str, Any], root: Path, run: Path, folder: Path, out: Path, python: Path) -> None:
    source = f"local-dir:{folder.resolve()}"
    answers, result = out / f"{row['set']}.npz", out / f"{row['set']}.json"
    subprocess.run([python, "-c", _THEIRS, source, root, answers], check=True, capture_output=True)
    command = [
        "-m",
        "clip_benchmark.cli",
        "eval",
        "--model",
        source,
        "--pretrained",
        "",
        "--dataset",
        f"wds/{row['set']}",
    ]
    options = ["--dataset_root", root, "--task", "zeroshot_classification", "--no_amp", "--output", result]
    subprocess.run([python, *command, *options, "--num_workers", "0"], check=True, capture_output=True)
    metrics = json.loads(result.read_text())["metrics"]
    with np.load(answers) as theirs, np.load(run / "evaluate" / ANSWERS / row["answers"]) as ours:
        assert (theirs["labels"] == ours["labels"]).all()
        same = int((theirs["predicted"] == ours["predicted"]).sum())
    top5 = "-" if row["top5"] is None else f"{row['top5']:.5f} / {metrics['acc5']:.5f}"
    print(
        f"| {row['set']} | {row['n']:,} | {row['classes']} | {same:,} | {row['top1']:.5f} / {metrics['acc1']:.5f} | {top5} "
        f"| {row['mean_per_class']:.5f} / {metrics['mean_per_class_recall']:.5f} |"
    )


if __name__ == "__main__":
    tyro.cli(agreement)
