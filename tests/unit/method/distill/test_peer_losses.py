"""The losses of peers, and what all losses over a batch that is spread over ranks have in common."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill.contrastive import Side, contrastive_loss, instance_loss
from clip_cid.method.distill.peer_losses import affinity_loss, feature_loss, one_way_instance_loss, siglip_loss
from clip_cid.method.distill.stored_losses import bank_loss, cosine_loss

# Of the student's image and text, the teacher's image and text, two scales and a bias.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda si, st, ti, tt, s, S, b: contrastive_loss(si, st, s),
    "instance_image": lambda si, st, ti, tt, s, S, b: instance_loss(si, tt, s),
    "instance_text": lambda si, st, ti, tt, s, S, b: instance_loss(st, ti, s),
    "siglip": lambda si, st, ti, tt, s, S, b: siglip_loss(si, st, s, b),
    "affinity": lambda si, st, ti, tt, s, S, b: affinity_loss(si, st, s, ti, tt, S),
    "feature": lambda si, st, ti, tt, s, S, b: feature_loss(si, st, ti, tt),
    "icl": lambda si, st, ti, tt, s, S, b: one_way_instance_loss(si, st, ti, tt, s),
    "cosine_text": lambda si, st, ti, tt, s, S, b: cosine_loss(st, tt),
    "bank_text": lambda si, st, ti, tt, s, S, b: bank_loss(st, tt, ti.all, float(S.detach())),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def four(rows: int = 8, dim: int = 5) -> list[Tensor]:
    """Student image, student text, teacher image, teacher text; a teacher whose pairs agree."""
    student_image, student_text, teacher_image, noise = (unit_rows(rows, dim, seed) for seed in range(4))
    return [student_image, student_text, teacher_image, F.normalize(teacher_image + 0.7 * noise, dim=1)]


def sides_of(arrays: list[Tensor]) -> tuple[Side, Side, Side, Side]:
    student_image, student_text, teacher_image, teacher_text = map(Side.whole, arrays)
    return student_image, student_text, teacher_image, teacher_text


def near_copies(noise: float, scale: float, dtype: torch.dtype, rows: int = 64, dim: int = 32) -> Tensor:
    """The affinity loss of a student that is the teacher but for some noise; the same vectors whatever the precision."""
    groups = unit_rows(8, dim, 9).repeat(rows // 8, 1)
    teacher_image = F.normalize(groups + 0.5 * unit_rows(rows, dim, 0), dim=1)
    teacher_text = F.normalize(0.4 * teacher_image + unit_rows(rows, dim, 1), dim=1)
    student = [teacher_image + noise * unit_rows(rows, dim, 2), teacher_text + noise * unit_rows(rows, dim, 3)]
    sides = sides_of([array.float().to(dtype) for array in (*student, teacher_image, teacher_text)])
    return affinity_loss(*sides[:2], number(scale, dtype), *sides[2:], number(scale, dtype))


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()


# Each loss is what its peer computes.


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (3.0, 0.5), (100.0, -7.0)])
def test_siglip_is_the_slow_version(scale, bias):
    image, text = four()[2:]
    found = siglip_loss(Side.whole(image), Side.whole(text), number(scale), number(bias))
    assert float(found) == pytest.approx(oracles.siglip(image.numpy(), text.numpy(), scale, bias), rel=1e-12)


def test_siglip_by_hand():
    rows = torch.eye(2, dtype=torch.float64)
    found = siglip_loss(Side.whole(rows), Side.whole(rows), number(3.0), number(-1.0))
    assert float(found) == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)))


def test_siglip_is_that_of_open_clip():
    from open_clip.loss import SigLipLoss

    def ours(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return siglip_loss(Side.whole(image), Side.whole(text), scale, bias)

    results = []
    for function in (ours, SigLipLoss()):
        inputs = [*four()[:2], number(10.0), number(-9.0)]
        value = function(*(tensor.requires_grad_() for tensor in inputs))
        results.append((value, *torch.autograd.grad(value, inputs)))
    torch.testing.assert_close(results[0], results[1])


def test_siglip_keeps_the_digits_of_pairs_that_are_found():
    """Own logits of 30, all others of -30: each of the batch's four is e^-30, and so is the gradient by its logit."""
    rows, bias = torch.eye(2).requires_grad_(), torch.tensor(-30.0, requires_grad=True)
    found = siglip_loss(Side.whole(rows), Side.whole(rows), torch.tensor(60.0), bias)
    assert found.item() == pytest.approx(2 * math.exp(-30), rel=1e-5)
    found.backward()
    assert rows.grad is not None
    assert rows.grad[0].tolist() == pytest.approx([-60 * math.exp(-30), 60 * math.exp(-30)], rel=1e-5)


