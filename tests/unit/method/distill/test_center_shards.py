"""Centers spread over real processes: losses and gradients are those of one process that holds them all.

One start of the processes for each number of ranks runs all cases; the tests read what the ranks have written.
"""

import datetime
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracles
import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clip_cid.method.distill.cluster_distillation import CenterHead, Shard, sample_centers
from clip_cid.method.distill.fused_cluster_loss import cluster_losses, soft_centers
from clip_cid.training.optimizer import RowAdam
from clip_cid.training.ranks.head_shards import load_rows, save_shard

WORLDS = (2, 4)
ROWS, DIM = 12, 16  # rows of the whole batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package"),
]


@dataclass(frozen=True)
class Spread:
    """A call of `cluster_losses` over spread centers."""

    num_centers: int = 40
    dtype: torch.dtype = torch.float64
    trained: bool = False
    teacher: str = "rows"
    temperature: float = 1.0
    logq: str | None = None
    scale: float = 16.0
    nearness: float = 0.0
    empty_rank: int | None = None
    own_here: int = 10**6
    """Labels are below this: with few, most ranks have no center of the batch."""
    labels: int = 1
    """A row has so many."""
    ignore_near: float | None = None
    opposed: bool = False
    """The first center is far for the teacher and near for the student: only the rank that has it sees such a gap."""

    def bounds(self, rank: int, world: int) -> tuple[int, int]:
        if self.empty_rank is None:
            return Shard.bounds(self.num_centers, rank, world)
        others = [other for other in range(world) if other != self.empty_rank]
        ends = {other: Shard.bounds(self.num_centers, at, world - 1) for at, other in enumerate(others)}
        before = self.num_centers if self.empty_rank == world - 1 else ends[others[self.empty_rank]][0]
        return ends.get(rank, (before, before))

    def inputs(self) -> dict[str, Any]:
        """The whole batch and all centers, the same wherever this is called."""
        centers, teacher = unit_rows(self.num_centers, 0), unit_rows(ROWS, 1)
        student = F.normalize(self.nearness * teacher + (1 - self.nearness) * unit_rows(ROWS, 2), dim=1)
        labels = torch.randint(min(self.num_centers, self.own_here), (ROWS,), generator=seeded(3))
        if self.labels > 1:
            labels = (labels[:, None] + 5 * torch.arange(self.labels)) % self.num_centers
        if self.opposed:
            centers = torch.eye(self.num_centers, DIM, dtype=torch.float64)
            student = (0.5 * centers[0] + 0.5 * centers[-1]).repeat(ROWS, 1)
            teacher = (-0.8 * centers[0] + 0.5 * centers[-1]).repeat(ROWS, 1)
        student, centers, teacher = (rows.to(self.dtype) for rows in (student, centers, teacher))
        target: Any = None if self.teacher == "none" else teacher
        if self.teacher == "soft":
            target = soft_centers(teacher, centers, scale=self.scale, temperature=self.temperature)
        inclusion = None if self.logq is None else torch.linspace(-3, 0, self.num_centers, dtype=self.dtype)
        return {"student": student, "centers": centers, "labels": labels, "teacher": target, "inclusion": inclusion}

    def losses(self, group: dist.ProcessGroup | None = None, first: int = 0, stop: int | None = None) -> dict[str, Any]:
        """Of the centers `first` to `stop`, which are this rank's."""
        given = self.inputs()
        student = given["student"].requires_grad_()
        centers = given["centers"][first:stop].clone().requires_grad_(self.trained)
        labels = given["labels"] - first
        labels = torch.where((labels >= 0) & (labels < len(centers)), labels, -1)
        found = cluster_losses(
            student,
            centers,
            labels,
            teacher=given["teacher"],
            scale=self.scale,
            temperature=self.temperature,
            log_inclusion=None if given["inclusion"] is None else given["inclusion"][first:stop],
            logq=self.logq or "kl",  # pyright: ignore[reportArgumentType]
            ignore_near=self.ignore_near,
            group=group,
            block_centers=7,
        )
        parts = {"cls": found.cls} if found.kl is None else {"cls": found.cls, "kl": found.kl}
        wanted = [student, centers] if self.trained else [student]
        return {
            "own_center": found.own_center,
            **{name: loss.detach() for name, loss in parts.items()},
            **{f"gradient of {name}": gradients(loss, wanted) for name, loss in parts.items()},
        }


