import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_sets import tar_set

from clip_cid import cli, pipeline, units
from clip_cid.check import check, likely_mistakes, printout, rehearsal, trial
from clip_cid.check.captions import count_truncated
from clip_cid.check.estimates import Duration, chance_levels
from clip_cid.data.embeddings.writer import ShardRows, StoreWriter
from clip_cid.data.pairs.pairs import open_pairs
from clip_cid.errors import ClipCidError, ConfigError, DataError, MissingExtraError, RunError
from clip_cid.method.distill.objective import Objective, Targets
from clip_cid.models.architectures import build_skeleton
from clip_cid.models.costs import count_costs
from clip_cid.models.loading import known_architecture
from clip_cid.models.student import build_student
from clip_cid.recipe import ClusterConfig, DistillConfig, MachineConfig, PairsConfig, Recipe, dump_recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.stages import distill
from clip_cid.summaries import DistillSummary
from clip_cid.training.assemble import prepare
from clip_cid.training.ranks.distributed import ALONE

COUNT, DIM, CENTERS, BATCH = 40, 16, 6, 8
TOKENS, PATCHES, WIDTH = 8, 4, 32
STUDENT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": WIDTH, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": TOKENS, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1},
}


def unit_rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_pairs(folder: Path, caption: str = "color") -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        color = random.integers(0, 200, 3) + random.integers(0, 56, (12, 24, 3))
        Image.fromarray(color.astype(np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"{caption} {number}\n")


def write_store(folder: Path, pairs: Path) -> None:
    found = open_pairs(PairsConfig(source=(str(pairs),)))
    writer = StoreWriter(folder, teacher={"reference": "noise"}, dim=DIM, fields=(), num_shards=1)
    images, texts = unit_rows(COUNT, seed=1), unit_rows(COUNT, seed=2)
    captions = [found.read(row).captions for row in range(COUNT)]
    ok, sizes = np.ones(COUNT, dtype=bool), [(24, 12)] * COUNT
    keys = found.keys(0, COUNT)
    writer.add(ShardRows("all", images, texts, images[:0], ok, keys, captions, sizes, {}, []))
    writer.finish()


class Case:
    """A run whose embeddings come from elsewhere, balanced and clustered."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path / "run")
        write_pairs(path / "pairs")
        write_store(path / "store", path / "pairs")
        (path / "student.json").write_text(json.dumps(STUDENT))
        for stage in ("embed", "balance", "cluster"):
            pipeline.run(self.folder, self.recipe(), only=stage)

    def recipe(self, **changed: dict[str, Any]) -> Recipe:
        """Sections on top of those of the run."""
        distill = {"student": str(self.path / "student.json"), "batch_size": BATCH, "epochs": 3, "warmup_steps": 1}
        values: dict[str, dict[str, Any]] = {
            "pairs": {"source": [str(self.path / "pairs")]},
            "embed": {"existing": str(self.path / "store")},
            "cluster": {"num_centers": CENTERS},
            "distill": {**distill, "log_every": 1, "sample_rate": 1.0},
            "machine": {"device": "cpu", "threads": 1, "workers": 0, "tensorboard": "off"},
        }
        sections = {name: {**values.get(name, {}), **changed.get(name, {})} for name in {*values, *changed}}
        return parse_recipe(sections, where="test")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_MOST_STEPS", 2)
    monkeypatch.setattr(rehearsal, "_MOST_ROUNDS", 2)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): ((status := path.lstat()).st_size, status.st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def all_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tower_flops(tokens: int, layers: int) -> int:
    """Products of a transformer by hand: queries, keys and values, attention twice, its output, and an MLP of four widths."""
    layer = 2 * tokens * WIDTH * (3 * WIDTH + WIDTH + 8 * WIDTH) + 2 * 2 * tokens * tokens * WIDTH
    return layers * layer + 2 * WIDTH * DIM


def test_flops_of_a_pair_are_those_counted_by_hand(case: Case):
    report = check(case.folder, case.recipe())
    assert report.student is not None
    patches = 2 * PATCHES * WIDTH * 3 * 8 * 8
    assert report.student.image_flops == patches + tower_flops(PATCHES + 1, layers=2)
    assert report.student.text_flops == tower_flops(TOKENS, layers=1)
    assert report.student.training == 3 * report.student.forward


@pytest.mark.slow
@pytest.mark.parametrize(("name", "giga"), [("ViT-B-32", 14.78), ("ViT-bigG-14", 1065.36), ("RN50", 18.18)])
def test_flops_of_known_models_are_those_of_open_clips_own_table(name: str, giga: float):
    model_cfg = known_architecture(
        {"RN50": "RN50/openai"}.get(name, f"{name}/laion2b_{'e16' if '32' in name else 's39b_b160k'}")
    )
    assert model_cfg is not None
    skeleton = build_skeleton(model_cfg)
    assert skeleton is not None
    costs = count_costs(skeleton, context_length=77)
    assert costs is not None
    assert costs.forward / 1e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.slow
def test_the_numbers_that_auto_is_are_told_with_their_reasons(case: Case, tmp_path: Path, capsys):
    auto = {"batch_size": "auto", "epochs": "auto", "warmup_steps": "auto"}
    page = case.recipe(cluster={"num_centers": "auto"}, distill=auto)
    chosen = {"cluster.num_centers": 2, "distill.batch_size": 2, "distill.epochs": 32, "distill.warmup_steps": 64}
    for folder, title in ((case.folder, "chosen "), (RunFolder(tmp_path / "new"), "chosen, if all pairs are kept")):
        report = check(folder, page)  # 40 images are kept: 32 x 40 / 2 = 640 steps
        assert {choice.setting: choice.value for choice in report.choices} == chosen
        printout.say(report)
        said = capsys.readouterr().out
        assert f"Numbers that are {title}" in said
        assert "a tenth, of about 640 steps" in said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_the_run_changes(case: Case, workers: int):
    for file in (case.folder.path / "index").glob("known-bad-*"):
        file.unlink()  # what is missing of the index is made elsewhere
    before = tree(case.path)
    check(case.folder, case.recipe(machine={"workers": workers}))
    assert tree(case.path) == before


def test_a_run_that_does_not_exist_is_not_made(case: Case, tmp_path: Path):
    check(RunFolder(tmp_path / "new"), case.recipe())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_lr": 1e-4, "sample_rate": 0.5, "ema_decay": 0.9},
        {"alignment": "linear", "head_lr": 1e-4},
        {"labels": 3, "ignore_near": 0.1},
    ],
)
def test_losses_and_sizes_are_those_of_the_training_itself(case: Case, tmp_path: Path, changes: dict[str, Any]):
    recipe = case.recipe(distill=changes)
    report = check(case.folder, recipe)
    prepared = prepare(case.folder, tmp_path, recipe, ALONE)
    prepared.trainer.run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert report.rehearsal.first.parts == {
        name: pytest.approx(line[f"loss/{name}"], rel=1e-5) for name in report.rehearsal.first.parts
    }
    assert report.rehearsal.centers == line["centers"]
    newest = max((tmp_path / "checkpoints").glob("step-*.pt"))
    head = newest.with_suffix(".head")
    size = newest.stat().st_size + (all_bytes(head) if head.exists() else 0)
    assert report.disk.checkpoint == pytest.approx(size, rel=0.1)
    assert report.disk.checkpoints == 3 * report.disk.checkpoint
    assert report.disk.metrics > (tmp_path / "metrics.jsonl").stat().st_size
    assert (report.duration.steps, report.pairs) == (prepared.trainer.plan.steps, COUNT) == (15, COUNT)
    assert sum(report.parameters.values()) == sum(
        value.numel()
        for module in (prepared.clip.model, prepared.trainer.model.objective.head)
        if module is not None
        for value in module.parameters()
    )


@pytest.mark.slow
def test_disk_of_the_student_and_the_soft_centers(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report = check(case.folder, case.recipe())
    soft: list[int] = []
    finish = distill._finish

    def watched(folder: RunFolder, out: Path) -> DistillSummary:
        soft.append(all_bytes(out / "soft_centers"))
        return finish(folder, out)

    monkeypatch.setattr(distill, "_finish", watched)
    distill.run(case.folder, tmp_path, case.recipe())
    assert report.disk.student == pytest.approx(all_bytes(tmp_path / "student"), rel=0.1)
    assert report.disk.soft_centers == pytest.approx(soft[0], abs=1000)  # .npy headers and done.json
    assert report.soft_seconds is not None
    assert report.soft_seconds > 0
    assert check(case.folder, case.recipe(distill={"sample_rate": 0.5})).soft_seconds is None


@pytest.mark.slow
def test_disk_and_time_of_several_labels(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report = check(case.folder, case.recipe(distill={"labels": 4}))
    sizes: list[int] = []
    monkeypatch.setattr(distill, "_finish", lambda _, out: sizes.append(all_bytes(out / "labels")))
    distill.run(case.folder, tmp_path, case.recipe(distill={"labels": 4}))
    assert report.disk.labels == pytest.approx(sizes[0], abs=1000)
    assert report.label_seconds is not None
    assert report.label_seconds > 0
    assert ("labels, while it trains" in dict(row[:2] for row in printout._disk(report))) == (report.disk.labels > 0)
    new = RunFolder(tmp_path / "new")
    assert check(new, case.recipe(distill={"labels": 4})).rehearsal.first.is_finite
    assert check(case.folder, case.recipe()).label_seconds is None


@pytest.mark.slow
def test_clusters_of_texts_are_tried_with_random_ones_and_looked_for_where_they_should_be(case: Case, tmp_path: Path):
    weights = {"text_cluster_cls": 1.0, "text_cluster_kl": 1.0, "cross_cluster_image": 1.0, "cross_cluster_text": 1.0}
    of_texts = {"texts": True, "num_text_centers": 5}
    images = case.recipe(distill={"weights": weights | {"text_cluster_cls": 0.0}}, cluster=of_texts)
    report = check(case.folder, case.recipe(distill={"weights": weights}, cluster=of_texts))
    assert weights.keys() <= report.rehearsal.first.parts.keys()
    assert report.rehearsal.first.is_finite
    assert report.parameters["head"] == (CENTERS + 5) * DIM
    assert [state.stage.name for state in report.undone] == ["cluster"]

    existing = of_texts | {"existing": str(case.folder.path / "cluster")}
    with pytest.raises(DataError, match=r"cannot read text_centers\.npy") as error:
        check(
            RunFolder(tmp_path / "new"), images.model_copy(update={"cluster": ClusterConfig.model_validate(existing)})
        )
    assert "cluster.texts: true" in error.value.fix


def test_hours_are_steps_times_what_a_step_takes():
    alone = Duration(steps=1000, compute=0.3, reading=0.2, overlaps=False)
    assert alone.seconds == pytest.approx(1000 * 0.5)
    assert alone.wait_share == pytest.approx(0.4)
    beside = Duration(steps=1000, compute=0.3, reading=0.4, overlaps=True)
    assert beside.seconds == pytest.approx(1000 * 0.4)
    assert beside.wait_share == pytest.approx(0.25)
    assert Duration(steps=1, compute=0.3, reading=0.2, overlaps=True).wait_share == 0


def test_batches_come_as_fast_as_they_are_made(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepared = prepare(case.folder, tmp_path, case.recipe(), ALONE)
    clock = iter(np.cumsum([0.0, 9.0, 0.5, 0.5, 0.5]))  # the first one takes long, as worker processes start
    monkeypatch.setattr(rehearsal, "_MOST_ROUNDS", 4)
    monkeypatch.setattr(rehearsal, "_READ_SECONDS", 100.0)
    monkeypatch.setattr(rehearsal.time, "monotonic", lambda: float(next(clock)))
    found = rehearsal.read_batches(rehearsal.batches_to_try(prepared.trainer.batches, workers=0, steps=15), workers=0)
    assert (found.batches, found.seconds_per_batch) == (4, pytest.approx(0.5))
    first = next(prepared.trainer.batches.between(0, 1))
    assert torch.equal(found.batch.images, first.images)


def test_chance_levels_are_the_losses_of_a_student_that_sees_nothing():
    rows, dim = 12, 2 * DIM
    centers = np.concatenate([unit_rows(CENTERS, seed=5), np.zeros((CENTERS, DIM), dtype=np.float32)], axis=1)
    teacher = np.concatenate([unit_rows(rows, seed=6), np.zeros((rows, DIM), dtype=np.float32)], axis=1)
    blind = torch.zeros(rows, dim)
    blind[:, DIM] = 1.0  # at a right angle to all that the teacher says
    text = torch.zeros(rows, dim)
    text[:, DIM + 1] = 1.0
    weights = {"clip": 1.0, "cluster_cls": 1.0, "cluster_kl": 1.0, "instance_image": 1.0, "icl": 1.0, "feature": 1.0}
    weights |= {"cosine_image": 1.0, "cosine_text": 1.0}
    for logq in ("none", "kl", "both"):
        objective = Objective(
            losses=[*weights, "siglip"],
            student_dim=dim,
            teacher_dim=dim,
            centers=torch.from_numpy(centers),
            sample_rate=1.0,
            logq=logq,
        )
        bias = torch.tensor(-3.0)
        seen = {"image": blind, "text": text, "logit_scale": torch.tensor(10.0), "logit_bias": bias}
        seen |= objective.read(blind, text)
        vectors = torch.from_numpy(teacher)
        labels = torch.arange(rows) % CENTERS
        parts = objective(seen, Targets(vectors, vectors, labels))
        shares = torch.softmax(16 * vectors @ torch.from_numpy(centers).T, dim=1).double()
        entropy = -(shares * shares.log()).sum(dim=1).mean()
        settings = DistillConfig.model_validate({"batch_size": rows, "logq": logq, "weights": weights | {"siglip": 1}})
        chance = chance_levels(
            settings, width=dim, num_centers=CENTERS, in_step=CENTERS, perplexity=math.exp(entropy), logit_bias=-3.0
        )
        assert chance.keys() == parts.keys() | {"instance_text"}  # on in a recipe unless it is switched off
        for name, part in parts.items():
            assert chance[name] == pytest.approx(part.item(), rel=1e-4), name


def test_chance_of_several_labels():
    """log(1 + l (K - l)) where all logits are equal; unknown where near centers are left out."""
    settings = DistillConfig.model_validate({"batch_size": 64, "labels": 3, "logq": "both"})
    how: dict[str, Any] = {"width": 8, "num_centers": 100, "in_step": 10, "perplexity": 20.0, "logit_bias": None}
    assert chance_levels(settings, **how)["cluster_cls"] == pytest.approx(math.log(1 + 3 * 97))
    near = settings.model_copy(update={"ignore_near": 0.75})
    assert "cluster_cls" not in chance_levels(near, **how)


def test_chance_of_a_sample_of_centers():
    def level(logq: str) -> dict[str, float]:
        settings = DistillConfig.model_validate({"logq": logq, "batch_size": 64})
        return chance_levels(settings, width=8, num_centers=100, in_step=10, perplexity=20.0, logit_bias=None)

    assert level("none")["cluster_cls"] == level("kl")["cluster_cls"] == pytest.approx(math.log(10))
    assert level("both")["cluster_cls"] == pytest.approx(math.log(100))
    assert level("kl")["cluster_kl"] == pytest.approx(math.log(5))
    assert "cluster_kl" not in level("none")


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"distill": {"batch_size": COUNT + 1}}, ConfigError, "batch_size: 41, but there are 40 pairs"),
        ({"distill": {"warmup_steps": 15}}, ConfigError, "warmup_steps: 15, but the whole run has 15 steps"),
        ({"distill": {"student": "ViT-B-23"}}, ConfigError, "No model is named"),
        ({"distill": {"lock": "image"}}, ConfigError, "no weights are loaded"),
        ({"distill": {"validation": {"share": 0.01}}}, DataError, "too few to measure"),
        ({"distill": {"validation": {"sets": {"a": "nowhere"}, "metric": "zero_shot"}}}, DataError, "nowhere"),
        ({"machine": {"callbacks": ["no.such:thing"]}}, ConfigError, "cannot be imported"),
        ({"machine": {"device": "cuda:77"}}, ConfigError, "machine.device is cuda:77"),
        ({"pairs": {"source": ["nowhere"]}}, DataError, "nowhere"),
        ({"evaluate": {"sets": {"birds": "no/birds"}}}, DataError, "none of 1 sets exists .*nothing at no/birds"),
        ({"evaluate": {"retrieval": {"held": ["no/held"]}}}, DataError, "none of 1 .*retrieval.held: no/held"),
        ({"evaluate": {"sets": {"d": "builtin:no"}}}, ConfigError, "no built-in set 'builtin:no'"),
        ({"evaluate": {"compare": {"old": "run:no/run"}}}, DataError, "evaluate.compare.old: no/run: the distill"),
    ],
)
def test_what_the_run_would_refuse_is_refused(case: Case, changed: dict[str, Any], kind: type[ClipCidError], says: str):
    before = tree(case.path)
    with pytest.raises(kind, match=says):
        check(case.folder, case.recipe(**changed))
    assert tree(case.path) == before


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"cluster": {"num_centers": 5_000_000}}, ConfigError, r"5,000,000 centers, but at most 40 images are kept\."),
        ({"cluster": {"num_centers": COUNT + 1}}, ConfigError, r"41 centers, but at most 40 images are kept"),
        ({"cluster": {"existing": "no/clusters"}}, DataError, "no/clusters: cannot read centers.npy"),
        ({"balance": {"threshold": 3.0}}, ConfigError, "balance: .*3.0"),
        ({"balance": {"existing": "no.npy"}}, DataError, "no.npy: cannot be read"),
        ({"balance": {"grow_from": "no/run"}}, DataError, "no/run is no folder"),
        ({"balance": {"against": {"mine": "no/set.npy"}}}, DataError, "balance.against: mine, no/set.npy, cannot be"),
        ({"balance": {"against": {"mine": "no/set"}}}, ConfigError, "mine has images, but the embeddings were made"),
        ({"embed": {"existing": "no/store"}}, DataError, "no/store"),
        ({"embed": {"views": 2}}, DataError, r"embed\.views: 2, but these embeddings are of whole images only"),
        ({"cluster": {"texts": True, "num_text_centers": 41}}, ConfigError, "41 centers, but at most 40 captions are"),
        ({"distill": {"head_perplexity": 6}}, ConfigError, "6 likely centers, but there are only 6"),
        ({"distill": {"batch_size": COUNT + 1}}, ConfigError, "batch_size: 41, but there are 40 pairs"),
        ({"distill": {"warmup_steps": 15}}, ConfigError, "warmup_steps: 15, but the whole run has 15 steps"),
    ],
)
def test_what_stages_to_come_would_refuse_is_refused(
    case: Case, tmp_path: Path, changed: dict[str, Any], kind: type[ClipCidError], says: str
):
    with pytest.raises(kind, match=says):
        check(RunFolder(tmp_path / "new"), case.recipe(**changed))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [5, 7])
def test_centers_are_compared_with_what_balance_has_kept(case: Case, tmp_path: Path, kept: int):
    np.save(tmp_path / "kept.npy", np.arange(kept))
    recipe = case.recipe(balance={"existing": str(tmp_path / "kept.npy")})
    run = RunFolder(tmp_path / "run")
    for stage in ("embed", "balance"):
        pipeline.run(run, recipe, only=stage)
    if kept < CENTERS:
        with pytest.raises(ConfigError, match="6 centers, but at most 5 images are kept"):
            check(run, recipe)
    else:
        check(run, recipe)


def test_embeddings_without_texts_do_not_serve_a_loss_that_reads_them(case: Case, tmp_path: Path):
    np.save(tmp_path / "rows.npy", unit_rows(COUNT, seed=1))
    recipe = case.recipe(embed={"existing": str(tmp_path / "rows.npy")}, balance={"keep": "best_caption"})
    with pytest.raises(ConfigError) as error:
        check(RunFolder(tmp_path / "new"), recipe)
    assert "a loss reads the teacher's texts" in error.value.problem
    assert "best_caption needs embeddings of captions" in error.value.problem


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            [str(number) for number in range(COUNT)],
            "10 of 40 pairs .* without zeros at the start of a number, 10 of them would match",
        ),
        ([f"x{number}" for number in range(COUNT)], "40 of 40 pairs have no embedding here, such as '00'"),
        (None, "file and row, because these embeddings came without metadata"),
    ],
)
def test_keys_that_do_not_match_are_told_before_anything_is_taken_over(
    case: Case, tmp_path: Path, keys: list[str] | None, says: str
):
    rows = pa.array(unit_rows(COUNT, seed=1).tolist(), pa.list_(pa.float32()))
    texts = pa.array(unit_rows(COUNT, seed=2).tolist(), pa.list_(pa.float32()))
    columns = {"image_embedding": rows, "text_embedding": texts}
    beside = {} if keys is None else {"key": keys, "caption": ["a"] * COUNT}
    pq.write_table(pa.table({**columns, **beside}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=says) as error:
        check(RunFolder(tmp_path / "new"), case.recipe(embed={"existing": str(tmp_path / "rows.parquet")}))
    assert error.value.problem.startswith(str(tmp_path / "rows.parquet"))


def test_images_alone_do_not_serve_losses_that_read_captions(case: Case, tmp_path: Path):
    (tmp_path / "alone").mkdir()
    for image in (case.path / "pairs").glob("*.png"):
        (tmp_path / "alone" / image.name).write_bytes(image.read_bytes())
    pairs = {"source": [str(tmp_path / "alone")], "captions": "optional"}
    recipe = case.recipe(pairs=pairs)
    with pytest.raises(
        DataError, match=r"None of 40 pairs has a caption, but clip, instance_image, instance_text read"
    ):
        check(RunFolder(tmp_path / "new"), recipe)

    for image in (tmp_path / "alone").glob("*.png"):
        image.with_suffix(".txt").write_text(" ")  # that nothing is in it, only reading tells
    of_images = {"weights": {"clip": 0, "instance_image": 0, "instance_text": 0, "cluster_cls": 1, "cluster_kl": 1}}
    says = "none of the 40 pairs looked at has a caption, but clip, instance_image, instance_text read one"
    assert says in " ".join(check(RunFolder(tmp_path / "new"), recipe).warnings)
    told = check(RunFolder(tmp_path / "new"), case.recipe(pairs=pairs, distill=of_images)).warnings
    assert "looked at has a caption" not in " ".join(told)


def test_all_that_does_not_fit_is_listed_at_once(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = case.recipe(
        cluster={"num_centers": 5_000_000},
        distill={"batch_size": 64, "student": "ViT-B-23"},
        evaluate={"sets": {"birds": "no/birds"}, "compare": {"old": "run:no/run"}},
    )
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["check", str(tmp_path / "new"), "--recipe", str(tmp_path / "r.yaml")]) == 2
    told = capsys.readouterr().err
    assert "check: 5 problems, each of which stops the run" in told
    for words in ("5,000,000 centers", "batch_size: 64", "No model is named", "nothing at no/birds", "compare.old"):
        assert words in told
    assert "can begin" not in told
    assert not (tmp_path / "new").exists()


ALSO_WRONG = {
    "distill": {"batch_size": 64, "validation": {"share": 0.01}, "student": "cid-conv"},
    "machine": {"device": "cuda:77", "callbacks": ["no.such:thing"], "micro_batch": 8},
    "evaluate": {"compare": {"old": "run:no/run"}},
}
SAYS_OF_IT = ("batch_size: 64", "too few to measure", "normalizes over the batch", "cuda:77", "no.such:thing", "no/run")


def test_one_misfit_hides_no_other(case: Case, tmp_path: Path):
    recipe = case.recipe(
        **ALSO_WRONG,
        cluster={"num_centers": 41, "texts": True, "num_text_centers": 42},
        balance={"threshold": 3.0},
    )
    with pytest.raises(ConfigError, match=r"^check: 9 problems") as error:
        check(RunFolder(tmp_path / "new"), recipe)
    for words in (*SAYS_OF_IT, "41 centers", "42 centers", "balance: "):
        assert words in error.value.problem, words


def test_nor_where_the_stages_before_are_done(case: Case):
    with pytest.raises(ConfigError, match=r"^check: 5 problems") as error:
        check(case.folder, case.recipe(**ALSO_WRONG))  # with what is held out, the batch cannot be compared
    for words in set(SAYS_OF_IT) - {"batch_size: 64"}:
        assert words in error.value.problem, words


def test_clusters_from_elsewhere_are_compared_with_what_is_kept(case: Case, tmp_path: Path):
    np.save(tmp_path / "centers.npy", unit_rows(5, seed=1))
    np.save(tmp_path / "labels.npy", np.zeros(COUNT - 1, dtype=np.int64))
    recipe = case.recipe(cluster={"existing": str(tmp_path)}, distill={"head_perplexity": 5.5, "labels": 6})
    with pytest.raises(ConfigError) as error:
        check(case.folder, recipe)
    for words in ("39 labels for 40 kept", "5.5 likely centers, but there are only 5", "6 labels for an image"):
        assert words in error.value.problem, words


def test_captions_that_changed_after_they_were_embedded_are_refused(case: Case, tmp_path: Path):
    copy = tmp_path / "case"
    shutil.copytree(case.path / "run", copy, symlinks=True)
    texts = sorted((case.path / "pairs").glob("*.txt"))
    written = [path.read_text() for path in texts]
    try:
        for path, text in zip(texts, written, strict=True):
            status = path.stat()
            path.write_text(text.upper())
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # so the embeddings do not count as stale
        with pytest.raises(DataError, match="has the caption 'COLOR 0'"):
            check(RunFolder(copy), case.recipe())
    finally:
        for path, text in zip(texts, written, strict=True):
            path.write_text(text)


def test_tensorboard_that_is_not_installed_is_told(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        check(case.folder, case.recipe(machine={"tensorboard": "on"}))


def test_callbacks_are_found_and_not_called(case: Case, monkeypatch: pytest.MonkeyPatch):
    heard: list[Any] = []
    monkeypatch.setattr(likely_mistakes, "listener", heard.append, raising=False)
    check(case.folder, case.recipe(machine={"callbacks": ["clip_cid.check.likely_mistakes:listener"]}))
    assert not heard


def test_a_loss_that_is_not_finite_at_the_start_is_refused(case: Case, tmp_path: Path):
    tried = trial.from_the_run(case.folder, tmp_path, case.recipe(distill={"sample_rate": 0.5}), ALONE)
    with torch.no_grad():
        next(tried.training.clip.model.parameters()).fill_(float("nan"))
    batch = next(tried.trainer.batches.between(0, 1))
    with pytest.raises(RunError, match=r"The loss clip, .* of the first step is not finite"):
        rehearsal.rehearse(tried.trainer, batch, iter(()))


def test_a_sound_recipe_raises_no_doubt_but_its_tiny_size(case: Case):
    found = check(case.folder, case.recipe(distill={"epochs": 20})).warnings
    assert [line for line in found if not line.startswith("machine.workers")] == []


def test_hours_are_of_epochs_as_short_as_the_clusters_make_them(case: Case, tmp_path: Path):
    labels = np.load(case.folder.path / "cluster" / "labels.npy")
    epoch = int(np.minimum(np.bincount(labels), 4).sum())
    assert epoch < COUNT
    report = check(case.folder, case.recipe(distill={"per_cluster": 4}))
    assert (report.pairs, report.epoch_pairs, report.duration.steps) == (COUNT, epoch, 3 * epoch // BATCH)

    unknown = check(RunFolder(tmp_path / "new"), case.recipe(distill={"per_cluster": 4}))
    assert (unknown.pairs, unknown.epoch_pairs, unknown.duration.steps) == (COUNT, 4 * CENTERS, 3 * 24 // BATCH)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"distill": {"warmup_steps": 2}}, "distill.warmup_steps: 2 is 13 % of the 15 steps; a tenth would be 1"),
        ({"distill": {"log_every": 16}}, "distill.log_every: 16, but the run has 15 steps"),
        ({"distill": {"batch_size": 30}}, "distill.batch_size: 30 of 40 pairs"),
        ({"distill": {"sample_rate": 0.2}}, "distill.sample_rate: 0.2 is 1 of 6 centers a step"),
        ({"distill": {"head_lr": 1e-5}}, "distill.sample_rate: 1 with a head that learns (distill.head_lr: 1e-05)"),
        ({"distill": {"precision": "fp16"}}, "distill.precision: fp16 on the CPU"),
        (
            {"distill": {"weights": "clip-kd", "alignment": "linear", "weigh_gradients_every": 50}},
            "the gradient of feature (weight 2000) is to be 2,000 times that of clip (1)",
        ),
        ({"evaluate": {"sets": {"birds": "no/birds", "d": "builtin:digits"}}}, "evaluate.sets.birds: nothing at no/b"),
        ({"evaluate": {"sets": {"d": "builtin:digits"}, "retrieval": {"r": ["no/r"]}}}, "evaluate.retrieval.r: no/r"),
    ],
)
def test_each_doubt_is_told_in_numbers(case: Case, changed: dict[str, Any], says: str):
    assert any(says in line for line in check(case.folder, case.recipe(**changed)).warnings)


def test_sets_behind_urls_are_kept_where_the_recipe_says(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    watched, measured = (f"file://{tar_set(tmp_path / name, splits=('test',))}" for name in ("watched", "measured"))
    recipe = case.recipe(
        distill={"validation": {"sets": {"watched": watched}, "metric": "zero_shot"}},
        evaluate={"sets": {"measured": measured}},
        machine={"cache_dir": str(tmp_path / "cache")},
    )
    check(case.folder, recipe)
    assert len([*(tmp_path / "cache").rglob("test/0.tar")]) == 2
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_a_recall_on_few_pairs_is_told_to_be_uncertain(case: Case, tmp_path: Path):
    recipe = case.recipe(distill={"validation": {"share": 0.25}, "warmup_steps": 0})
    for folder in (case.folder, RunFolder(tmp_path / "new")):
        report = check(folder, recipe)
        assert 2 <= report.held_out <= COUNT - report.pairs < COUNT / 2
        assert any(
            f"{report.held_out} pairs are held out, on which a recall is uncertain by up to "
            f"{units.percent(math.sqrt(0.25 / report.held_out))}" in line
            for line in report.warnings
        )


@pytest.mark.slow
def test_workers_need_cores_and_time_and_files_need_room(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clip_cid.tasks.available_cores", lambda: 0)
    monkeypatch.setattr("clip_cid.tasks.available_memory", lambda: 100.0)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    report = check(case.folder, case.recipe(machine={"workers": 1}))
    text = "\n".join(report.warnings)
    assert "machine.workers: 1, but this process may use 0 cores" in text
    assert f"{units.size(report.disk.needed)} are needed, but 1.0 kB are free" in text
    assert report.waiting_bytes == 2 * BATCH * (3 * 16 * 16 * 4 + TOKENS * 8)
    assert "the batches they hold ready take" in text


@pytest.mark.parametrize(
    ("settings", "suits"),
    [({}, ["fp16", "fp32"]), ({"precision": "fp16"}, ["fp32"]), ({"precision": "fp16", "loss_precision": "fp32"}, [])],
)
def test_a_gpu_without_bf16_is_told_of(settings: dict[str, Any], suits: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a T4")
    doubts = [*likely_mistakes.of_machine(DistillConfig(**settings), MachineConfig(workers=0), torch.device("cuda"))]
    assert [doubt.partition("; ")[2] for doubt in doubts] == [f"{kind} suits it" for kind in suits]
    assert all("bf16, which a T4 computes in float32 and rounds" in doubt for doubt in doubts)


def test_a_long_run_needs_checkpoints_on_the_way():
    long = Duration(steps=3600, compute=1.0, reading=0.0, overlaps=True)
    short = Duration(steps=1000, compute=1.0, reading=0.0, overlaps=True)
    rare = MachineConfig(checkpoint_minutes=31)
    assert (
        [*likely_mistakes.of_time(long, MachineConfig(checkpoint_minutes=29))]
        == [*likely_mistakes.of_time(short, rare)]
        == []
    )
    (told,) = likely_mistakes.of_time(long, rare)
    assert "the run takes about 60: a kill" in told
    (told,) = likely_mistakes.of_time(Duration(steps=10, compute=1.0, reading=2.0, overlaps=True), MachineConfig())
    assert "50 % of the time" in told


def test_captions_are_truncated_exactly_when_they_have_more_tokens(case: Case):
    clip = build_student(str(case.path / "student.json"), embed_dim=None)
    fits = "red red red red red red"  # with the marks of start and end eight tokens
    assert count_truncated(clip, [fits, f"{fits} red", f"{fits} red red red", "red"]) == 2


def test_truncated_captions_give_a_warning(case: Case, tmp_path: Path):
    write_pairs(tmp_path / "pairs", caption="a very long story of a color, told in many words, with number")
    plain = {"embed": {"teacher": "none", "existing": None}, "pairs": {"source": [str(tmp_path / "pairs")]}}
    report = check(RunFolder(tmp_path / "run"), case.recipe(**plain, distill={"weights": "clip-only"}))
    assert (report.sights.captions, report.sights.truncated) == (COUNT, COUNT)
    assert any("100 % of 40 captions are longer than the student's 8 tokens" in line for line in report.warnings)
    assert report.sights.sides == (12, 12, 12)
    assert report.sights.smaller == COUNT  # 12 pixels for a student that sees 16


class TestBeforeTheEmbeddings:
    """No stage has run: the pairs are the run's, the targets random."""

    @pytest.fixture
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("a check fetches nothing")

        monkeypatch.setattr(socket.socket, "connect", refuse)

    def recipe(self, case: Case, **embed: Any) -> Recipe:
        return case.recipe(embed={"existing": None, **embed}, distill={"weights": "paper-r1"})

    @pytest.mark.slow
    def test_what_can_be_told_is_told(self, case: Case, tmp_path: Path, offline: None, capsys: pytest.CaptureFixture):
        report = check(
            RunFolder(tmp_path / "run"), self.recipe(case, teacher="ViT-B-32", pretrained="laion2b_s34b_b79k")
        )
        assert [state.stage.name for state in report.undone] == ["embed", "balance", "cluster"]
        assert report.teacher_dim == 512
        assert report.disk.before == 4 * 512 * COUNT + 2 * (4 * 512 * CENTERS + 4 * COUNT)
        assert report.teacher is not None
        assert report.teacher.costs is not None
        assert report.teacher.costs.forward == pytest.approx(14.78e9, rel=1e-3)
        assert report.rehearsal.first.parts.keys() == {
            *("clip", "cluster_cls", "cluster_kl", "instance_image", "instance_text")
        }
        assert "whether the weights of ViT-B-32/laion2b_s34b_b79k load" in report.unchecked[0]
        printout.say(report)
        assert "Still to run before the training: embed (missing), balance" in capsys.readouterr().out

    @pytest.mark.slow
    def test_disk_and_time_of_views_are_told(self, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture):
        named = {"teacher": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}
        report = check(RunFolder(tmp_path / "run"), self.recipe(case, **named, views=5))
        assert report.disk.before == (2 + 5) * 2 * 512 * COUNT + 2 * (4 * 512 * CENTERS + 4 * COUNT)
        (line,) = [line for line in report.warnings if line.startswith("embed.views: 5")]
        assert "shows an image 3.0 times, one view each time: at least 2 of its views" in line
        printout.say(report)
        said = " ".join(capsys.readouterr().out.split())
        assert "of these, 5 views of each image │ 204.8 kB" in said
        assert "pairs x teacher, and 5 more passes of its image tower" in said
        assert report.teacher is not None
        assert report.teacher.costs is not None
        flops = COUNT * (report.teacher.costs.forward + 5 * report.teacher.costs.image_flops)
        assert f"embedding these pairs, once │ {flops / 1e12:,.2f} TFLOPs" in said

    def with_texts(self, case: Case, path: Path, weights: dict[str, float]) -> Recipe:
        distill = {
            "weights": {"cluster_cls": 0.0, "cluster_kl": 0.0, **weights},
            "texts": [str(path)],
            "texts_per_step": 3,
        }
        embed = {"existing": None, "teacher": "hf-hub:some/model"}
        return case.recipe(embed=embed, distill=distill, balance={"enabled": False})

    def test_texts_without_images_are_tried_too(self, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture):
        (tmp_path / "words.txt").write_text("one\ntwo\nthree\nfour\n")
        report = check(RunFolder(tmp_path / "run"), self.with_texts(case, tmp_path / "words.txt", {"cosine_text": 1.0}))
        assert report.texts == 4
        assert [state.stage.name for state in report.undone] == ["embed", "texts"]
        assert report.teacher_dim is not None
        assert report.disk.before == report.teacher_dim * (4 * COUNT + 2 * 4)
        assert report.rehearsal.first.parts["cosine_text"] > 0
        printout.say(report)
        assert "4; 3 in a step" in capsys.readouterr().out

    def test_a_file_of_texts_that_is_not_there_is_refused(self, case: Case, tmp_path: Path):
        with pytest.raises(DataError, match=r"no\.txt: no such file"):
            check(RunFolder(tmp_path / "run"), self.with_texts(case, tmp_path / "no.txt", {"bank_text": 1.0}))

    def test_texts_that_no_loss_reads_give_a_warning(self, case: Case, tmp_path: Path):
        report = check(
            RunFolder(tmp_path / "run"),
            self.with_texts(case, tmp_path / "no.txt", {"cosine_text": 0.0, "bank_text": 0.0}),
        )
        assert report.texts == 0
        (line,) = [line for line in report.warnings if line.startswith("distill.texts")]
        assert "distill.weights.cosine_text and distill.weights.bank_text do" in line

    def test_a_teacher_of_the_hub_is_not_asked_for(self, case: Case, tmp_path: Path, offline: None):
        report = check(RunFolder(tmp_path / "run"), self.recipe(case, teacher="hf-hub:some/model"))
        assert report.teacher is not None
        assert report.teacher.costs is None

    @pytest.mark.parametrize(
        ("embed", "says"),
        [
            ({"teacher": "ViT-B-32", "pretrained": "laion3b"}, "no weights named 'laion3b'"),
            ({"teacher": "run:no/run"}, "no/run: the distill stage has not finished"),
            ({"teacher": "local-dir:no/dir"}, "no/dir: no open_clip_config.json"),
            ({"teacher": "ViT-B-32", "pretrained": None}, "architecture without weights"),
        ],
    )
    def test_a_teacher_that_is_not_there_is_refused(self, case: Case, tmp_path: Path, embed: dict[str, Any], says: str):
        with pytest.raises(ClipCidError, match=says):
            check(RunFolder(tmp_path / "run"), self.recipe(case, **embed))

    def test_centers_that_do_not_fit_are_refused(self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("clip_cid.tasks.available_memory", lambda: 1000.0)
        with pytest.raises(RunError, match=r"cluster\.num_centers: 6 centers of width 24"):
            check(RunFolder(tmp_path / "run"), case.recipe())


def test_a_stage_that_is_stale_counts_as_not_done(case: Case):
    report = check(case.folder, case.recipe(cluster={"num_centers": 5}))
    assert [(state.stage.name, state.status) for state in report.undone] == [("cluster", "stale")]
    assert report.parameters["head"] == 5 * DIM


@pytest.mark.slow
def test_the_command_prints_all_sections_and_ends_with_0(case: Case, capsys: pytest.CaptureFixture):
    flags = ["--machine.workers", "0", "--distill.log-every", "99"]
    (case.path / "r.yaml").write_text(case.recipe().model_dump_json())
    assert cli.main(["check", str(case.folder.path), "--recipe", str(case.path / "r.yaml"), *flags]) == 0
    said = capsys.readouterr().out
    for words in ("Losses", "the whole training", "a checkpoint", "The teacher", "Warnings", "log_every: 99"):
        assert words in said, words
    assert "The training can begin: " in said


def test_a_bad_setting_ends_the_command_with_2_and_bad_data_with_1(case: Case, tmp_path: Path):
    (case.path / "r.yaml").write_text(case.recipe().model_dump_json())
    start = ["check", str(tmp_path / "new"), "--recipe", str(case.path / "r.yaml")]
    assert cli.main([*start, "--distill.batch-size", "41"]) == 2
    assert cli.main([*start, "--pairs.source", "nowhere"]) == 1
    assert not (tmp_path / "new").exists()


def test_several_processes_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="check is for one process"):
        check(case.folder, case.recipe())
