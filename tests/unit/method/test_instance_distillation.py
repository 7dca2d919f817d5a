import pytest
import torch
import torch.nn.functional as F

from clip_cid.method.contrastive import contrastive_loss
from clip_cid.method.instance_distillation import instance_loss


def four_embeddings(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Student image, student text, teacher image, teacher text."""
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(5, 4, generator=generator, dtype=dtype), dim=1) for _ in range(4)]


def test_modalities_are_crossed():
    """Where each student vector is the teacher's of the other modality, the loss is that of perfect pairs."""
    images, texts = torch.eye(6)[:3], torch.eye(6)[3:]
    scale = torch.tensor(20.0)
    crossed = instance_loss(texts, images, images, texts, scale)
    straight = instance_loss(images, texts, images, texts, scale)
    assert float(crossed) < 1e-6 < float(straight)


def test_it_is_the_sum_of_both_directions():
    student_image, student_text, teacher_image, teacher_text = four_embeddings()
    scale = torch.tensor(7.0)
    expected = contrastive_loss(teacher_image, student_text, scale) + contrastive_loss(
        teacher_text, student_image, scale
    )
    found = instance_loss(student_image, student_text, teacher_image, teacher_text, scale)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_gradients_reach_both_students_and_the_scale_but_no_teacher():
    student_image, student_text, teacher_image, teacher_text = (array.requires_grad_() for array in four_embeddings())
    scale = torch.tensor(7.0, requires_grad=True)
    instance_loss(student_image, student_text, teacher_image, teacher_text, scale).backward()
    assert teacher_image.grad is None
    assert teacher_text.grad is None
    for learned in (student_image, student_text, scale):
        assert learned.grad is not None
        assert learned.grad.abs().max() > 0


def test_gradients_are_right():
    student_image, student_text, teacher_image, teacher_text = four_embeddings()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    student_image.requires_grad_()
    student_text.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda image, text, s: instance_loss(image, text, teacher_image, teacher_text, s),
        (student_image, student_text, scale),
    )
