"""The losses against stored vectors, beside slow versions and the losses of the batch that they are cases of."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill.contrastive import Side
from clip_cid.method.distill.peer_losses import affinity_loss, feature_loss
from clip_cid.method.distill.stored_losses import bank_loss, cosine_loss


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_cosine_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    found = cosine_loss(Side.whole(student), Side.whole(teacher))
    assert float(found) == pytest.approx((0 + 2 + 0.4) / 3)


@pytest.mark.parametrize("dim", [4, 64, 1280])
def test_clip_kds_feature_loss_is_two_over_the_width_of_it_per_modality(dim: int):
    """So the weight 2000 of clip-kd is 4000 / D of the cosine losses: 31 at a width of 128, 3 at 1280."""
    image, text, teacher_image, teacher_text = (Side.whole(unit_rows(6, dim, seed)) for seed in range(4))
    feature = feature_loss(image, text, teacher_image, teacher_text)
    both = cosine_loss(image, teacher_image) + cosine_loss(text, teacher_text)
    assert float(2000 * feature) == pytest.approx(float(4000 / dim * both), rel=1e-12)


def test_a_small_cosine_loss_keeps_its_digits_in_float32():
    teacher = unit_rows(5, 512, 0)
    student = F.normalize(teacher + 1e-5 * unit_rows(5, 512, 1), dim=1)
    exact = cosine_loss(Side.whole(student), Side.whole(teacher))
    single = cosine_loss(Side.whole(student.float()), Side.whole(teacher.float()))
    assert float(single) == pytest.approx(float(exact), rel=1e-2)  # 1 - cos in float32 would be 0 or 6e-8
    assert 1e-11 < float(exact) < 1e-10


@pytest.mark.parametrize("scale", [1.0, 16.0, 100.0])
@pytest.mark.parametrize("bank", [1, 7, 300])
def test_the_bank_loss_is_the_slow_version(bank: int, scale: float):
    student, teacher, stored = unit_rows(5, 8, 0), unit_rows(5, 8, 1), unit_rows(bank, 8, 2)
    expected = oracles.kl(scale * (teacher @ stored.T).numpy(), scale * (student @ stored.T).numpy(), 1.0)
    found = bank_loss(Side.whole(student), Side.whole(teacher), stored, scale)
    assert float(found) == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_its_gradient_is_that_of_the_dense_form():
    student, teacher, stored = unit_rows(6, 8, 0).requires_grad_(), unit_rows(6, 8, 1), unit_rows(40, 8, 2)
    dense = F.kl_div(
        (16 * student @ stored.T).log_softmax(dim=1),
        (16 * teacher @ stored.T).log_softmax(dim=1),
        log_target=True,
        reduction="batchmean",
    )
    found = bank_loss(Side.whole(student), Side.whole(teacher), stored, 16.0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, dense)))


def test_a_bank_of_the_batch_is_the_affinity_loss():
    """With the teacher's texts as the student's, the image half of the affinity loss is the bank loss of the batch."""
    image, teacher_image, teacher_text = (unit_rows(9, 8, seed) for seed in range(3))
    student, text, teacher = Side.whole(image), Side.whole(teacher_text), Side.whole(teacher_image)
    both = affinity_loss(student, text, number(30.0), teacher, text, number(30.0))
    from_images = bank_loss(student, teacher, teacher_text, 30.0)
    of_teacher, of_student = (30 * (teacher_text @ rows.T).numpy() for rows in (teacher_image, image))
    assert float(2 * both - from_images) == pytest.approx(oracles.kl(of_teacher, of_student, 1.0), rel=1e-10)


def test_no_gradient_reaches_the_bank():
    student, stored = unit_rows(3, 4, 0).requires_grad_(), unit_rows(5, 4, 2).requires_grad_()
    bank_loss(Side.whole(student), Side.whole(unit_rows(3, 4, 1)), stored, 16.0).backward()
    assert student.grad is not None
    assert stored.grad is None
