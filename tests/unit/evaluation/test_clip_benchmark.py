"""Files as CLIP_benchmark writes them; where it is installed, its own `build` reads them and its own zero-shot agrees with ours."""

import csv
import importlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sets import CLASSES, TEMPLATES, image, tar_set, tiny_clip, write_tar

from clip_cid.data.pairs.images import decode_image
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.data.sets.evaluation_sets import open_set
from clip_cid.evaluation.clip_benchmark import write_clip_benchmark
from clip_cid.evaluation.features import Encoder
from clip_cid.evaluation.measurements import PairSet, retrieval_measurement
from clip_cid.evaluation.scores import Score
from clip_cid.evaluation.zero_shot import prompt_classifier, zero_shot
from clip_cid.models.clip import Clip
from clip_cid.recipe import PairsConfig


def score(
    model: str, name: str, task: str, *, metric: str = "top1", value: float = 0.5, **details: float | None
) -> Score:
    return Score(model, name, task, metric, value, details=details)


SCORES = [
    score("student", "cifar10", "zero_shot", top1=0.5, top5=0.9, mean_per_class=0.4),
    score("student", "faces", "zero_shot", top1=0.7, top5=None, mean_per_class=0.6),
    score("tag", "cifar10", "linear_probe", top1=0.8, mean_per_class=0.75),
    score("tag", "coco", "retrieval", metric="text_to_image_R@5", value=0.25),
    score("tag", "coco", "retrieval", metric="image_to_text_R@10", value=0.35),
    score("tag", "cifar10", "knn", top1=0.1),
]
REFERENCES = {"student": "local-dir:runs/x/distill/student", "tag": "ViT-B-32/laion400m_e32"}


def written(folder: Path) -> list[dict[str, Any]]:
    assert write_clip_benchmark(folder, SCORES, REFERENCES) == 4
    files = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    return sorted(files, key=lambda file: (file["model"], file["dataset"], file["task"]))


