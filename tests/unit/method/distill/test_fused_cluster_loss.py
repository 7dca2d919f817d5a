"""The fused losses against plain float64 autograd over whole matrices of logits, and the laws they have to keep."""

import itertools
import math
from decimal import Decimal, localcontext
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import oracles
import processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clip_cid.method.distill import center_pass
from clip_cid.method.distill.fused_cluster_loss import SoftCenters, cluster_losses, fused_cluster_loss, soft_centers

SHAPES = list(itertools.product((1, 5, 64), (1, 2, 7, 300)))


class Case(NamedTuple):
    student: Tensor
    centers: Tensor
    labels: Tensor
    teacher: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.student.to(dtype), self.centers.to(dtype), self.labels, self.teacher.to(dtype))

    def copied(self, *, trained: bool) -> "Case":
        """With a student that takes a gradient, and centers that do if `trained`."""
        student, centers = self.student.detach().clone(), self.centers.detach().clone()
        return self._replace(student=student.requires_grad_(), centers=centers.requires_grad_(trained))


def unit_rows(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def a_case(rows: int, columns: int, *, nearness: float = 0.0, dim: int = 24, seed: int = 0) -> Case:
    """A student that has covered `nearness` of its way to the teacher; in float64."""
    teacher = unit_rows(rows, dim, seed + 1)
    student = F.normalize(nearness * teacher + (1 - nearness) * unit_rows(rows, dim, seed + 2), dim=1)
    labels = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(seed))
    return Case(student, unit_rows(columns, dim, seed + 3), labels, teacher)


def dense(case: Case, **how) -> tuple[Tensor, Tensor]:
    return oracles.cluster_losses_dense(case.student, case.centers, case.labels, case.teacher, **how)


def fused(case: Case, **how) -> tuple[Tensor, Tensor]:
    found = cluster_losses(case.student, case.centers, case.labels, teacher=case.teacher, **how)
    assert found.kl is not None
    return found.cls, found.kl


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    """Of the student, and of the centers if they take one."""
    wanted = [rows for rows in (case.student, case.centers) if rows.requires_grad]
    return [part.double() for part in torch.autograd.grad(loss, wanted, retain_graph=True)]


