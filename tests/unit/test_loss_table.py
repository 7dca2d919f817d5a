"""The table of losses and those who read it agree; tests/docs compares it with docs/method.md."""

import inspect
from typing import get_args

import pytest

from clip_cid.loss_table import LOSSES, Loss, Reading, rows_of
from clip_cid.method.distill import objective
from clip_cid.method.distill.cluster_passes import PASSES
from clip_cid.recipe import LossWeights

each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def test_each_name_is_of_one_loss():
    names = [loss.name for loss in LOSSES]
    assert len(names) == len(set(names))


def test_the_recipe_has_the_weights_of_the_table_in_its_order():
    fields = LossWeights.model_fields
    assert [(name, field.default, field.description) for name, field in fields.items()] == [
        (loss.name, loss.weight, loss.help) for loss in LOSSES
    ]


@each_loss
def test_a_loss_reads_the_arguments_of_its_function(loss: Loss):
    parameters = inspect.signature(loss.resolve()).parameters
    if not loss.reads_centers:
        assert len(parameters) == len(loss.reads)


def test_a_batch_has_all_that_a_loss_may_read():
    assert {loss_reads for loss in LOSSES for loss_reads in loss.reads} == set(get_args(Reading))
    assert all(hasattr(objective._Batch, reading) for reading in get_args(Reading))


def test_what_a_recipe_reads_follows_from_its_weights():
    off = dict.fromkeys(LossWeights.model_fields, 0.0)
    read = {
        loss.name: [
            reading
            for reading in ("clusters", "teacher_image", "teacher_text", "logit_bias")
            if LossWeights.model_validate(off | {loss.name: 0.1}).any_reads(reading)
        ]
        for loss in LOSSES
    }
    assert read == {
        "clip": [],
        "siglip": ["logit_bias"],
        "cluster_cls": ["clusters"],
        "cluster_kl": ["clusters", "teacher_image"],
        "instance_image": ["teacher_text"],
        "instance_text": ["teacher_image"],
        "affinity": ["teacher_image", "teacher_text"],
        "feature": ["teacher_image", "teacher_text"],
        "icl": ["teacher_image", "teacher_text"],
        "cosine_image": ["teacher_image"],
        "cosine_text": ["teacher_text"],
        "bank_image": ["teacher_image"],
        "bank_text": ["teacher_text"],
        "text_cluster_cls": [],
        "text_cluster_kl": ["teacher_text"],
        "cross_cluster_image": ["teacher_image"],
        "cross_cluster_text": ["clusters", "teacher_text"],
    }


def test_a_bank_of_texts_needs_stored_texts_and_one_of_images_does_not():
    named = {loss.name: loss for loss in LOSSES}
    assert [name for name, loss in named.items() if loss.reads_bank] == ["bank_image", "bank_text"]
    assert named["bank_image"].reads_teacher_texts
    assert not named["cosine_image"].reads_teacher_texts


def test_clusters_of_texts_need_stored_texts_and_come_of_passes_over_centers():
    named = {loss.name: loss for loss in LOSSES}
    assert named["text_cluster_cls"].reads_teacher_texts
    assert named["text_cluster_cls"].reads_targets
    by_passes = {name for one in PASSES for name in one.losses}
    assert {name for name, loss in named.items() if loss.reads_centers} == by_passes
    for one in PASSES:
        assert set(named[one.name].reads) == {one.student, one.centers, one.teacher}


def test_rows_come_in_the_order_of_the_table_and_an_unknown_one_is_refused():
    assert [loss.name for loss in rows_of(["icl", "clip"])] == ["clip", "icl"]
    with pytest.raises(ValueError, match=r"losses must be of clip, .*, cross_cluster_text, got alpha"):
        rows_of(["clip", "alpha"])
