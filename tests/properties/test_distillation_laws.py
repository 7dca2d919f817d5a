"""Laws of the losses, over batches that hypothesis chooses."""

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clip_cid.method.cluster_distillation import CenterHead, sample_centers
from clip_cid.method.contrastive import contrastive_loss
from clip_cid.method.fused_cluster_loss import fused_cluster_loss
from clip_cid.method.instance_distillation import instance_loss

seeds = st.integers(0, 10_000)


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@st.composite
def labels_of(draw):
    num_centers = draw(st.integers(1, 40))
    labels = draw(st.lists(st.integers(0, num_centers - 1), min_size=1, max_size=20))
    return torch.tensor(labels), num_centers


@given(labels_of(), st.floats(0.01, 1.0), seeds)
def test_sampled_centers(data, rate, seed):
    labels, num_centers = data
    sample = sample_centers(labels, num_centers, sample_rate=rate, generator=torch.Generator().manual_seed(seed))
    distinct = len(labels.unique())
    assert torch.equal(sample.index[sample.labels], labels)
    assert (sample.index.diff() > 0).all()
    assert int(sample.index[0]) >= 0
    assert int(sample.index[-1]) < num_centers
    assert len(sample.index) == distinct + sample.num_negatives == max(distinct, round(rate * num_centers))
    assert (sample.log_inclusion[sample.labels] == 0).all()
    assert (sample.log_inclusion <= 0).all()


@given(labels_of(), seeds)
def test_the_sampled_loss_at_rate_1_is_the_dense_softmax(data, seed):
    labels, num_centers = data
    head = CenterHead(unit_rows(num_centers, 6, seed))
    image, teacher = unit_rows(len(labels), 6, seed + 1), unit_rows(len(labels), 6, seed + 2)
    sample = sample_centers(labels, num_centers, sample_rate=1.0)
    found = head(image, sample, teacher=teacher, logq="both")
    logits, targets = (
        16 * rows.double().numpy() @ head.weight.detach().double().numpy().T for rows in (image, teacher)
    )
    np.testing.assert_allclose(found.cls, oracles.cross_entropy(logits, labels.numpy()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.kl, oracles.kl(targets, logits, 1.0), rtol=1e-4, atol=1e-9)


@given(seeds, st.integers(1, 6), st.integers(1, 30), st.floats(0.1, 100), st.floats(0.1, 10))
def test_the_divergence_is_never_negative_and_0_for_a_copy(seed, rows, centers, scale, temperature):
    student, teacher, table = unit_rows(rows, 5, seed), unit_rows(rows, 5, seed + 1), unit_rows(centers, 5, seed + 2)
    labels = torch.zeros(rows, dtype=torch.int64)
    assert fused_cluster_loss(teacher, teacher, table, labels, scale=scale, temperature=temperature)[1] == 0
    _, found = fused_cluster_loss(student, teacher, table, labels, scale=scale, temperature=temperature)
    assert found >= 0
    logits, targets = (scale * one.double().numpy() @ table.double().numpy().T for one in (student, teacher))
    np.testing.assert_allclose(found, oracles.kl(targets, logits, temperature), rtol=1e-4, atol=1e-7)


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 100))
def test_the_contrastive_loss_is_the_slow_one_and_symmetric(seed, rows, dim, scale):
    a, b = unit_rows(rows, dim, seed), unit_rows(rows, dim, seed + 1)
    factor = torch.tensor(scale)
    found = contrastive_loss(a, b, factor)
    np.testing.assert_allclose(found, oracles.contrastive(a.numpy(), b.numpy(), scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(contrastive_loss(b, a, factor), found)


@given(seeds, st.permutations(range(6)))
def test_the_instance_loss_does_not_depend_on_the_order_of_the_batch(seed, order):
    student_image, student_text, teacher_image, teacher_text = (unit_rows(6, 5, seed + i) for i in range(4))
    scale, at = torch.tensor(14.0), list(order)
    torch.testing.assert_close(
        instance_loss(student_image[at], student_text[at], teacher_image[at], teacher_text[at], scale),
        instance_loss(student_image, student_text, teacher_image, teacher_text, scale),
    )