def error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Length of the difference beyond `floor`, relative to that of what is right."""
    beyond = float((found.double() - expected).norm()) - floor
    return beyond / float(expected.norm()) if beyond > 0 else 0.0


def float32_bound(scale: float, temperature: float) -> float:
    """1e-5; above logits of 32 in proportion, for float32 rounds a logit of 64 by 4e-6 and its exponential by as much."""
    return 1e-5 * max(1.0, scale / min(temperature, 1.0) / 32)


# Values and gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logq", [None, "none", "kl", "both"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
def test_losses_and_gradients_are_those_of_dense_autograd(scale, temperature, logq, dtype):
    """But for what rounding leaves of a gradient that is 0, as where there is one center."""
    bound = float32_bound(scale, temperature) if dtype == torch.float32 else 1e-10
    noise = max(torch.finfo(dtype).eps / 32 * (scale / min(temperature, 1.0)) ** 2, 1e-12 * scale)
    for (rows, columns), nearness, block in zip(
        SHAPES, itertools.cycle((0.0, 0.9)), itertools.cycle((3, 256, None, 7)), strict=False
    ):
        case = a_case(rows, columns, nearness=nearness, seed=columns).to(dtype)
        how = {"scale": scale, "temperature": temperature}
        if logq is not None:
            how |= {"logq": logq, "log_inclusion": torch.linspace(-3, 0, columns, dtype=dtype)}
        truth = case.to(torch.float64).copied(trained=True)
        expected = dense(truth, **how)
        for trained in (False, True):
            copy = case.copied(trained=trained)
            found = fused(copy, **how, block_centers=block)
            for name, loss, right in zip(("cls", "kl"), found, expected, strict=True):
                where = f"{name} of {rows} x {columns}, {nearness=}, {block=}, {trained=}"
                assert loss.dtype == dtype
                assert error(loss.detach(), right.detach(), floor=1e-14 * scale) < bound, where
                for part, exact in zip(gradients(loss, copy), gradients(right, truth), strict=False):
                    assert error(part, exact, floor=noise) < bound, where


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 4.0), (1.0, 1.0), (16.0, 0.5), (64.0, 1.0)])
@pytest.mark.parametrize("nearness", [0.999, 1 - 1e-4, 1 - 1e-6])
def test_a_small_divergence_and_its_gradient_keep_their_digits_in_float32(nearness, scale, temperature, trained):
    """Where log-softmax in float32 is noise, and in float64 has lost half of its digits: here against 40 digits."""
    case = a_case(3, 25, nearness=nearness, dim=8).to(torch.float32).copied(trained=trained)
    value, gradient = exact_kl(case, scale, temperature)
    _, kl = fused(case, scale=scale, temperature=temperature, block_centers=7)
    assert float(kl.detach()) == pytest.approx(value, rel=float32_bound(scale, temperature))
    assert error(gradients(kl, case)[0], gradient) < float32_bound(scale, temperature)


def exact_kl(case: Case, scale: float, temperature: float) -> tuple[float, Tensor]:
    """L_kl and its gradient by the student, by their definitions, in decimal numbers."""
    with localcontext() as context:
        context.prec = 40
        student, centers, teacher = (
            [[Decimal(value) for value in row] for row in rows.tolist()]
            for rows in (case.student, case.centers, case.teacher)
        )
        power = Decimal(scale) / Decimal(temperature)
        total, gradient = Decimal(0), []
        for of_student, of_teacher in zip(student, teacher, strict=True):
            p, q = (_decimal_softmax(row, centers, power) for row in (of_teacher, of_student))
            total += sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
            slopes = [power * (b - a) / len(student) for a, b in zip(p, q, strict=True)]
            gradient.append(
                [sum(s * w[d] for s, w in zip(slopes, centers, strict=True)) for d in range(len(of_student))]
            )
        return float(total / len(student)), torch.tensor([[float(value) for value in row] for row in gradient]).double()


def _decimal_softmax(row: list[Decimal], centers: list[list[Decimal]], power: Decimal) -> list[Decimal]:
    shares = [(power * sum(a * b for a, b in zip(row, center, strict=True))).exp() for center in centers]
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("scale", [16.0, 64.0])
def test_a_cross_entropy_of_almost_nothing_keeps_its_digits(scale):
    """Rows that lie on their centers, all others far away: at sigma 64 the loss is of the order of 1e-27."""
    centers = torch.eye(6, dtype=torch.float64) - 1 / 6
    centers = F.normalize(centers, dim=1).float()
    case = Case(centers[:4].clone(), centers, torch.arange(4), centers[:4])
    logits = scale * case.student.double() @ centers.double().T
    own = logits.diagonal()[:, None]
    others = torch.where(torch.eye(4, 6, dtype=torch.bool), 0.0, (logits - own).exp())
    expected = float(torch.log1p(others.sum(dim=1)).mean())
    softmax = others / (1 + others.sum(dim=1, keepdim=True))
    slopes = softmax - torch.eye(4, 6) * softmax.sum(dim=1, keepdim=True)
    for trained in (False, True):
        copy = case.copied(trained=trained)
        cls, _ = fused(copy, scale=scale, block_centers=4)
        assert float(cls.detach()) == pytest.approx(expected, rel=float32_bound(scale, 1.0), abs=0)
        gradient = gradients(cls, copy)[0]
        assert error(gradient, scale / 4 * slopes @ centers.double()) < 2 * float32_bound(scale, 1.0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("weights", [(2.0, 0.3), (1.0, None), (None, 1.0), (0.0, 3.0)])
def test_each_loss_hands_on_the_gradient_it_is_given(weights, trained):
    case, how = a_case(5, 23), {"scale": 16.0, "temperature": 2.0}
    truth, copy = case.copied(trained=trained), case.copied(trained=trained)
    found, expected = (
        sum(
            (weight * loss for weight, loss in zip(weights, losses, strict=True) if weight is not None), torch.zeros(())
        )
        for losses in (fused(copy, **how, block_centers=5), dense(truth, **how))
    )
    for part, exact in zip(gradients(found, copy), gradients(expected, truth), strict=True):
        assert error(part, exact) < 1e-12


@pytest.mark.parametrize("trained", [False, True])
def test_without_a_teacher_there_is_the_cross_entropy_alone(trained):
    case = a_case(5, 23)
    truth, copy = case.copied(trained=trained), case.copied(trained=trained)
    found = cluster_losses(copy.student, copy.centers, copy.labels, scale=16.0, temperature=3.0, block_centers=5)
    expected, _ = dense(truth, scale=16.0)
    assert found.kl is None
    assert error(found.cls.detach(), expected.detach()) < 1e-12
    for part, exact in zip(gradients(found.cls, copy), gradients(expected, truth), strict=True):
        assert error(part, exact) < 1e-12


def test_only_the_centers_may_move():
    case = a_case(5, 23)
    truth, centers = case.copied(trained=True), case.centers.clone().requires_grad_()
    found = fused(case._replace(centers=centers), scale=16.0)
    for loss, expected in zip(found, dense(truth, scale=16.0), strict=True):
        (gradient,) = torch.autograd.grad(loss, [centers], retain_graph=True)
        assert error(gradient, gradients(expected, truth)[1]) < 1e-12


def test_the_public_function_gives_the_two_losses():
    case = a_case(5, 23).to(torch.float32)
    cls, kl = fused_cluster_loss(case.student, case.teacher, case.centers, case.labels, scale=16.0, temperature=2.0)
    expected = dense(case, scale=16.0, temperature=2.0)
    assert (cls.shape, kl.shape) == ((), ())
    assert [error(found, right) < 1e-5 for found, right in zip((cls, kl), expected, strict=True)] == [True, True]


def test_no_gradient_reaches_the_teacher():
    case = a_case(5, 23).copied(trained=True)
    teacher = case.teacher.clone().requires_grad_()
    sum(fused(case._replace(teacher=teacher), scale=16.0)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert teacher.grad is None
    assert case.student.grad is not None


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_derivative_is_refused_rather_than_wrong(trained):
    case = a_case(5, 23).copied(trained=trained)
    for loss in fused(case, scale=16.0):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, case.student, create_graph=True)


@pytest.mark.parametrize("trained", [False, True])
def test_without_gradients_none_are_computed(trained, monkeypatch):
    case = a_case(5, 23).copied(trained=trained)
    expected = [float(loss.detach()) for loss in fused(case, scale=16.0)]
    monkeypatch.setattr(center_pass.CenterPass, "gradients", lambda _: pytest.fail("gradients under no_grad"))
    with torch.no_grad():
        found = fused(case, scale=16.0)
    assert [float(loss) for loss in found] == pytest.approx(expected, rel=1e-14)
    assert not any(loss.requires_grad for loss in found)


# Precision


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rows_give_the_float32_losses_of_the_same_numbers(dtype, autocast, trained):
    rounded = a_case(5, 23).to(dtype)
    plain, half = rounded.to(torch.float32).copied(trained=trained), rounded.copied(trained=trained)
    expected = fused(plain, scale=16.0, temperature=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = fused(half, scale=16.0, temperature=2.0)
    for loss, right in zip(found, expected, strict=True):
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == float(right.detach())
        for part, exact in zip(gradients(loss, half), gradients(right, plain), strict=True):
            assert torch.equal(part, exact.to(dtype).double())


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_does_not_change_anything(trained):
    plain, under = (a_case(5, 23).to(torch.float32).copied(trained=trained) for _ in range(2))
    expected = fused(plain, scale=16.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(under, scale=16.0)
        soft = soft_centers(under.teacher, under.centers.detach(), scale=16.0)
    for loss, right in zip(found, expected, strict=True):
        assert torch.equal(loss, right)
        assert all(map(torch.equal, gradients(loss, under), gradients(right, plain)))
    assert torch.equal(soft.mean, soft_centers(plain.teacher, plain.centers.detach(), scale=16.0).mean)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_pass_within_autocast_gives_the_same_gradients(trained, dtype):
    """PyTorch advises against it, and many do it; the second pass of centers that move multiplies in it."""
    plain, under = (a_case(5, 23).to(torch.float32).copied(trained=trained) for _ in range(2))
    expected = gradients(torch.stack(fused(plain, scale=16.0)).sum(), plain)
    with torch.autocast("cpu", dtype=dtype):
        found = gradients(torch.stack(fused(under, scale=16.0)).sum(), under)
    assert all(map(torch.equal, found, expected))


# Laws

SEEDS = st.integers(0, 10_000)
SCALES = st.floats(0.1, 64)
TEMPERATURES = st.floats(0.5, 4)


@given(SEEDS, st.integers(1, 9), st.integers(1, 40), st.integers(1, 50), SCALES, TEMPERATURES, st.booleans())
def test_the_size_of_the_blocks_does_not_matter(seed, rows, columns, block, scale, temperature, trained):
    case, how = a_case(rows, columns, seed=seed), {"scale": scale, "temperature": temperature}
    whole, parts = case.copied(trained=trained), case.copied(trained=trained)
    for one, other in zip(fused(whole, **how, block_centers=64), fused(parts, **how, block_centers=block), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
        for part, same in zip(gradients(one, whole), gradients(other, parts), strict=True):
            torch.testing.assert_close(part, same, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@given(SEEDS, st.permutations(range(17)), SCALES, TEMPERATURES, st.booleans())
def test_the_order_of_the_centers_does_not_matter(seed, order, scale, temperature, trained):
    case, how = a_case(5, 17, seed=seed), {"scale": scale, "temperature": temperature, "block_centers": 4}
    index = torch.tensor(order)
    moved = case._replace(centers=case.centers[index], labels=index.argsort()[case.labels])
    one, other = case.copied(trained=trained), moved.copied(trained=trained)
    for loss, same in zip(fused(one, **how), fused(other, **how), strict=True):
        torch.testing.assert_close(loss, same, rtol=1e-9, atol=1e-13)
        first, second = gradients(loss, one), gradients(same, other)
        torch.testing.assert_close(first[0], second[0], rtol=1e-9, atol=1e-12)
        if trained:
            torch.testing.assert_close(first[1][index], second[1], rtol=1e-9, atol=1e-12)


@given(SEEDS, st.integers(1, 40), st.floats(0.1, 300), TEMPERATURES, st.booleans())
def test_the_divergence_of_a_copy_is_exactly_0_and_so_is_its_gradient(seed, columns, scale, temperature, trained):
    case = a_case(4, columns, seed=seed).to(torch.float32)
    copy = case._replace(student=case.teacher).copied(trained=trained)
    _, kl = fused(copy, scale=scale, temperature=temperature, block_centers=7)
    assert float(kl.detach()) == 0
    assert not any(part.any() for part in gradients(kl, copy))


@pytest.mark.slow
@given(SEEDS, st.integers(1, 40), st.floats(0.01, 300), st.floats(0.1, 10), st.floats(0, 1))
def test_neither_loss_is_ever_negative_nor_a_gradient_infinite(seed, columns, scale, temperature, nearness):
    case = a_case(4, columns, seed=seed, nearness=nearness, dim=3).to(torch.float32)
    for trained in (False, True):
        copy = case.copied(trained=trained)
        for loss in fused(copy, scale=scale, temperature=temperature, block_centers=7):
            assert 0 <= float(loss.detach()) < math.inf
            assert all(part.isfinite().all() for part in gradients(loss, copy))


@pytest.mark.slow
@given(SEEDS, st.integers(2, 12), st.floats(64, 600), st.floats(0, 1), st.booleans())
@settings(max_examples=200)
def test_the_losses_are_the_dense_ones_however_sharp_the_distributions_are(seed, columns, scale, nearness, trained):
    case = a_case(3, columns, nearness=nearness, dim=3, seed=seed)
    truth, copy = case.copied(trained=trained), case.copied(trained=trained)
    found, expected = fused(copy, scale=scale, block_centers=5), dense(truth, scale=scale)
    for loss, right in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, right, rtol=1e-8, atol=1e-12)
        for part, exact in zip(gradients(loss, copy), gradients(right, truth), strict=True):
            torch.testing.assert_close(part, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale", [100.0, 200.0, 300.0, 1000.0])
def test_a_center_that_the_student_alone_sees_counts_however_sharp_the_teacher_is(scale, trained):
    """Both see the first center alike, the student the second one as well: half of its softmax is not the teacher's."""
    student = torch.tensor([[0.5, 0.5, math.sqrt(0.5)]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, -0.8, math.sqrt(0.11)]], dtype=torch.float64)
    case = Case(student, torch.eye(3, dtype=torch.float64)[:2], torch.tensor([0]), teacher).copied(trained=trained)
    _, kl = fused(case, scale=scale)
    assert float(kl.detach()) == pytest.approx(math.log(2))
    torch.testing.assert_close(gradients(kl, case)[0], scale * torch.tensor([[-0.5, 0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions_that_share_nothing_stay_finite(dtype, trained):
    """Student on the first center, teacher on the opposite one, sigma 300: a divergence of 300, or 600 where they oppose."""
    centers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=dtype)
    for at, expected in ((1, 300.0), (2, 600.0)):
        case = Case(centers[:1], centers, torch.tensor([at]), centers[at : at + 1]).copied(trained=trained)
        cls, kl = fused(case, scale=300.0, block_centers=2)
        torch.testing.assert_close(kl.detach(), torch.tensor(expected, dtype=dtype))
        torch.testing.assert_close(cls.detach(), torch.tensor(expected, dtype=dtype))
        for loss in (cls, kl):
            exact = 300 * (centers[0] - centers[at])[None].double()
            torch.testing.assert_close(gradients(loss, case)[0], exact)
            assert all(part.isfinite().all() for part in gradients(loss, case))


@pytest.mark.parametrize("trained", [False, True])
def test_one_center_leaves_nothing_to_learn(trained):
    case = a_case(64, 1).to(torch.float32).copied(trained=trained)
    for loss in fused(case, scale=16.0):
        assert float(loss.detach()) == 0
        assert max(float(part.norm()) for part in gradients(loss, case)) < 1e-6


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_row_that_is_no_number_gives_no_number(of, trained):
    case = a_case(5, 23).to(torch.float32)
    broken = getattr(case, of).clone()
    broken[2] = math.nan
    copy = case._replace(**{of: broken}).copied(trained=trained)
    cls, kl = fused(copy, scale=16.0)
    assert math.isnan(kl.item())
    assert math.isnan(cls.item()) == (of == "student")
    rows = gradients(kl, copy)[0].isnan().any(dim=1)
    assert rows.tolist() == [False, False, True, False, False]


# The own center


def test_the_share_of_rows_that_are_nearest_to_their_own_center():
    """The first row is, the second is not; the third is as near to another one, and nothing is nearer."""
    half = math.sqrt(0.5)
    student = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [half, half, 0.0], [0.0, 0.6, 0.8]])
    for block in (1, 2, 3):
        found = cluster_losses(student, torch.eye(3), torch.tensor([0, 1, 1, 2]), scale=16.0, block_centers=block)
        assert float(found.own_center) == 0.75
        assert not found.own_center.requires_grad


def test_a_center_that_is_there_twice_is_no_nearer_than_itself():
    case = a_case(64, 20).to(torch.float32)
    labels = (case.student @ case.centers.T).argmax(dim=1)
    found = cluster_losses(case.student, torch.cat([case.centers, case.centers]), labels, scale=16.0)
    assert float(found.own_center) == 1


def test_the_correction_does_not_say_which_center_is_nearest():
    case = a_case(64, 20)
    labels = (case.student @ case.centers.T).argmax(dim=1)
    inclusion = torch.linspace(-6, 0, 20, dtype=torch.float64)
    found = cluster_losses(case.student, case.centers, labels, scale=4.0, log_inclusion=inclusion, logq="both")
    assert float(found.own_center) == 1


# Soft centers


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (16.0, 1.0), (16.0, 4.0), (64.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_centers_are_mean_and_entropy_of_the_teachers_softmax(scale, temperature, dtype, monkeypatch):
    monkeypatch.setattr("clip_cid.method.distill.fused_cluster_loss.suitable_block", lambda rows: 7)
    case = a_case(5, 23).to(dtype)
    found = soft_centers(case.teacher, case.centers, scale=scale, temperature=temperature)
    log_p = F.log_softmax(scale / temperature * case.teacher.double() @ case.centers.double().T, dim=1)
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    assert found.mean.dtype == dtype
    torch.testing.assert_close(found.mean.double(), log_p.exp() @ case.centers.double(), rtol=0, atol=bound)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=bound * max(1.0, scale / temperature / 32))


@pytest.mark.parametrize("nearness", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
def test_soft_centers_say_what_the_teachers_rows_say(scale, temperature, nearness):
    """To some 1e-6 nats: here a divergence is a difference of logarithms."""
    case = a_case(5, 300, nearness=nearness).to(torch.float32).copied(trained=False)
    how = {"scale": scale, "temperature": temperature}
    soft = soft_centers(case.teacher, case.centers, **how)
    expected = fused(case, **how)
    found = cluster_losses(case.student, case.centers, case.labels, teacher=soft, **how, block_centers=64)
    assert found.kl is not None
    torch.testing.assert_close(found.cls, expected[0])
    torch.testing.assert_close(found.kl, expected[1], rtol=0, atol=1e-5)
    for loss, right in zip((found.cls, found.kl), expected, strict=True):
        torch.testing.assert_close(gradients(loss, case)[0], gradients(right, case)[0], rtol=1e-4, atol=1e-6 * scale)


def test_soft_centers_are_refused_where_centers_move_or_are_a_sample():
    case = a_case(5, 23)
    soft = soft_centers(case.teacher, case.centers, scale=16.0)
    with pytest.raises(ValueError, match="not soft centers, where centers move or are a sample"):
        cluster_losses(case.student, case.centers.requires_grad_(), case.labels, teacher=soft, scale=16.0)
    with pytest.raises(ValueError, match="not soft centers, where centers move or are a sample"):
        cluster_losses(
            case.student,
            case.centers.detach(),
            case.labels,
            teacher=soft,
            scale=16.0,
            log_inclusion=torch.zeros(23, dtype=torch.float64),
        )


# What is refused


@pytest.fixture
def _unchecked():
    """As in a user's program: shapes are not compared before the function sees them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", ["scale", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_or_temperature_out_of_its_limits_is_refused(name, value):
    case, how = a_case(2, 4), {"scale": 16.0, "temperature": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {value}"):
        fused(case, **how)
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {value}"):
        soft_centers(case.teacher, case.centers, **how)


@pytest.mark.parametrize(("labels", "got"), [([0, 4], "2 of 0 to 4"), ([-1, 2], "2 of -1 to 2")])
def test_labels_that_are_no_centers_are_refused(labels, got):
    with pytest.raises(ValueError, match=f"labels must be 2 centers of 0 to 3, got {got}"):
        fused(a_case(2, 4)._replace(labels=torch.tensor(labels)), scale=16.0)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"labels": torch.tensor([0, 1, 2])}, "labels must be 2 centers of 0 to 3, got 3 of 0 to 2"),
        ({"centers": unit_rows(4, 7, 0)}, "centers must have the width 24 of student, got 7"),
        ({"teacher": unit_rows(3, 24, 0)}, r"teacher must have the shape \(2, 24\) of student, got \(3, 24\)"),
        ({"centers": torch.zeros(0, 24)}, "there must be rows and centers, got 2 and 0"),
        ({"student": torch.zeros(0, 24)}, "there must be rows and centers, got 0 and 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_shapes_that_do_not_fit_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        fused(a_case(2, 4)._replace(**changed), scale=16.0)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("length", [1, 3, 5])
def test_an_inclusion_that_is_not_one_of_each_center_is_refused(length):
    with pytest.raises(ValueError, match=f"log_inclusion must be of the 4 centers, got {length}"):
        fused(a_case(2, 4), scale=16.0, log_inclusion=torch.zeros(length, dtype=torch.float64))


@pytest.mark.usefixtures("_unchecked")
def test_soft_centers_of_another_batch_are_refused():
    case = a_case(2, 4)
    soft = SoftCenters(torch.zeros(3, 24), torch.zeros(3, dtype=torch.float64), 16.0)
    with pytest.raises(ValueError, match=r"teacher must have the shape \(2, 24\) of student, got \(3, 24\)"):
        cluster_losses(case.student, case.centers, case.labels, teacher=soft, scale=16.0)


def test_soft_centers_of_another_sharpness_are_refused():
    case = a_case(2, 4).to(torch.float32).copied(trained=False)
    soft = soft_centers(case.teacher, case.centers, scale=16.0, temperature=2.0)
    with pytest.raises(ValueError, match="teacher must be soft centers of scale / temperature 16, got 8"):
        cluster_losses(case.student, case.centers, case.labels, teacher=soft, scale=16.0)
    cluster_losses(case.student, case.centers, case.labels, teacher=soft, scale=24.0, temperature=3.0)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logq": "KL"}, "logq must be one of none, kl, both, got 'KL'"),
        ({"block_centers": -3}, "block_centers must be at least 1, got -3"),
        ({"block_centers": 0}, "block_centers must be at least 1, got 0"),
    ],
)
def test_ways_that_do_not_exist_are_refused(changed, words):
    case = a_case(2, 4)
    with pytest.raises(ValueError, match=words):
        cluster_losses(case.student, case.centers, case.labels, teacher=case.teacher, scale=16.0, **changed)


def test_a_label_that_no_rank_or_two_ranks_hold_is_refused(tmp_path):
    case = a_case(2, 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="labels must name a center on exactly one rank, but row 1 has one on 0"):
            cluster_losses(
                case.student,
                case.centers,
                torch.tensor([0, -1]),
                teacher=case.teacher,
                scale=16.0,
                group=torch.distributed.group.WORLD,
            )
    finally:
        torch.distributed.destroy_process_group()


# Memory


def peak_memory() -> float:
    """Of this process since it was last reset, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def growth_of_the_peak(kind: str) -> float:
    """How much more memory all centers take than three blocks of them, in MB."""

    def once(centers: torch.Tensor) -> None:
        student = F.normalize(torch.randn(512, 32), dim=1).requires_grad_()
        teacher = F.normalize(torch.randn(512, 32), dim=1)
        with torch.no_grad():
            target = soft_centers(teacher, centers, scale=16.0) if kind == "soft" else teacher
        weights = centers.detach().requires_grad_(kind == "trained")
        losses = cluster_losses(student, weights, torch.randint(len(centers), (512,)), teacher=target, scale=16.0)
        assert losses.kl is not None
        (losses.cls + losses.kl).backward()

    torch.set_num_threads(2)
    centers = F.normalize(torch.randn(120_000, 32), dim=1)
    once(centers[:10_000])  # what the libraries take at first is there from now on
    peaks = []
    for some in (centers[:10_000], centers):
        Path("/proc/self/clear_refs").write_text("5")
        once(some)
        peaks.append(peak_memory())
    return peaks[1] - peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("kind", ["frozen", "trained", "soft"])
def test_memory_does_not_grow_with_the_number_of_centers(kind):
    """One matrix of logits takes 234 MB here; beyond what three blocks take there are only the gradients of centers, 15 MB."""
    try:
        growth = processes.result(growth_of_the_peak, kind)
    except PermissionError:
        pytest.skip("this system does not let a process reset its peak memory")
    assert growth < 234 / 4
