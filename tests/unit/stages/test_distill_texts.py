"""A student with its teacher's text tower: the export fits an index of the teacher's texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from test_distill import DIM, STUDENT, write_pairs
from tiny_training import power_cut

from clip_cid import pipeline
from clip_cid.check import check
from clip_cid.data.embeddings.store import EmbeddingStore
from clip_cid.errors import ConfigError, DataError
from clip_cid.models.export import export_student
from clip_cid.models.student import build_student
from clip_cid.recipe import Recipe, parse_recipe
from clip_cid.run_folder import RunFolder
from clip_cid.training.assemble import prepare
from clip_cid.training.ranks.distributed import ALONE

TEXT = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SETTINGS: dict[str, Any] = {"text_tower": "teacher", "batch_size": 6, "steps": 4, "warmup_steps": 1, "log_every": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, a student, a teacher, another teacher, and a run with the teacher's embeddings."""
    folder = tmp_path_factory.mktemp("texts")
    write_pairs(folder / "pairs")
    (folder / "student.json").write_text(json.dumps(STUDENT))
    for seed, name in enumerate(("teacher", "other")):
        (folder / f"{name}.json").write_text(json.dumps({**STUDENT, "embed_dim": DIM, "text_cfg": TEXT}))
        clip = build_student(str(folder / f"{name}.json"), embed_dim=None, seed=seed)
        export_student(clip, folder / name, head_state={}, provenance={})
    pipeline.run(RunFolder(folder / "embedded"), recipe(folder), only="embed")
    return folder