CASES = {
    **{
        f"{'trained' if trained else 'frozen'}, {str(dtype)[6:]}": Spread(trained=trained, dtype=dtype)
        for trained in (False, True)
        for dtype in (torch.float32, torch.float64)
    },
    "11 centers": Spread(num_centers=11, trained=True),
    "11 centers, frozen": Spread(num_centers=11, dtype=torch.float32),
    "temperature 4": Spread(temperature=4.0),
    "temperature 4, trained": Spread(temperature=4.0, trained=True, dtype=torch.float32),
    "a rank without own centers": Spread(own_here=5, trained=True),
    "a rank without own centers, frozen": Spread(own_here=5),
    "no centers on the first rank": Spread(num_centers=11, empty_rank=0),
    "no centers on the first rank, trained": Spread(num_centers=11, empty_rank=0, trained=True),
    "no centers on the last rank, temperature 4": Spread(num_centers=11, empty_rank=1, temperature=4.0),
    "several labels": Spread(labels=3),
    "several labels, trained, temperature 2": Spread(labels=3, trained=True, temperature=2.0, logq="both"),
    "near centers": Spread(ignore_near=0.3),
    "near centers, trained": Spread(ignore_near=0.3, labels=4, trained=True, dtype=torch.float32),
    "near centers, a rank without centers": Spread(ignore_near=0.3, labels=2, num_centers=11, empty_rank=0),
    "soft": Spread(teacher="soft"),
    "soft, temperature 4": Spread(teacher="soft", temperature=4.0),
    "soft, float32": Spread(teacher="soft", dtype=torch.float32),
    "no teacher": Spread(teacher="none", temperature=2.0, trained=True),
    "logq kl": Spread(logq="kl", temperature=2.0),
    "logq both, trained": Spread(logq="both", trained=True),
    "near the teacher": Spread(nearness=0.99999, dtype=torch.float32),
    "near the teacher, trained": Spread(nearness=0.99999, dtype=torch.float32, trained=True),
    "sigma 300": Spread(scale=300.0),
    "sigma 300, trained": Spread(scale=300.0, trained=True),
    "a rank that needs a second pass": Spread(num_centers=8, scale=150.0, opposed=True),
    "a rank that needs a second pass, trained": Spread(num_centers=8, scale=150.0, opposed=True, trained=True),
}


@dataclass(frozen=True)
class Sampled:
    """A step of a spread head with a sample of the centers."""

    rate: float = 0.5
    trained: bool = True
    sparse: bool = False
    logq: str = "kl"
    temperature: float = 1.0
    num_centers: int = 43
    own_here: int = 43
    """Labels are below this."""


HEADS = {
    "sampled": Sampled(),
    "sampled, frozen": Sampled(trained=False),
    "sampled, sparse": Sampled(sparse=True),
    "sampled, logq both": Sampled(logq="both", temperature=2.0),
    "sampled, no correction": Sampled(logq="none"),
    "own centers alone": Sampled(rate=0.01),
    "own centers alone, of the first rank": Sampled(rate=0.01, own_here=5),
    "own centers alone, of the first rank, sparse": Sampled(rate=0.01, own_here=5, sparse=True),
    "all centers": Sampled(rate=1.0),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=seeded(seed), dtype=torch.float64), dim=1)


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, wanted, retain_graph=True)
    return [part.coalesce().to_dense() if part.is_sparse else part for part in found]


def head_batch(case: Sampled) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(case.own_here, (ROWS,), generator=seeded(7))
    return unit_rows(case.num_centers, 4), unit_rows(ROWS, 5).requires_grad_(), unit_rows(ROWS, 6), labels


# What the ranks do


def one_step_of_a_head(case: Sampled, group: dist.ProcessGroup, rank: int, world: int) -> dict[str, Any]:
    centers, student, teacher, labels = head_batch(case)
    first, stop = Shard.bounds(case.num_centers, rank, world)
    shard = Shard(first=first, total=case.num_centers, group=group)
    head = CenterHead(centers[first:stop], scale=16.0, trainable=case.trained, sparse=case.sparse, shard=shard)
    sample = head.sample(labels, rate=case.rate, generator=seeded(100))
    found = head(student, sample, teacher=teacher, temperature=case.temperature, logq=case.logq)
    wanted = [student, head.weight] if case.trained else [student]
    return {
        "index": sample.index + first,
        "log_inclusion": sample.log_inclusion,
        "num_negatives": sample.num_negatives,
        "num_centers": head.num_centers,
        "cls": found.cls.detach(),
        "kl": found.kl.detach(),
        "gradient of cls": gradients(found.cls, wanted),
        "gradient of kl": gradients(found.kl, wanted),
    }


