"""Lines of the device check: every stage on the embedded sample, on the device beside the CPU.

The sample is embedded, balanced, clustered, and a student trained and evaluated on the CPU, in float32. Each stage then
runs on the device on the CPU's results of the stages before it, so that one stage's difference is no other's. The
number of a line is the largest difference as a share of what is allowed; of the balance and the clusters, which must be
the same on every device, it is how many entries differ.

The head takes all centers: a sample of them is drawn by the device's own generator, which has other numbers than the
CPU's.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from device_check_parts import Bar, Line, Outcome, Place, Skipped
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_cid import cli
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.training.ranks.distributed import Ranks, _Gather

# What is allowed. Embeddings are stored in float16, which alone moves a cosine by some 1e-7.
COSINE = {"fp32": 1e-5, "bf16": 5e-3}
"""Cosine distance of an embedding to the CPU's in float32."""
LOSS = 2e-3
"""Relative difference of a step's loss, in float32."""
WEIGHTS = 0.02
"""Of a student's weights after the training: the length of the difference as a share of the weights'."""
IMAGES, IMAGES_SHARE = 2, 0.05
"""So many images of an evaluation set may be answered otherwise, or this share."""

SAMPLE = "sample"
STAGES = ("embed", "balance", "cluster", "distill", "evaluate", "draw", "report")
EXACT = ("balance", "cluster")
SHARE, NONE = Bar(1.0, least=False), Bar(0.0, least=False)


def recipes(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the teacher, and of the student."""
    pairs = {"source": ["data/pairs/*.tar"]}
    machine = {"device": "cpu", "workers": 0, "tensorboard": "off"}
    teacher = {
        "student": "cid-tiny", "weights": "clip-only", "batch_size": 32, "warmup_steps": 1, "precision": "fp32",
        "steps": 4 if place.tiny else 60,
    }  # fmt: skip
    student = {
        "student": "cid-tiny", "weights": "clip-cid", "batch_size": 8 if place.tiny else 32, "warmup_steps": 1,
        "log_every": 1, "alignment": "linear", "sample_rate": 1.0, "loss_precision": "fp32", "precision": "fp32",
        "steps": 4 if place.tiny else 20,
    }  # fmt: skip
    return (
        {"pairs": pairs, "embed": {"teacher": "none"}, "distill": teacher, "machine": machine},
        {
            "pairs": pairs,
            "embed": {"teacher": "run:teacher", "precision": "fp32"},
            "balance": {"target_removed": 0.3, "max_threshold": 0.3},
            "cluster": {"num_centers": 8 if place.tiny else 32, "iterations": 3},
            "distill": student,
            "evaluate": {"sets": {"colors": "data/sets/colors"}, "retrieval": {"heldout": ["data/heldout/*.tar"]}},
            "machine": machine,
        },
    )


def make_sample(place: Place) -> Outcome:
    """On the CPU: the sample, a teacher, and a run of all stages with numbers."""
    os.chdir(place.work)
    for name, recipe in zip(("teacher", "student"), recipes(place), strict=True):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    _command("sample", "data", "--pairs", "60" if place.tiny else "1200")
    _command("distill", "teacher", "--recipe", "teacher.yaml")
    for stage in STAGES[:5]:
        _command(stage, "cpu", "--recipe", "student.yaml")
    pairs = EmbeddingStore.open(Path("cpu/embed")).rows
    return Outcome(float(pairs), notes="a teacher, and all stages on the CPU")


def compare_embed(cpu: Path, device: Path, allowed: float) -> dict[str, float]:
    """Largest cosine distance of an embedding to the CPU's as a share of what is allowed."""
    mine, theirs = EmbeddingStore.open(device / "embed"), EmbeddingStore.open(cpu / "embed")
    if list(mine.keys) != list(theirs.keys) or not np.array_equal(mine.ok, theirs.ok):
        raise ValueError("the device has embedded other pairs than the CPU")
    rows = np.arange(mine.rows)
    return {
        name: float(_cosine_distances(ours[rows], of_cpu[rows]).max()) / allowed
        for name, ours, of_cpu in (("image", mine.images, theirs.images), ("text", mine.texts, theirs.texts))
    }


def _cosine_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = (rows.astype(np.float64) for rows in (left, right))
    return 1 - (left * right).sum(axis=1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))


def compare_arrays(cpu: Path, device: Path, names: tuple[str, ...]) -> dict[str, float]:
    """How many entries are not the CPU's."""
    differing = dict[str, float]()
    for name in names:
        mine, theirs = np.load(device / name), np.load(cpu / name)
        differing[name] = float((mine != theirs).sum() if mine.shape == theirs.shape else max(mine.size, theirs.size))
    return differing