def recipe(place: Path, *, embed: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    distill = {"student": str(place / "student.json"), **SETTINGS, **changes}
    values = {
        "pairs": {"source": [str(place / "pairs")]},
        "embed": embed or {"teacher": f"local-dir:{place / 'teacher'}"},
        "balance": {"enabled": False},
        "cluster": {"num_centers": 4},
        "distill": distill,
        "machine": {"device": "cpu", "threads": 1, "workers": 0, "tensorboard": "off"},
    }
    return parse_recipe(values, where="test")


def existing(place: Path) -> dict[str, Any]:
    return {"existing": place / "embedded" / "embed"}


def in_arrays(place: Path, out: Path) -> dict[str, Any]:
    """The same embeddings as .npy files, which name no teacher."""
    store = EmbeddingStore.open(place / "embedded" / "embed")
    out.mkdir()
    np.save(out / "image_embeddings.npy", store.images[np.arange(store.rows)])
    np.save(out / "text_embeddings.npy", store.texts[np.arange(store.rows)])
    captions = [store.captions(row)[0] for row in range(store.rows)]
    pq.write_table(pa.table({"key": list(store.keys), "caption": captions}), out / "metadata.parquet")
    return {"existing": out}


@pytest.mark.parametrize("changes", [{}, {"weights": {"clip": 0, "cluster_cls": 0, "cluster_kl": 0, "feature": 9}}])
def test_the_texts_of_the_export_are_those_of_the_store_within_float16(
    place: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """And its scale is the teacher's unless a loss has trained one."""
    pipeline.run(RunFolder(tmp_path), recipe(place, embed=existing(place), **changes))
    store = EmbeddingStore.open(tmp_path / "embed")
    source = f"local-dir:{tmp_path / 'distill' / 'student'}"
    model: Any = open_clip.create_model_from_pretrained(source, return_transform=False)
    captions = [store.captions(row)[0] for row in range(store.rows)]
    with torch.inference_mode():
        texts = F.normalize(model.encode_text(open_clip.get_tokenizer(source)(captions)).double(), dim=1)
    stored = store.texts[np.arange(store.rows)].astype(np.float64)
    assert np.abs(texts.numpy() - stored).max() < 2.0**-11  # half a step of float16 below 1

    theirs: Any = open_clip.create_model_from_pretrained(f"local-dir:{place / 'teacher'}", return_transform=False)
    scales = [dict(one.named_parameters())["logit_scale"] for one in (model, theirs)]
    assert torch.equal(*scales) == bool(changes)


def test_only_the_image_tower_is_in_optimizer_average_and_checkpoints(place: Path, tmp_path: Path) -> None:
    training = prepare(
        RunFolder(place / "embedded"),
        tmp_path,
        recipe(place, weights={"cluster_cls": 0, "cluster_kl": 0}, ema_decay=0.9),
        ALONE,
    )
    trainer = training.trainer
    learned = {name for name, value in trainer.model.student.named_parameters() if value.requires_grad}
    assert {name for name in learned if not name.startswith("visual.")} == {"logit_scale"}
    in_optimizers = sum(len(group["params"]) for one in trainer.learner.optimizers for group in one.param_groups)
    assert in_optimizers == len(learned) + 1  # the scale of the instance loss
    parts = trainer._parts()
    saved = [*parts["model"].state_dict(), *parts["ema"].state_dict()["mean"]]
    assert {name.removeprefix("student.") for name in saved} <= learned | {"objective.instance_logit_scale"}


def test_a_killed_training_resumes_exactly(place: Path, tmp_path: Path) -> None:
    settings = recipe(place, embed=existing(place), validation={"share": 0.3, "every": 6, "keep": "best"})
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    pipeline.run(whole, settings)
    with power_cut(2):
        pipeline.run(killed, settings)
    pipeline.run(killed, settings)
    weights = [(one.path / "distill/student/open_clip_model.safetensors").read_bytes() for one in (whole, killed)]
    assert weights[0] == weights[1]


def test_embeddings_without_a_teachers_name_need_one_and_it_must_be_right(place: Path, tmp_path: Path) -> None:
    embed = in_arrays(place, tmp_path / "arrays")
    with pytest.raises(ConfigError, match="do not name a model that made them"):
        pipeline.run(RunFolder(tmp_path / "none"), recipe(place, embed=embed))
    with pytest.raises(DataError, match=r"has cosine .* with the stored one .* another model made these"):
        pipeline.run(
            RunFolder(tmp_path / "wrong"), recipe(place, embed=embed, text_tower=f"local-dir:{place / 'other'}")
        )
    pipeline.run(RunFolder(tmp_path / "right"), recipe(place, embed=embed, text_tower=f"local-dir:{place / 'teacher'}"))
    with pytest.raises(DataError, match="not those that made the embeddings"):
        pipeline.run(
            RunFolder(tmp_path / "named"),
            recipe(place, embed=existing(place), text_tower=f"local-dir:{place / 'other'}"),
        )


def test_check_says_what_is_saved_and_refuses_what_names_no_teacher(place: Path, tmp_path: Path) -> None:
    report = check(RunFolder(place / "embedded"), recipe(place, weights={"cluster_cls": 0, "cluster_kl": 0}))
    assert report.student is not None
    assert report.own_towers is not None
    image = report.student.in_step(passes=1, reads_texts=False)
    assert image == 3 * report.student.image_flops
    assert report.own_towers.in_step(passes=1, reads_texts=True) > image
    with pytest.raises(ConfigError, match="do not name a model that made them"):
        check(RunFolder(tmp_path / "run"), recipe(place, embed=in_arrays(place, tmp_path / "arrays")))


def test_the_names_of_text_losses_are_refused_and_left_out_of_presets(place: Path) -> None:
    assert recipe(place, weights="paper-r1").distill.weights.instance_text == 0
    assert recipe(place).distill.weights.instance_text == 0
    assert recipe(place, text_tower="own").distill.weights.instance_text == 0.5
    with pytest.raises(ConfigError, match=r"instance_text would train it; set distill.weights.instance_text: 0"):
        recipe(place, weights={"instance_text": 0.5})
    with pytest.raises(ConfigError, match="set alignment: native"):
        recipe(place, alignment="linear")
    with pytest.raises(ConfigError, match=r"so distill\.texts teach nothing; leave them out"):
        recipe(place, texts=["lines.txt"])
    with pytest.raises(ConfigError, match="set lock: none"):
        recipe(place, lock="text", pretrained="x")
    with pytest.raises(ConfigError, match=r"no embeddings of it to learn from; set distill.text_tower: own"):
        recipe(place, embed={"teacher": "none"}, weights="clip-only")
    with pytest.raises(ConfigError, match="own, teacher, or of a model"):
        recipe(place, text_tower="mine")
