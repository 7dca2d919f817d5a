"""Several labels a row, and centers that are no negatives: laws, and the loss by its definition in float64."""

import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill import cluster_distillation
from clip_cid.method.distill.cluster_distillation import CenterHead, nearest_labels, sample_centers
from clip_cid.method.distill.fused_cluster_loss import cluster_losses, soft_centers

ROWS, CENTERS, DIM = 6, 30, 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def some_labels(count: int, seed: int = 3) -> Tensor:
    """Different ones for each row."""
    return torch.stack([torch.randperm(CENTERS, generator=seeded(seed + row))[:count] for row in range(ROWS)])


def value_and_gradients(loss: Tensor, *wanted: Tensor) -> list[Tensor]:
    return [loss.detach().double(), *(part.double() for part in torch.autograd.grad(loss, wanted, retain_graph=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ignore_near", [None, 0.3])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_loss_and_its_gradients_are_those_of_the_definition(count, ignore_near, trained, dtype):
    labels = some_labels(count)
    for scale, block, corrected, temperature in itertools.product((1.0, 16.0, 64.0), (None, 7), (False, True), (1, 2)):
        student = unit_rows(ROWS, 1, dtype).requires_grad_()
        centers = unit_rows(CENTERS, 2, dtype).requires_grad_(trained)
        wanted = (student, centers) if trained else (student,)
        shift = torch.linspace(-2, 0, CENTERS, dtype=dtype) if corrected else None
        expected = oracles.several_labels_dense(
            student, centers, labels, scale=scale, ignore_near=ignore_near, log_inclusion=shift
        )
        found = cluster_losses(
            student,
            centers,
            labels,
            teacher=unit_rows(ROWS, 4, dtype),
            scale=scale,
            temperature=float(temperature),
            log_inclusion=shift,
            logq="both",
            ignore_near=ignore_near,
            block_centers=block,
        )
        bound = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, scale / 32)
        for ours, right in zip(
            value_and_gradients(found.cls, *wanted), value_and_gradients(expected, *wanted), strict=True
        ):
            assert float((ours - right).norm()) <= bound * float(right.norm()) + 1e-12


@pytest.mark.parametrize("scale", [16.0, 150.0])
@pytest.mark.parametrize("trained", [False, True])
def test_labels_and_near_centers_do_not_touch_the_divergence(trained, scale):
    """Also where rows take a second pass."""
    student, centers = unit_rows(ROWS, 1).requires_grad_(), unit_rows(CENTERS, 2).requires_grad_(trained)
    teacher, wanted = unit_rows(ROWS, 4), (student, centers) if trained else (student,)
    teachers = [teacher] if trained else [teacher, soft_centers(teacher, centers, scale=scale)]
    for target in teachers:
        found = [
            cluster_losses(student, centers, labels, teacher=target, scale=scale, ignore_near=near).kl
            for labels, near in ((some_labels(1)[:, 0], None), (some_labels(4), None), (some_labels(4), 0.3))
        ]
        first, *others = (value_and_gradients(kl, *wanted) for kl in found if kl is not None)
        for other in others:
            for ours, right in zip(other, first, strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_one_label_in_a_column_is_the_label_itself_and_near_at_1_is_absent_bit_for_bit(trained, temperature, dtype):
    student = unit_rows(ROWS, 1, dtype).requires_grad_()
    centers = torch.cat([unit_rows(CENTERS - 1, 2, dtype), unit_rows(1, 2, dtype)]).requires_grad_(trained)
    labels, wanted = some_labels(1), (student, centers) if trained else (student,)
    how = {"teacher": unit_rows(ROWS, 4, dtype), "scale": 16.0, "temperature": temperature}
    plain = cluster_losses(student, centers, labels[:, 0], **how)
    for other in (
        cluster_losses(student, centers, labels, **how),
        cluster_losses(student, centers, labels, ignore_near=1.0, **how),  # although two centers are equal
    ):
        assert torch.equal(plain.own_center, other.own_center)
        for before, after in ((plain.cls, other.cls), (plain.kl, other.kl)):
            assert before is not None
            assert after is not None
            pairs = zip(value_and_gradients(before, *wanted), value_and_gradients(after, *wanted), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_order_of_the_labels_does_not_matter():
    student, centers, labels = unit_rows(ROWS, 1), unit_rows(CENTERS, 2), some_labels(4)
    found, turned = (cluster_losses(student, centers, order, scale=16.0).cls for order in (labels, labels.flip(1)))
    assert float(found) == pytest.approx(float(turned), rel=1e-12)


def test_a_row_without_negatives_has_nothing_to_learn():
    student, centers = unit_rows(ROWS, 1).requires_grad_(), unit_rows(CENTERS, 2)
    for labels, near, trained in (
        (torch.arange(CENTERS).repeat(ROWS, 1), None, False),
        (some_labels(2), -1.0, True),
    ):
        learning = centers.clone().requires_grad_(trained)
        found = cluster_losses(student, learning, labels, scale=16.0, ignore_near=near)
        assert found.cls.item() == 0
        wanted = (student, learning) if trained else (student,)
        assert all((part == 0).all() for part in torch.autograd.grad(found.cls, wanted))
        assert found.own_center.item() == 1


def test_the_nearest_of_several_own_centers_counts_as_the_first():
    centers = torch.eye(4, DIM, dtype=torch.float64)
    student = F.normalize(centers[1] + 0.5 * centers[2], dim=0)[None]
    shares = {
        (0,): 0.0,
        (0, 1): 1.0,
        (0, 2): 0.0,
    }
    for labels, share in shares.items():
        assert cluster_losses(student, centers, torch.tensor([labels]), scale=16.0).own_center.item() == share


def test_all_labels_of_a_batch_are_in_the_sample():
    labels = some_labels(3)
    sample = sample_centers(labels, CENTERS, sample_rate=0.8, generator=seeded(0))
    assert torch.equal(sample.index[sample.labels], labels)
    assert (sample.log_inclusion[sample.labels] == 0).all()
    assert len(sample.index) == 24
    assert sample.num_negatives == 24 - len(labels.unique())


def test_a_sampled_sum_over_the_negatives_is_right_on_average():
    """Over all samples the mean of the corrected sum is the whole one, near centers left out of both."""
    centers, student, labels = unit_rows(7, 2), unit_rows(1, 1), torch.tensor([[4, 0]])

    def summed(sample: cluster_distillation.SampledCenters) -> float:
        head = CenterHead(centers, scale=4.0)
        loss = head(student, sample, logq="both", ignore_near=0.2).cls
        return math.expm1(float(loss))

    whole = summed(sample_centers(labels, 7, sample_rate=1.0))
    others, found = [1, 2, 3, 5, 6], []
    for negatives in itertools.combinations(others, 2):
        index = torch.tensor(sorted([0, 4, *negatives]))
        inclusion = torch.tensor([0.0 if int(center) in (0, 4) else math.log(2 / 5) for center in index])
        places = torch.searchsorted(index, labels)
        found.append(
            summed(cluster_distillation.SampledCenters(index, places, inclusion, torch.tensor(2), complete=False))
        )
    assert sum(found) / len(found) == pytest.approx(whole, rel=1e-6)
    assert whole > 0


def test_a_trained_sparse_head_learns_its_sampled_rows():
    gradients = []
    for sparse in (False, True):
        head = CenterHead(unit_rows(CENTERS, 2), trainable=True, sparse=sparse)
        sample = head.sample(some_labels(2), rate=0.6, generator=seeded(0))
        head(unit_rows(ROWS, 1), sample, ignore_near=0.3).cls.backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.to_dense())
    torch.testing.assert_close(*gradients)


def test_the_labels_are_the_own_cluster_and_the_nearest_other_centers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster_distillation, "suitable_block", lambda rows: 7)
    teacher, centers = unit_rows(ROWS, 1), unit_rows(CENTERS, 2)
    own = torch.tensor([3, 0, 29, 14, 3, 7])
    found = nearest_labels(teacher, centers, own, 5)
    for row, label, labels in zip(teacher, own.tolist(), found.tolist(), strict=True):
        order = [center for center in (-(centers @ row)).argsort().tolist() if center != label]
        assert labels == [label, *order[:4]]
    assert torch.equal(nearest_labels(teacher, centers, own, 1)[:, 0], own)
    assert nearest_labels(teacher, centers, own, CENTERS).sort(dim=1).values.tolist() == [list(range(CENTERS))] * ROWS
    with pytest.raises(ValueError, match="count must be 1 to the number of centers, 30, got 31"):
        nearest_labels(teacher, centers, own, CENTERS + 1)


def test_a_center_twice_among_the_labels_of_a_row_is_refused():
    labels = some_labels(3)
    labels[2, 1] = labels[2, 0]
    with pytest.raises(ValueError, match="different centers for a row, but those of row 2 are"):
        cluster_losses(unit_rows(ROWS, 1), unit_rows(CENTERS, 2), labels, scale=16.0)