def compare_distill(cpu: Path, device: Path) -> dict[str, float]:
    """Of the losses of each step and of the student's weights, as shares of what is allowed."""
    mine, theirs = (_losses(path) for path in (device, cpu))
    if mine.keys() != theirs.keys():
        raise ValueError("the device has recorded other steps or losses than the CPU")
    losses = np.max([abs(mine[key] - theirs[key]) / max(abs(theirs[key]), 0.1) for key in theirs])

    students = [load_file(path / "distill/student/open_clip_model.safetensors") for path in (device, cpu)]
    if students[0].keys() != students[1].keys():
        raise ValueError("the student of the device has other weights than the CPU's")
    apart = sum(float((students[0][name] - value).double().square().sum()) for name, value in students[1].items())
    whole = sum(float(value.double().square().sum()) for value in students[1].values())
    return {"losses": float(losses) / LOSS, "weights": (apart / whole) ** 0.5 / WEIGHTS}


def _losses(run: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "distill/metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name == "loss" or name.startswith("loss/")
    }


def compare_evaluate(cpu: Path, device: Path) -> dict[str, float]:
    """Images that are answered otherwise, as a share of those allowed."""
    mine, theirs = (_answers(run) for run in (device, cpu))
    if mine.keys() != theirs.keys():
        raise ValueError("the device has measured other sets than the CPU")
    found = dict[str, float]()
    for name, answers in theirs.items():
        apart = np.any([mine[name][kind] != values for kind, values in answers.items()], axis=0)
        found[name] = float(apart.sum()) / max(IMAGES, IMAGES_SHARE * len(apart))
    return found