def test_the_keys_are_those_of_clip_benchmark(tmp_path: Path) -> None:
    probe, recall, ours, faces = written(tmp_path / "cb")
    assert probe == {
        "dataset": "cifar10",
        "model": "ViT-B-32",
        "pretrained": "laion400m_e32",
        "task": "linear_probe",
        "metrics": {"lp_acc1": 0.8, "lp_mean_per_class_recall": 0.75},
        "language": "en",
    }
    assert recall["task"] == "zeroshot_retrieval"
    assert recall["metrics"] == {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@10": 0.35}
    assert (ours["model"], ours["pretrained"]) == ("student", REFERENCES["student"])
    assert ours["metrics"] == {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4}
    assert faces["metrics"] == {"acc1": 0.7, "mean_per_class_recall": 0.6}


def test_names_that_differ_only_in_odd_characters_have_files_of_their_own(tmp_path: Path) -> None:
    scores = [score("a", name, "zero_shot", top1=0.5, mean_per_class=0.4) for name in ("x/y", "x y", "<x>y")]
    assert write_clip_benchmark(tmp_path / "cb", scores, {"a": "run:x"}) == 3
    assert len(list((tmp_path / "cb").iterdir())) == 3


def test_its_build_makes_a_table_of_them(tmp_path: Path) -> None:
    cli = pytest.importorskip("clip_benchmark.cli")
    written(tmp_path / "cb")
    cli.main_build(types.SimpleNamespace(files=[str(tmp_path / "cb")], output=str(tmp_path / "all.csv")))
    with open(tmp_path / "all.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert {(line["model_fullname"], line["dataset"], line["acc1"], line["lp_acc1"]) for line in lines} >= {
        (f"student {REFERENCES['student']}", "cifar10", "0.5", ""),
        ("ViT-B-32 laion400m_e32", "cifar10", "", "0.8"),
    }


def test_its_zero_shot_gives_our_answers_to_the_last_image(tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    builder = importlib.import_module("clip_benchmark.datasets.builder")
    root, clip = tar_set(tmp_path / "colors", each=8), tiny_clip(tmp_path)
    opened = open_set("colors", str(root), max_pixels=10**6)
    encoder = Encoder("tiny", clip, tmp_path / "cache", device=torch.device("cpu"), batch_size=7, workers=0)
    prompts = [prompt for label in range(len(CLASSES)) for prompt in opened.prompts(label)]
    classifier = prompt_classifier(encoder.texts("p", prompts), num_classes=len(CLASSES))
    found = encoder.images(opened.split("test"), before=False)
    ours = zero_shot(found.after, classifier, opened.split("test").labels, metric="top1")

    dataset = builder.build_dataset("wds/colors", root=str(root), transform=clip.preprocess, split="test")
    loader = torch.utils.data.DataLoader(dataset.batched(5), batch_size=None)
    weights = theirs.zero_shot_classifier(clip.model, clip.tokenizer, CLASSES, TEMPLATES, "cpu", amp=False)
    logits, labels = theirs.run_classification(clip.model, weights, loader, "cpu", amp=False)
    np.testing.assert_array_equal(opened.split("test").labels, labels.numpy())
    np.testing.assert_array_equal(ours.predicted, logits.argmax(dim=1).numpy())


def captioned_tar(path: Path, count: int) -> list[list[str]]:
    """Images with one to five captions, one a line; returns these."""
    captions = [[f"a thing {7 * row + line} in {row % 5}" for line in range(1 + row % 5)] for row in range(count)]
    members: list[tuple[str, bytes]] = []
    for row, lines in enumerate(captions):
        picture = image([(67 * row) % 256, (31 * row) % 256, (17 * row) % 256], row)
        members += [(f"s{row:04d}.jpg", picture), (f"s{row:04d}.txt", "\n".join(lines).encode())]
    write_tar(path, members)
    return captions


def recalls_of(source: Path, clip: Clip, cache: Path) -> dict[str, float]:
    pairs = open_pairs(PairsConfig(source=(str(source),)))
    encoder = Encoder("tiny", clip, cache, device=torch.device("cpu"), batch_size=7, workers=0)
    scores, _ = retrieval_measurement(PairSet("colors/pairs", pairs, 10**6), seed=0).measure(encoder)
    return {score.metric: score.score for score in scores}


def test_recalls_on_a_retrieval_tar_count_every_line_as_a_caption(tmp_path: Path) -> None:
    """CLIP_benchmark's rule written out: a query is right if any of its own is among the first k."""
    clip, captions = tiny_clip(tmp_path), captioned_tar(tmp_path / "0.tar", 24)
    ours = recalls_of(tmp_path / "0.tar", clip, tmp_path / "cache")

    model: Any = clip.model
    pairs = open_pairs(PairsConfig(source=(str(tmp_path / "0.tar"),)))
    with torch.inference_mode():
        pixels = [clip.preprocess(decode_image(pairs.read(row).image, max_pixels=10**6)) for row in range(24)]
        images = model.encode_image(torch.stack(pixels), normalize=True)
        texts = model.encode_text(clip.tokenizer([line for lines in captions for line in lines]), normalize=True)
    similarity = (texts @ images.T).numpy()
    owners = np.repeat(np.arange(24), [len(lines) for lines in captions])
    for depth in (1, 5, 10):
        nearest_images = np.argsort(-similarity, axis=1)[:, :depth]
        nearest_texts = np.argsort(-similarity.T, axis=1)[:, :depth]
        of_texts = (nearest_images == owners[:, None]).any(axis=1).mean()
        of_images = (owners[nearest_texts] == np.arange(24)[:, None]).any(axis=1).mean()
        assert ours[f"text_to_image_R@{depth}"] == pytest.approx(of_texts)
        assert ours[f"image_to_text_R@{depth}"] == pytest.approx(of_images)


def test_its_retrieval_gives_our_recalls(tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    builder = importlib.import_module("clip_benchmark.datasets.builder")
    clip = tiny_clip(tmp_path)
    captioned_tar(tmp_path / "colors" / "test" / "0.tar", 24)
    (tmp_path / "colors" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "colors" / "dataset_type.txt").write_text("retrieval")

    dataset = builder.build_wds_dataset("colors", clip.preprocess, split="test", data_dir=str(tmp_path / "colors"))
    batches = dataset.batched(
        24, collation_fn=lambda rows: (torch.stack([row[0] for row in rows]), [row[1] for row in rows])
    )
    expected = theirs.evaluate(clip.model, batches, clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = recalls_of(tmp_path / "colors" / "test" / "0.tar", clip, tmp_path / "cache")
    for depth in (1, 5, 10):
        assert ours[f"text_to_image_R@{depth}"] == pytest.approx(expected[f"image_retrieval_recall@{depth}"])
        assert ours[f"image_to_text_R@{depth}"] == pytest.approx(expected[f"text_retrieval_recall@{depth}"])
