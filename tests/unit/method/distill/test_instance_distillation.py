import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill.instance_distillation import instance_loss
from clip_cid.method.distill.sides import Side


def unit_rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(5, 4, generator=generator, dtype=torch.float64), dim=1)


def test_it_is_the_slow_version_and_asks_both_ways():
    rows = unit_rows(0), unit_rows(1)
    student, teacher = (array.numpy() for array in rows)
    found = instance_loss(Side.whole(rows[0]), Side.whole(rows[1]), torch.tensor(7.0))
    one_way, other_way = oracles.one_way(student, teacher, 7), oracles.one_way(teacher, student, 7)
    assert one_way != pytest.approx(other_way, rel=1e-2)
    assert float(found) == pytest.approx((one_way + other_way) / 2, rel=1e-12)


def test_gradients_reach_the_student_and_the_scale_but_no_teacher():
    student, teacher, all_teachers = unit_rows(0), unit_rows(1).requires_grad_(), unit_rows(1).requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def loss(student: Tensor, scale: Tensor) -> Tensor:
        return instance_loss(Side.whole(student), Side(teacher, all_teachers, 0), scale)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), scale))
    loss(student, scale).backward()
    assert teacher.grad is None
    assert all_teachers.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0
