import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F

from clip_cid.method.distill.cluster_distillation import CenterHead, calibrated_scale, sample_centers
from clip_cid.method.distill.fused_cluster_loss import soft_centers


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


# The head


def test_the_losses_are_those_of_sigma_times_cosines():
    centers, student, teacher = unit_rows(6, 4, 0), unit_rows(3, 4, 1), unit_rows(3, 4, 2)
    head, labels = CenterHead(centers, scale=16.0), torch.tensor([2, 5, 0])
    found = head(student, head.sample(labels, rate=1.0), teacher=teacher, temperature=2.0)
    logits, targets = (16 * rows.double().numpy() @ centers.double().numpy().T for rows in (student, teacher))
    assert float(found.cls) == pytest.approx(oracles.cross_entropy(logits, labels.numpy()), rel=1e-5)
    assert float(found.kl) == pytest.approx(oracles.kl(targets, logits, 2.0), rel=1e-5)
    assert float(found.own_center) == float(np.float32(np.mean(logits.argmax(axis=1) == labels.numpy())))
    assert head.num_centers == 6


def test_a_sample_is_a_softmax_over_its_centers_alone():
    centers, student = unit_rows(20, 4, 0), unit_rows(3, 4, 1)
    head, labels = CenterHead(centers, scale=8.0), torch.tensor([2, 5, 2])
    sample = head.sample(labels, rate=0.4, generator=torch.Generator().manual_seed(0))
    logits = 8 * student.double().numpy() @ centers[sample.index].double().numpy().T
    assert float(head(student, sample).cls) == pytest.approx(
        oracles.cross_entropy(logits, sample.labels.numpy()), rel=1e-5
    )
    assert len(sample.index) == 8


def test_a_frozen_head_has_nothing_to_train_and_does_not_drift():
    head = CenterHead(unit_rows(6, 4, 0))
    assert [parameter.requires_grad for parameter in head.parameters()] == [False]
    assert head.drift() == 0
    assert list(head.state_dict()) == ["weight"]


def test_a_trainable_head_keeps_unit_rows_and_tells_its_drift():
    centers = unit_rows(6, 4, 0)
    head = CenterHead(centers, trainable=True)
    assert head.drift() == 0
    with torch.no_grad():
        head.weight.mul_(1.5)
    torch.testing.assert_close(head.rows(), centers)
    assert head.drift() == pytest.approx(0.5)
    head(unit_rows(3, 4, 1), head.sample(torch.tensor([0, 1, 2]), rate=1.0)).cls.backward()
    assert head.weight.grad is not None


def test_a_sparse_head_has_a_gradient_at_the_sampled_rows_alone_and_it_is_the_dense_one():
    gradients = []
    for sparse in (False, True):
        head = CenterHead(unit_rows(50, 4, 0), trainable=True, sparse=sparse)
        with torch.no_grad():
            head.weight.mul_(1.3)  # rows are read at unit length whatever theirs is
        sample = head.sample(torch.tensor([7, 3]), rate=0.2, generator=torch.Generator().manual_seed(0))
        found = head(unit_rows(2, 4, 1), sample, teacher=unit_rows(2, 4, 2))
        (found.cls + 2 * found.kl).backward()
        gradients.append(head.weight.grad)
    dense, sparse = gradients
    assert sparse.is_sparse
    assert sparse.coalesce().indices()[0].tolist() == sample.index.tolist()
    assert len(sample.index) == 10
    torch.testing.assert_close(sparse.to_dense(), dense)
    assert dense.abs().sum(dim=1).count_nonzero() == 10


def test_drift_of_many_centers_is_measured_on_some():
    head = CenterHead(torch.eye(2).repeat(3000, 1), trainable=True)
    assert head.start_rows.shape == (4096, 2)
    assert head.watched[-1] == 5999
    with torch.no_grad():
        head.weight.mul_(1.25)
    assert head.drift() == pytest.approx(0.25)


@pytest.mark.resume
def test_drift_goes_on_after_a_restart():
    head = CenterHead(unit_rows(6, 4, 0), trainable=True)
    with torch.no_grad():
        head.weight.mul_(2)
    again = CenterHead(unit_rows(6, 4, 0), trainable=True)
    again.load_state_dict(head.state_dict())
    assert again.drift() == pytest.approx(1)


