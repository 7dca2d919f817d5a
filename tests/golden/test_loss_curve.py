"""A training of 20 steps whose losses are kept in `loss_curves.json`: any change of the objective shows there.

The real objective and optimizers train a student of two tables on made-up data. All numbers are made by integer
arithmetic and everything is float64. With the kernels of AVX-512, of AVX2 and of neither, and one thread or two, the
losses then differ by less than 1e-15 of their value, so the tolerance of 1e-6 leaves the verdict to the code. After a
change that is meant, the file is written again by

    PYTHONPATH=src:tests python tests/golden/test_loss_curve.py

and the commit says why its numbers moved.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_cid.method.distill.objective import Objective, Targets, weighted_sum
from clip_cid.recipe import PRESETS, DistillConfig, LossWeights
from clip_cid.training.model import Distillation
from clip_cid.training.optimizer import learning_rate_share, make_optimizers, set_learning_rate

GOLDEN = Path(__file__).with_name("loss_curves.json")
STEPS, ROWS, PAIRS, CENTERS, STUDENT_DIM, TEACHER_DIM, WORDS = 20, 8, 24, 10, 6, 7, 11
TEXT_CENTERS, BANK = 9, 12

PAPER: dict[str, Any] = {"weights": "clip-cid", "lr": 0.02, "warmup_steps": 3, "sample_rate": 1.0}
OFF = dict.fromkeys(LossWeights.model_fields, 0.0)
OF_THE_PAPER_AND_PEERS: dict[str, Any] = {
    **PAPER,
    "weights": {
        **OFF,
        "clip": 1.0,
        "siglip": 0.5,
        "cluster_cls": 0.75,
        "cluster_kl": 1.25,
        "instance_image": 0.5,
        "instance_text": 0.25,
        "affinity": 1.5,
        "feature": 20.0,
        "icl": 0.35,
    },
    "alignment": "linear",
    "head_lr": 0.01,
    "sample_rate": 0.8,
    "logq": "both",
    "temperature": 2.0,
    "teacher_scale": 30.0,
}
OF_THE_STORE: dict[str, Any] = {
    **PAPER,
    "weights": {
        **OFF,
        "cluster_cls": 0.75,
        "cosine_image": 3.0,
        "cosine_text": 2.0,
        "bank_image": 1.25,
        "bank_text": 0.5,
        "text_cluster_cls": 0.35,
        "text_cluster_kl": 1.75,
        "cross_cluster_image": 1.5,
        "cross_cluster_text": 0.8,
    },
    "alignment": "linear",
    "ignore_near": 0.6,
    "sample_rate": 0.8,
}
CURVES = {
    "the paper's losses": PAPER,
    "losses of the paper and of peers": OF_THE_PAPER_AND_PEERS,
    "losses of the store": OF_THE_STORE,
}


def numbers(*shape: int, seed: int) -> Tensor:
    """Numbers between -1 and 1 that look random, from a linear congruential generator."""
    values, state = [], 7919 * seed + 1
    for _ in range(math.prod(shape)):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 12) % 2001 / 1000 - 1)
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def unit_rows(rows: int, dim: int, *, seed: int) -> Tensor:
    return F.normalize(numbers(rows, dim, seed=seed), dim=1)


class Student(nn.Module):
    """A linear image tower, a text tower that adds up the vectors of words, and CLIP's two learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Parameter(numbers(12, STUDENT_DIM, seed=1))
        self.words = nn.Parameter(numbers(WORDS, STUDENT_DIM, seed=2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0, dtype=torch.float64))

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.pixels

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.words[texts].sum(dim=1)


def make_objective(settings: DistillConfig) -> Objective:
    dim = TEACHER_DIM if settings.alignment == "linear" else STUDENT_DIM
    objective = Objective(
        losses=settings.weights.switched_on,
        student_dim=STUDENT_DIM,
        teacher_dim=dim,
        alignment=settings.alignment,
        centers=unit_rows(CENTERS, dim, seed=3),
        text_centers=unit_rows(TEXT_CENTERS, dim, seed=10),
        head_scale=settings.head_scale,
        train_head=settings.head_lr > 0,
        sample_rate=settings.sample_rate,
        logq=settings.logq,
        ignore_near=settings.ignore_near,
        temperature=settings.temperature,
        teacher_scale=settings.teacher_scale or 100.0,
    ).double()
    with torch.no_grad():
        for seed, linear in enumerate((objective.image_map, objective.text_map), start=4):
            if linear is not None:
                linear.weight.copy_(numbers(TEACHER_DIM, STUDENT_DIM, seed=seed))
    return objective