class OwnSlice(torch.autograd.Function):
    """Rows of all ranks; of their gradient, which is whole on every rank, each takes its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.count = dist.get_rank(group), len(rows)
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, rows, group=group)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count], None


def linear_student() -> tuple[torch.nn.Linear, Tensor]:
    layer = torch.nn.Linear(6, DIM, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(DIM, 6, generator=seeded(8)))
    return layer, torch.randn(ROWS, 6, generator=seeded(9), dtype=torch.float64)


def learn_through_gathered_rows(group: dist.ProcessGroup, rank: int, world: int) -> dict[str, Any]:
    """Each rank embeds its part of the batch; the losses see the whole of it."""
    given, (first, stop) = Spread().inputs(), Shard.bounds(40, rank, world)
    labels = given["labels"] - first
    labels = torch.where((labels >= 0) & (labels < stop - first), labels, -1)
    found = {}
    for name, gather in (("own slice", OwnSlice.apply), ("summed", summing_gather)):
        layer, inputs = linear_student()
        mine = inputs[rank * ROWS // world : (rank + 1) * ROWS // world]
        student = gather(F.normalize(layer(mine), dim=1), group)
        how = {"teacher": given["teacher"], "scale": 16.0, "group": group}
        losses = cluster_losses(student, given["centers"][first:stop], labels, **how)
        assert losses.kl is not None
        (losses.cls + 0.5 * losses.kl).backward()
        found[name] = layer.weight.grad
    return found


def summing_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(rows, group)))


def learn_and_save(group: dist.ProcessGroup, rank: int, world: int, folder: Path) -> dict[str, Any]:
    """One step of the rows that took part, and the shard's file."""
    case = Sampled(sparse=True)
    centers, student, teacher, labels = head_batch(case)
    first, stop = Shard.bounds(case.num_centers, rank, world)
    shard = Shard(first=first, total=case.num_centers, group=group)
    head = CenterHead(centers[first:stop], trainable=True, sparse=True, shard=shard)
    optimizer = RowAdam([head.weight], lr=0.1)
    sample = head.sample(labels, rate=case.rate, generator=seeded(100))
    head(student, sample, teacher=teacher).cls.backward()
    optimizer.step()
    save_shard(folder, head, optimizer.state[head.weight], step=1)
    return {"weight": head.weight.detach(), **optimizer.state[head.weight]}