def test_the_head_does_not_share_memory_with_the_centers_it_was_given():
    centers = unit_rows(3, 4, 0)
    head = CenterHead(centers)
    centers.zero_()
    assert head.weight.abs().sum() > 0


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (math.nan, "nan"), (1.0, "2")])
def test_centers_that_are_not_unit_vectors_are_refused(value, shown):
    centers = torch.eye(4)
    centers[2] = value
    with pytest.raises(ValueError, match=f"row 2 has length {shown}"):
        CenterHead(centers)
    with pytest.raises(ValueError, match="at least one row"):
        CenterHead(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        CenterHead(torch.eye(4), scale=0.0)


# Sampling


def test_a_batch_with_more_centers_than_the_quota_gets_no_negatives():
    sample = sample_centers(torch.tensor([4, 2, 7, 2]), 10, sample_rate=0.2)
    assert sample.index.tolist() == [2, 4, 7]
    assert sample.labels.tolist() == [1, 0, 2, 0]
    assert (sample.num_negatives, sample.log_inclusion.tolist()) == (0, [0, 0, 0])


def test_a_negative_is_as_likely_as_its_inclusion_says():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 5])
    counts = torch.zeros(12)
    for _ in range(800):
        sample = sample_centers(labels, 12, sample_rate=0.5, generator=generator)
        counts[sample.index] += 1
        expected = torch.where((sample.index == 0) | (sample.index == 5), 0.0, math.log(4 / 10))
        torch.testing.assert_close(sample.log_inclusion, expected)
    assert counts[0] == counts[5] == 800
    others = counts[[1, 2, 3, 4, 6, 7, 8, 9, 10, 11]] / 800
    assert (others - 0.4).abs().max() < 0.07  # four standard deviations


def test_the_generator_decides_and_is_the_only_thing_that_does():
    labels = torch.tensor([3])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(draws))
        generator = torch.Generator().manual_seed(seed)
        draws.append(sample_centers(labels, 1000, sample_rate=0.1, generator=generator).index.tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("labels", [[-1, 2], [3, 10], []])
def test_labels_that_are_no_centers_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be centers 0 to 9, got"):
        sample_centers(torch.tensor(labels, dtype=torch.int64), 10, sample_rate=0.5)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_sample_rate_out_of_its_limits_is_refused(rate):
    with pytest.raises(ValueError, match="sample_rate must be above 0 and at most 1, got"):
        sample_centers(torch.tensor([0]), 10, sample_rate=rate)


def test_int32_labels_will_do():
    sample = sample_centers(torch.tensor([7, 3], dtype=torch.int32), 10, sample_rate=1.0)
    assert sample.labels.tolist() == [7, 3]


# Sampling and the dense losses


@pytest.mark.slow
def test_the_correction_makes_the_sampled_sum_unbiased():
    centers, student = unit_rows(30, 24, 99, torch.float64), unit_rows(1, 24, 0, torch.float64)
    head, labels = CenterHead(centers, scale=6.0), torch.tensor([4])
    logits = 6 * student @ centers.T
    truth, own = float(logits.exp().sum()), float(logits[0, 4])
    generator = torch.Generator().manual_seed(0)
    corrected, plain = [], []
    for _ in range(800):
        sample = head.sample(labels, rate=0.4, generator=generator)
        corrected.append(math.exp(float(head(student, sample, logq="both").cls) + own))
        plain.append(math.exp(float(head(student, sample, logq="none").cls) + own))
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert abs(np.mean(plain) - truth) > 8 * error


# Sigma


@pytest.mark.parametrize("perplexity", [3.0, 40.0, 250.0])
def test_a_calibrated_sigma_gives_the_perplexity_asked_for(perplexity: float):
    centers, teacher = unit_rows(300, 16, 0), unit_rows(50, 16, 1)
    scale = calibrated_scale(teacher, centers, perplexity=perplexity)
    logits = scale * teacher.double().numpy() @ centers.double().numpy().T
    log_p = oracles.log_softmax(logits)
    assert math.exp(-float((np.exp(log_p) * log_p).sum(axis=1).mean())) == pytest.approx(perplexity, rel=2e-3)


@pytest.mark.parametrize(("perplexity", "named"), [(1.0, "above 1 and below the 9"), (9.0, "got 9"), (math.nan, "nan")])
def test_a_perplexity_that_no_softmax_has_is_refused(perplexity: float, named: str):
    with pytest.raises(ValueError, match=named):
        calibrated_scale(unit_rows(4, 3, 1), unit_rows(9, 3, 0), perplexity=perplexity)


def test_a_perplexity_sharper_than_any_sigma_makes_it_is_refused():
    centers = unit_rows(2, 3, 0).repeat(3, 1)  # every center three times: no sigma tells them apart
    with pytest.raises(ValueError, match="perplexity must be at least 3"):
        calibrated_scale(unit_rows(4, 3, 1), centers, perplexity=2.0)
    assert (
        float(soft_centers(unit_rows(4, 3, 1), centers, scale=900.0).entropy.min()) >= math.log(3) - 2e-4
    )  # float32 rounds a logit of 900 by 6e-5