def test_affinity_is_that_of_open_clip_less_the_entropy_of_the_teacher():
    from open_clip.loss import DistillClipLoss

    teacher_image, teacher_text = four(dim=7)[2:]
    teacher_scale = number(20.0)
    teacher_logits = teacher_scale * teacher_image @ teacher_text.T

    def ours(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        teacher = Side.whole(teacher_image), Side.whole(teacher_text), teacher_scale
        return affinity_loss(Side.whole(image), Side.whole(text), scale, *teacher)

    def theirs(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        _, distill = DistillClipLoss()(image, text, scale, teacher_image, teacher_text, teacher_scale)
        return distill - (entropy(teacher_logits) + entropy(teacher_logits.T)) / 2

    results = []
    for function in (ours, theirs):
        inputs = [*four()[:2], number(14.0)]
        value = function(*(tensor.requires_grad_() for tensor in inputs))
        results.append((value, *torch.autograd.grad(value, inputs)))
    assert results[0][0] > 0.5
    torch.testing.assert_close(results[0], results[1])


def test_affinity_is_the_slow_version_with_each_scale_on_its_own_side():
    arrays = four()
    sides = sides_of(arrays)
    student, teacher = (
        oracles.batch_logits(a.numpy(), b.numpy(), scale) for a, b, scale in ((*arrays[:2], 14.0), (*arrays[2:], 50.0))
    )
    expected = (oracles.kl(teacher, student, 1.0) + oracles.kl(teacher.T, student.T, 1.0)) / 2
    found = affinity_loss(*sides[:2], number(14.0), *sides[2:], number(50.0))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_feature_by_hand():
    images, texts = torch.eye(4)[:2], torch.eye(4)[2:]
    sides = sides_of([images, texts, images.flip(0), texts])
    assert float(feature_loss(*sides)) == 0.5  # each image is off by a squared distance of 2, over 4 elements
    assert float(feature_loss(*sides[:2], *sides[:2])) == 0


def test_feature_is_the_slow_version():
    arrays = four(dim=9)
    squares = [
        (float(x) - float(y)) ** 2
        for student, teacher in ((arrays[0], arrays[2]), (arrays[1], arrays[3]))
        for x, y in zip(student.flatten(), teacher.flatten(), strict=True)
    ]
    found = feature_loss(*sides_of(arrays))
    assert float(found) == pytest.approx(math.fsum(squares) / (8 * 9), rel=1e-12)


def test_icl_is_the_slow_version_and_never_asks_the_teacher():
    arrays = four()
    student_image, student_text, teacher_image, teacher_text = (array.numpy() for array in arrays)
    asked = oracles.one_way(student_image, teacher_text, 14.0) + oracles.one_way(student_text, teacher_image, 14.0)
    found = one_way_instance_loss(*sides_of(arrays), number(14.0))
    assert float(found) == pytest.approx(asked / 2, rel=1e-12)


# What all have in common.


@each_loss
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_mean_over_ranks_is_the_loss_of_the_batch_and_has_its_gradients(loss, ranks):
    scale, teacher_scale, bias = number(14.0), number(50.0), number(-5.0)

    def gathered(pieces: list[Tensor], rank: int) -> Side:
        return Side(pieces[rank], torch.cat(pieces), rank * len(pieces[0]))

    def results(ranks: int) -> list[Tensor]:
        numbers = [one.clone().requires_grad_() for one in (scale, bias)]
        pieces = [[piece.clone().requires_grad_() for piece in array.chunk(ranks)] for array in four()]
        share = [
            loss(*(gathered(array, rank) for array in pieces), numbers[0], teacher_scale, numbers[1])
            for rank in range(ranks)
        ]
        value = torch.stack(share).mean()
        value.backward()
        gradients = [[torch.zeros_like(x) if x.grad is None else x.grad for x in array] for array in (*pieces, numbers)]
        return [value.detach(), *(torch.cat(array) for array in gradients[:4]), *gradients[4]]

    whole, spread = results(1), results(ranks)
    assert all(any(gradient.any() for gradient in found[1:3]) for found in (whole, spread))
    torch.testing.assert_close(spread, whole, rtol=1e-12, atol=1e-14)


@each_loss
def test_gradients_reach_the_student_and_its_scale_and_nothing_of_the_teacher(loss):
    arrays = [array.requires_grad_() for array in four()]
    everyone = [array.detach().clone().requires_grad_() for array in arrays]
    teacher_scale = number(50.0).requires_grad_()
    sides = [Side(own, rows, 0) for own, rows in zip(arrays, everyone, strict=True)]
    loss(*sides, number(14.0), teacher_scale, number(-5.0)).backward()
    assert any(array.grad is not None for array in arrays[:2])
    assert [tensor.grad for tensor in (*arrays[2:], *everyone[2:], teacher_scale)] == [None] * 5


@each_loss
def test_gradients_are_right(loss):
    arrays = four(rows=4, dim=3)
    teacher = [Side.whole(array) for array in arrays[2:]]

    def of_student(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # What a loss does not read has a gradient of 0, not none.
        unused = 0 * (image.sum() + text.sum() + scale + bias)
        return loss(Side.whole(image), Side.whole(text), *teacher, scale, number(6.0), bias) + unused

    inputs = (*arrays[:2], number(5.0), number(-2.0))
    assert torch.autograd.gradcheck(of_student, tuple(tensor.requires_grad_() for tensor in inputs))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32_under_autocast(loss, dtype):
    arrays, numbers = [array.to(dtype) for array in four(16, 32)], [torch.tensor(value) for value in (50.0, 80.0, -9.0)]
    plain = loss(*(Side.whole(array.float()) for array in arrays), *numbers)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(*(Side.whole(array) for array in arrays), *numbers)
    assert found.dtype == torch.float32
    assert float(found) == float(plain)


@each_loss
def test_the_largest_scale_overflows_nothing(loss):
    """Opposite vectors: logits of 100 and -100, the worst there are, in float32."""
    axis = torch.eye(4)[:1].repeat(6, 1)
    sign = torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    image, text = (sign * axis).requires_grad_(), (-sign * axis).requires_grad_()
    teacher = Side.whole(sign * axis), Side.whole(sign * axis)
    found = loss(Side.whole(image), Side.whole(text), *teacher, *(torch.tensor(x) for x in (100.0, 100.0, 10.0)))
    found.backward()
    assert found.isfinite()
    assert found > 0
    gradients = [array.grad for array in (image, text) if array.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("clip", {1}), ("instance_image", {3}), ("instance_text", {2}), ("siglip", {1})]
    + [("cosine_text", {3}), ("bank_text", {3})]
    + [(name, wrong) for name in ("affinity", "feature", "icl") for wrong in ({0}, {1}, {2}, {3}, {2, 3})],
)
def test_sides_of_other_rows_are_refused(name, wrong):
    sides = [Side(array[2:4], array, 4 if place in wrong else 2) for place, array in enumerate(four())]
    with pytest.raises(ValueError, match="sides must be of the same rows of a batch"):
        LOSSES[name](*sides, number(14.0), number(50.0), number(-5.0))


# A divergence keeps its digits.


@pytest.mark.parametrize(("noise", "scale"), [(1e-2, 100.0), (1e-3, 100.0), (1e-4, 100.0), (1e-3, 14.3)])
def test_a_small_divergence_in_float32_is_that_in_float64(noise, scale):
    exact, found = near_copies(noise, scale, torch.float64), near_copies(noise, scale, torch.float32)
    assert 0 < exact < 0.1
    assert float(found) == pytest.approx(float(exact), rel=1e-3)


def test_the_affinity_loss_refuses_a_second_derivative_which_would_come_out_as_0():
    arrays = [array.requires_grad_() for array in four()]
    sides = sides_of(arrays)
    loss = affinity_loss(*sides[:2], number(14.0), *sides[2:], number(50.0))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, arrays[0], create_graph=True)