def _answers(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """For each image of each measurement."""
    files = sorted((run / "evaluate/answers").glob("*.npz"))
    return {path.stem.rpartition("-")[0]: dict(np.load(path)) for path in files}


def stage_line(name: str, place: Place) -> Outcome:
    """A stage on the device against the CPU's."""
    cpu = _cpu_run(place)
    on_device = _rerun(cpu, name, place)
    if name == "embed":
        found = compare_embed(cpu, on_device, COSINE["fp32"])
        half = _rerun(cpu, name, place, "--embed.precision", "bf16")
        found |= {f"{kind}, bf16": share for kind, share in compare_embed(cpu, half, COSINE["bf16"]).items()}
        allowed = f"cosine distance {COSINE['fp32']:g} in float32, {COSINE['bf16']:g} in bf16"
    elif name == "balance":
        found = compare_arrays(cpu / name, on_device / name, ("kept.npy", "set_of.npy"))
        allowed = "kept rows and sets"
    elif name == "cluster":
        found = compare_arrays(cpu / name, on_device / name, ("centers.npy", "labels.npy"))
        allowed = "centers and labels"
    elif name == "distill":
        found = compare_distill(cpu, on_device)
        allowed = f"{LOSS:.1%} of a loss, {WEIGHTS:.0%} of the weights, after {_steps(cpu)} steps in float32"
    else:
        found = compare_evaluate(cpu, on_device)
        allowed = f"{IMAGES} images of a set, or {IMAGES_SHARE:.0%}, answered otherwise"
    return Outcome(_largest(found), notes=allowed if name in EXACT else f"1 is {allowed}", details=found)


def _largest(found: Mapping[str, float]) -> float:
    """NaN if one is not a number."""
    return float(np.max(list(found.values())))


def _steps(run: Path) -> int:
    return max(step for step, _ in _losses(run))


def to_the_report(place: Place) -> Outcome:
    """All stages from distill on, with the device's own precision in the training."""
    cpu, run = _cpu_run(place), place.work / "to-the-report"
    shutil.copytree(cpu, run, ignore=lambda folder, _: [*STAGES[3:], "features"] if Path(folder) == cpu else [])
    recipe = recipes(place)[1]
    recipe["distill"] |= {"precision": "auto", "loss_precision": "auto"}
    Path("auto.yaml").write_text(yaml.safe_dump(recipe))
    _command("run", str(run), "--recipe", "auto.yaml", *_on(place))
    _command("verify", str(run))
    holds = {
        "every loss is finite": bool(np.isfinite(list(_losses(run).values())).all()),
        "the page is there": (run / "report/report.html").is_file(),
    }
    figures = len(list((run / "draw").glob("*.csv")))
    return Outcome(float(figures), holds, notes="distill in the device's own precision, evaluate, draw, report, verify")


def _cpu_run(place: Place) -> Path:
    run = place.work / "cpu"
    if not (run / "evaluate" / "manifest.json").is_file():
        raise RuntimeError("there are no results of the CPU to compare with; see the line `sample`")
    os.chdir(place.work)
    return run


def _rerun(cpu: Path, stage: str, place: Place, *flags: str) -> Path:
    """A copy of the CPU's run in which this stage was made anew on the device."""
    run = place.work / "-".join([stage, *(flag.strip("-") for flag in flags)])
    later = STAGES[STAGES.index(stage) :]
    shutil.copytree(cpu, run, ignore=lambda folder, _: [*later, "features"] if Path(folder) == cpu else [])
    _command(stage, str(run), "--recipe", "student.yaml", *_on(place), *flags)
    return run


def _on(place: Place) -> list[str]:
    return ["--machine.device", place.device]


def _command(*arguments: str) -> None:
    if status := cli.main(list(arguments)):
        raise RuntimeError(
            f"`clip-cid {' '.join(arguments)}` ended with exit status {status}; its words are in the log"
        )


def collectives_of_one(place: Place) -> Outcome:
    """What ranks exchange, in a group of one process: NCCL on a device, gloo on the CPU."""
    device = place.torch_device
    meeting = f"file://{place.work / 'group-of-one'}"
    backend = "cpu:gloo,cuda:nccl" if place.on_cuda else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    try:
        rows = torch.arange(12.0, device=device).reshape(4, 3).requires_grad_()
        gathered = _Gather.apply(rows, 1, 0)
        (gradient,) = torch.autograd.grad((gathered * gathered).sum(), rows)
        total = Ranks(device=device).sum(torch.ones(3, device=device))
        dist.all_reduce(total)

        torch.manual_seed(0)
        alone = torch.nn.Linear(3, 2, device=device)
        joined = DistributedDataParallel(alone, device_ids=[device] if place.on_cuda else None)
        joined(rows.detach()).square().sum().backward()
        own = [torch.nan * parameter if parameter.grad is None else parameter.grad for parameter in alone.parameters()]
        expected = torch.autograd.grad(alone(rows.detach()).square().sum(), list(alone.parameters()))
        found = {
            "rows gathered": _largest_difference([gathered], [rows]),
            "gradient scattered": _largest_difference([gradient], [2 * rows]),
            "sum": _largest_difference([total], [torch.ones_like(total)]),
            "gradient of DDP": max(
                float((mine - theirs).abs().max())
                for mine, theirs in zip(own, expected, strict=True)
                if mine is not None
            ),
        }
    finally:
        dist.destroy_process_group()
    return Outcome(_largest(found), notes=f"{'NCCL' if place.on_cuda else 'gloo'}, a group of one", details=found)


def _largest_difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """NaN if an entry is."""
    return float(torch.stack([(one - other).abs().max() for one, other in zip(mine, theirs, strict=True)]).max())


def two_ranks(place: Place) -> Outcome:
    """The student of two processes under torchrun, each with a device of its own, against the CPU's of one."""
    if place.on_cuda and (count := torch.cuda.device_count()) < 2:
        raise Skipped(f"there is {count} CUDA device here")
    cpu = _cpu_run(place)
    run = place.work / "two-ranks"
    shutil.copytree(cpu, run, ignore=lambda folder, _: STAGES[3:] if Path(folder) == cpu else [])
    device = "cuda" if place.on_cuda else "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clip_cid"]
    command += ["distill", str(run), "--recipe", "student.yaml", "--machine.device", device]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = compare_distill(cpu, run)
    summary = json.loads((run / "distill/manifest.json").read_text())["summary"]
    holds = {"two processes trained": summary["processes"] == 2}
    return Outcome(_largest(found), holds, notes="NCCL" if place.on_cuda else "gloo", details=found)


def _line_of(stage: str, limit: int) -> Line:
    measured = "entries that differ from the CPU's" if stage in EXACT else "difference from the CPU"
    return Line(
        stage, f"{stage} on the sample: {measured}", NONE if stage in EXACT else SHARE, limit,
        partial(stage_line, stage), needs_sample=True,
    )  # fmt: skip


LINES = [
    Line(SAMPLE, "the sample's stages on the CPU: pairs", Bar(50), 50, make_sample, needs_sample=True),
    *(_line_of(stage, limit) for stage, limit in zip(STAGES[:5], (20, 15, 15, 20, 20), strict=True)),
    Line(
        "report", "distill to report in the device's precision: figures", Bar(1), 45, to_the_report, needs_sample=True
    ),
]
RANKS = [
    Line("nccl-1", "collectives in a group of one: largest difference", Bar(1e-5, least=False), 20, collectives_of_one),
    Line("nccl-2", "a student of two devices: difference from the CPU", SHARE, 30, two_ranks, needs_sample=True),
]
