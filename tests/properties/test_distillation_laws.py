"""Laws of the losses, over batches that hypothesis chooses."""

from collections.abc import Sequence

import numpy as np
import oracles
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_cid.method.distill.cluster_distillation import CenterHead, sample_centers
from clip_cid.method.distill.contrastive import Side, contrastive_loss, instance_loss
from clip_cid.method.distill.fused_cluster_loss import fused_cluster_loss
from clip_cid.method.distill.peer_losses import affinity_loss, feature_loss, one_way_instance_loss, siglip_loss

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
    found = contrastive_loss(Side.whole(a), Side.whole(b), factor)
    np.testing.assert_allclose(found, oracles.contrastive(a.numpy(), b.numpy(), scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(contrastive_loss(Side.whole(b), Side.whole(a), factor), found)


@given(seeds, st.permutations(range(6)))
def test_the_losses_over_a_batch_do_not_depend_on_its_order(seed, order):
    def losses(rows: Sequence[int]) -> list[Tensor]:
        student_image, student_text, teacher_image, teacher_text = (
            Side.whole(unit_rows(6, 5, seed + i)[list(rows)]) for i in range(4)
        )
        return [
            instance_loss(student_image, teacher_text, scale),
            siglip_loss(student_image, student_text, scale, -scale / 2),
            affinity_loss(student_image, student_text, scale, teacher_image, teacher_text, 5 * scale),
            feature_loss(student_image, student_text, teacher_image, teacher_text),
            one_way_instance_loss(student_image, student_text, teacher_image, teacher_text, scale),
        ]

    scale = torch.tensor(14.0)
    torch.testing.assert_close(losses(order), losses(range(6)))


@given(seeds, st.integers(1, 9), st.floats(0.1, 100), st.floats(0.1, 100))
def test_the_affinity_loss_is_the_slow_one_never_negative_and_0_for_a_copy(seed, rows, scale, teacher_scale):
    arrays = [unit_rows(rows, 5, seed + i) for i in range(4)]
    image, text, teacher_image, teacher_text = (Side.whole(array) for array in arrays)
    factors = torch.tensor(scale), torch.tensor(teacher_scale)
    found = affinity_loss(image, text, factors[0], teacher_image, teacher_text, factors[1])
    student, teacher = (
        oracles.batch_logits(a.numpy(), b.numpy(), s)
        for a, b, s in ((*arrays[:2], scale), (*arrays[2:], teacher_scale))
    )
    expected = (oracles.kl(teacher, student, 1.0) + oracles.kl(teacher.T, student.T, 1.0)) / 2
    assert found >= 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert affinity_loss(image, text, factors[0], image, text, factors[0]) == 0