def curve(changes: dict[str, Any]) -> list[dict[str, float]]:
    """The losses of each step by name, and their weighted sum as `total`."""
    settings = DistillConfig.model_validate(changes)
    weights = settings.weights.model_dump()
    model = Distillation(Student(), make_objective(settings))
    optimizers = make_optimizers(model.student, model.objective, settings, steps=STEPS)

    assert settings.warmup_steps != "auto"

    lines: list[dict[str, float]] = []
    for step, (images, texts, targets) in enumerate(batches(cast(Any, model.objective.head).weight.shape[1])):
        set_learning_rate(optimizers, learning_rate_share(step, warmup_steps=settings.warmup_steps, steps=STEPS))
        seen = model(images, texts, precision=torch.float32)
        losses = model.objective(seen, targets, generator=torch.Generator().manual_seed(step))
        total = weighted_sum(losses, weights)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.clamp_scales()
        assert targets.teacher_image is not None
        assert targets.teacher_text is not None
        assert targets.teacher_image.grad is targets.teacher_text.grad is None, "a gradient has reached the teacher"
        lines.append({**{name: value.item() for name, value in losses.items()}, "total": total.item()})
    return lines


def batches(dim: int) -> Iterator[tuple[Tensor, Tensor, Targets]]:
    """A third of the pairs at each step; the teacher would take a gradient if a loss gave it one."""
    images = numbers(PAIRS, 3, 2, 2, seed=6)
    texts = (numbers(PAIRS, 4, seed=7) * 1000).long() % WORDS
    teacher_image, noise = unit_rows(PAIRS, dim, seed=8), unit_rows(PAIRS, dim, seed=9)
    teacher_text = F.normalize(teacher_image + 0.8 * noise, dim=1)
    labels = (teacher_image @ unit_rows(CENTERS, dim, seed=3).T).argmax(dim=1)
    text_labels = (teacher_text @ unit_rows(TEXT_CENTERS, dim, seed=10).T).argmax(dim=1)
    bank_images, bank_texts = unit_rows(BANK, dim, seed=11), unit_rows(BANK, dim, seed=12)
    for step in range(STEPS):
        rows = torch.tensor([(5 * (step * ROWS + row) + step) % PAIRS for row in range(ROWS)])
        teacher = (vectors[rows].clone().requires_grad_() for vectors in (teacher_image, teacher_text))
        targets = Targets(
            teacher_image=next(teacher),
            teacher_text=next(teacher),
            labels=labels[rows],
            text_labels=text_labels[rows],
            bank_images=bank_images,
            bank_texts=bank_texts,
        )
        yield images[rows], texts[rows], targets


@pytest.mark.parametrize("name", CURVES)
def test_the_losses_of_20_steps_are_those_that_were_kept(name: str):
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    computed = curve(CURVES[name])
    assert len(computed) == len(kept) == STEPS
    for step, (ours, expected) in enumerate(zip(computed, kept, strict=True)):
        assert ours == pytest.approx(expected, rel=1e-6), f"step {step}"


def test_the_curves_switch_on_every_loss_and_those_of_the_paper():
    switched_on = {name: set(lines[0]) - {"total"} for name, lines in json.loads(GOLDEN.read_text()).items()}
    assert set().union(*switched_on.values()) == set(LossWeights.model_fields)
    paper = PRESETS["clip-cid"].weights
    assert switched_on["the paper's losses"] == {name for name, weight in paper.items() if weight > 0}


if __name__ == "__main__":
    made = {name: curve(changes) for name, changes in CURVES.items()}
    rounded = {
        name: [{loss: float(f"{value:.12g}") for loss, value in line.items()} for line in lines]
        for name, lines in made.items()
    }
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, kept)) + "\n]" for name, kept in rounded.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
