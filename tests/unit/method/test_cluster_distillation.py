import math

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F

from clip_cid.method.cluster_distillation import CenterHead, cluster_ce, cluster_kl, sample_centers


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def logits(rows: int, columns: int, seed: int, scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * unit_rows(rows, 24, seed, dtype) @ unit_rows(columns, 24, 99, dtype).T


# The head


def test_logits_are_sigma_times_cosines():
    centers, embedding = unit_rows(6, 4, 0), unit_rows(3, 4, 1)
    head = CenterHead(centers, scale=16.0)
    torch.testing.assert_close(head(embedding), 16 * embedding @ centers.T)
    index = torch.tensor([1, 4])
    torch.testing.assert_close(head(embedding, head.rows(index)), 16 * embedding @ centers[index].T)
    assert head.num_centers == 6


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
    head(unit_rows(3, 4, 1)).square().sum().backward()
    assert head.weight.grad is not None


def test_drift_of_many_centers_is_measured_on_some():
    head = CenterHead(torch.eye(2).repeat(3000, 1), trainable=True)
    assert head.start_rows.shape == (4096, 2)
    assert head.watched[-1] == 5999
    with torch.no_grad():
        head.weight.mul_(1.25)
    assert head.drift() == pytest.approx(0.25)


def test_drift_goes_on_after_a_restart():
    head = CenterHead(unit_rows(6, 4, 0), trainable=True)
    with torch.no_grad():
        head.weight.mul_(2)
    again = CenterHead(unit_rows(6, 4, 5), trainable=True)
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


# L_cls


def test_cross_entropy_is_the_dense_one():
    found = cluster_ce(logits(5, 9, 0, 16.0, torch.float64), torch.tensor([0, 3, 8, 3, 1]))
    expected = oracles.cross_entropy(logits(5, 9, 0, 16.0, torch.float64).numpy(), np.array([0, 3, 8, 3, 1]))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_the_correction_makes_the_sampled_sum_unbiased():
    student = logits(1, 30, 0, 6.0, torch.float64)
    labels, generator = torch.tensor([4]), torch.Generator().manual_seed(0)
    truth = float(student.exp().sum())
    corrected, plain = [], []
    for _ in range(800):
        sample = sample_centers(labels, 30, sample_rate=0.4, generator=generator)
        seen = student[:, sample.index]
        own = float(seen[0, sample.labels[0]])
        corrected.append(math.exp(float(cluster_ce(seen, sample.labels, sample.log_inclusion)) + own))
        plain.append(math.exp(float(cluster_ce(seen, sample.labels)) + own))
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert abs(np.mean(plain) - truth) > 8 * error


# L_kl


@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 200.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("nearness", [0.0, 0.9, 0.999, 0.999999])
def test_the_divergence_is_right_to_four_digits_in_float32(scale, temperature, nearness):
    """Also where log-softmax in float32 is noise: a student 1e-6 from the teacher has a KL near 1e-9."""
    teacher = logits(6, 50, 0, scale)
    student = nearness * teacher + (1 - nearness) * logits(6, 50, 1, scale)
    expected = oracles.kl(teacher.numpy(), student.numpy(), temperature)
    found = float(cluster_kl(student, teacher, temperature=temperature))
    assert found == pytest.approx(expected, rel=5e-5, abs=1e-13)


@pytest.mark.parametrize(("scale", "nearness"), [(1.0, 0.999), (16.0, 0.9999), (16.0, 0.0), (64.0, 0.5)])
def test_its_gradient_is_right_to_four_digits_in_float32(scale, nearness):
    teacher = logits(6, 50, 0, scale)
    student = nearness * teacher + (1 - nearness) * logits(6, 50, 1, scale)
    student.requires_grad_()
    cluster_kl(student, teacher, temperature=2.0).backward()
    p = np.exp(oracles.log_softmax(teacher.numpy().astype(np.float64) / 2))
    q = np.exp(oracles.log_softmax(student.detach().numpy().astype(np.float64) / 2))
    assert student.grad is not None
    error = np.linalg.norm(student.grad.numpy() - (q - p) / 2 / 6) / np.linalg.norm((q - p) / 2 / 6)
    assert error < 1e-4


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("with_inclusion", [False, True])
def test_its_gradient_is_that_of_float64_autograd(scale, with_inclusion):
    student = logits(3, 7, 1, scale, torch.float64).requires_grad_()
    teacher = logits(3, 7, 0, scale, torch.float64)
    inclusion = torch.linspace(-3, 0, 7, dtype=torch.float64) if with_inclusion else None
    assert torch.autograd.gradcheck(
        lambda logits: cluster_kl(logits, teacher, temperature=1.7, log_inclusion=inclusion), (student,)
    )
    shift = 0.0 if inclusion is None else inclusion
    plain = F.kl_div(
        F.log_softmax(student / 1.7 - shift, dim=1),
        F.log_softmax(teacher / 1.7 - shift, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    found = cluster_kl(student, teacher, temperature=1.7, log_inclusion=inclusion)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=0)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(3, 7, 1, 4.0).requires_grad_(), logits(3, 7, 0, 4.0).requires_grad_()
    cluster_kl(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_second_derivative_is_refused_rather_than_wrong():
    student = logits(3, 7, 1, 4.0).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(cluster_kl(student, logits(3, 7, 0, 4.0)), student, create_graph=True)


def test_with_all_centers_it_is_the_pull_towards_one_soft_center():
    """KL_i = lse_j(z_ij / tau) - (sigma / tau) <v_i, mu_i> - H_i, with mu and H of the teacher's distribution."""
    centers, image, teacher = (unit_rows(n, 8, seed, torch.float64) for n, seed in ((20, 0), (5, 1), (5, 2)))
    head, tau = CenterHead(centers, scale=16.0), 2.0
    p = torch.softmax(head(teacher) / tau, dim=1)
    soft_centers, entropy = p @ centers, -(p * p.log()).sum(dim=1)
    pull = 16 / tau * (image * soft_centers).sum(dim=1)
    expected = (torch.logsumexp(head(image) / tau, dim=1) - pull - entropy).mean()
    assert float(cluster_kl(head(image), head(teacher), temperature=tau)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("student_far", [True, False])
def test_distributions_that_share_nothing_stay_finite(student_far):
    student, teacher = torch.tensor([[300.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 300.0]])
    if not student_far:
        student = torch.zeros(1, 3)
    student.requires_grad_()
    loss = cluster_kl(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(300.0 if student_far else math.log(3)))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_of_nothing_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        cluster_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


def test_both_losses_are_computed_in_float32_under_autocast():
    student, teacher = logits(4, 9, 0, 16.0).bfloat16(), logits(4, 9, 1, 16.0).bfloat16()
    labels = torch.tensor([0, 1, 2, 3])
    plain = cluster_ce(student.float(), labels), cluster_kl(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cluster_ce(student, labels), cluster_kl(student, teacher)
        head_logits = CenterHead(unit_rows(9, 24, 99))(unit_rows(4, 24, 0).bfloat16())
    assert [float(loss) for loss in found] == [float(loss) for loss in plain]
    assert {loss.dtype for loss in (*found, head_logits)} == {torch.float32}