def rank_work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's name need not resolve to itself
    where = f"file://{folder}/meeting-place"
    patience = datetime.timedelta(seconds=processes.PATIENCE)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=patience)
    try:
        group = dist.group.WORLD
        assert group is not None
        found: dict[str, Any] = {}
        for name, case in CASES.items():
            found[name] = case.losses(group, *case.bounds(rank, world))
        for name, head in HEADS.items():
            found[name] = one_step_of_a_head(head, group, rank, world)
        found["gathered"] = learn_through_gathered_rows(group, rank, world)
        found["saved"] = learn_and_save(group, rank, world, Path(folder) / "head")
        found["folder"] = f"{folder}/head"
        torch.save(found, f"{folder}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


# Laws


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    processes.run_ranks(world, rank_work, world, str(folder))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def assert_same(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= bound * float(expected.double().norm()) + 1e-15


@pytest.mark.parametrize("name", CASES)
def test_spread_centers_give_the_losses_and_gradients_of_one_process(ranks, name):
    case, world = CASES[name], len(ranks)
    expected = case.losses()
    bound = 1e-6 if case.dtype == torch.float32 else 1e-12
    shards = [case.bounds(rank, world) for rank in range(world)]
    assert sum(stop - first for first, stop in shards) == case.num_centers
    for rank, (first, stop) in enumerate(shards):
        found = ranks[rank][name]
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            if part == "own_center":
                assert found[part] == value
            elif isinstance(value, list):
                assert_same(found[part][0], value[0], bound)  # the student's, whole on every rank
            else:
                assert_same(found[part], value, bound)
            assert type(found[part]) is type(value)
        for part in ("gradient of cls", "gradient of kl"):
            if case.trained and part in expected:
                whole = expected[part][1]
                mine, right = found[part][1], whole[first:stop]
                assert float((mine.double() - right).norm()) <= bound * float(whole.norm())
                assert mine.shape == right.shape


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_find_the_very_same(ranks, name):
    for other in ranks[1:]:
        for part, value in ranks[0][name].items():
            first, second = (one[0] if isinstance(one, list) else one for one in (value, other[name][part]))
            assert torch.equal(first, second)


@pytest.mark.parametrize("name", HEADS)
def test_a_sample_spread_over_ranks_gives_the_dense_losses(ranks, name):
    case, world = HEADS[name], len(ranks)
    centers, student, teacher, labels = head_batch(case)
    found = [rank[name] for rank in ranks]
    index = torch.cat([one["index"] for one in found])
    assert (index.diff() > 0).all()
    weight = centers.clone().requires_grad_(case.trained)
    expected = oracles.cluster_losses_dense(
        student,
        F.normalize(weight[index], dim=1),
        torch.searchsorted(index, labels),
        teacher,
        scale=16.0,
        temperature=case.temperature,
        log_inclusion=torch.cat([one["log_inclusion"] for one in found]),
        logq=case.logq,
    )
    assert torch.equal(index[torch.searchsorted(index, labels)], labels)
    for part, loss in zip(("cls", "kl"), expected, strict=True):
        right = gradients(loss, [student, weight] if case.trained else [student])
        for rank, one in enumerate(found):
            first, stop = Shard.bounds(case.num_centers, rank, world)
            # the oracle's log-softmaxes and the inclusions are rounded, in float64 and float32
            torch.testing.assert_close(one[part], loss.detach(), rtol=1e-10, atol=1e-13)
            assert_same(one[f"gradient of {part}"][0], right[0], 1e-10)
            if case.trained:
                mine = one[f"gradient of {part}"][1]
                assert float((mine - right[1][first:stop]).norm()) <= 1e-10 * float(right[1].norm())


@pytest.mark.parametrize("name", HEADS)
def test_together_the_ranks_have_the_sample_that_one_process_would_draw(ranks, name):
    case, world = HEADS[name], len(ranks)
    alone = sample_centers(head_batch(case)[-1], case.num_centers, sample_rate=case.rate, generator=seeded(100))
    for rank, every in enumerate(ranks):
        found, (first, stop) = every[name], Shard.bounds(case.num_centers, rank, world)
        assert found["num_centers"] == case.num_centers
        assert found["num_negatives"] == alone.num_negatives
        assert ((found["index"] >= first) & (found["index"] < stop)).all()
    assert torch.equal(torch.cat([every[name]["index"] for every in ranks]), alone.index)
    inclusions = torch.cat([every[name]["log_inclusion"] for every in ranks])
    assert torch.equal(inclusions, alone.log_inclusion)


def test_gradients_through_gathered_rows_add_up_to_those_of_one_process(ranks):
    """The loss is the same on every rank and its gradient whole there, so each rank takes its own rows of it.

    The parameters' gradients then have to be summed over the ranks. DDP takes their mean, which is too small by the
    number of ranks: the gather's backward has to multiply by it. torch's own differentiable gather does so, since it
    sums the (equal) gradients of all ranks.
    """
    world = len(ranks)
    given, (layer, inputs) = Spread().inputs(), linear_student()
    losses = oracles.cluster_losses_dense(
        F.normalize(layer(inputs), dim=1), given["centers"], given["labels"], given["teacher"], scale=16.0
    )
    (losses[0] + 0.5 * losses[1]).backward()
    assert layer.weight.grad is not None
    by_slice, by_sum = (
        torch.stack([rank["gathered"][name] for rank in ranks]).sum(dim=0) for name in ("own slice", "summed")
    )
    assert_same(by_slice, layer.weight.grad, 1e-12)
    assert_same(by_sum / world, layer.weight.grad, 1e-12)


def test_the_shards_that_the_ranks_write_are_one_head(ranks):
    found = load_rows(Path(ranks[0]["folder"]), 0, Sampled.num_centers)
    assert found.keys() == {"weight", "first", "second", "steps"}
    for name, rows in found.items():
        assert torch.equal(rows, torch.cat([rank["saved"][name] for rank in ranks]))
    untouched = found["steps"] == 0
    torch.testing.assert_close(found["weight"][untouched], head_batch(Sampled())[0][untouched], rtol=1e-14, atol=0)
    assert 0 < int(untouched.sum()) < len(untouched)
