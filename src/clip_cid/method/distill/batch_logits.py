"""The logits of a batch that is spread over ranks: what the rows of this rank say about all rows."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clip_cid.method.distill.sides import Side
from clip_cid.method.products import at_least_float32, autocast_off


def batch_logits(queries: Side, keys: Side, scale: Float[Tensor, ""]) -> Float[Tensor, "rows batch"]:
    """Cosines of this rank's queries with all keys, times the scale; in float32 at least, whatever the autocast precision.

    Raises:
        ValueError: The sides are not of the same rows of a batch.
    """
    check_same_rows(queries, keys)
    with autocast_off(queries.own):
        return at_least_float32(scale) * (at_least_float32(queries.own) @ at_least_float32(keys.all).T)


def own_columns(side: Side) -> Int[Tensor, " rows"]:
    """Where in the columns of `batch_logits` each row meets its own pair."""
    return torch.arange(side.first, side.first + len(side.own), device=side.own.device)


def check_same_rows(*sides: Side) -> None:
    """Row i must be of one pair in all of them; shapes alone would not show it.

    Raises:
        ValueError: They are not.
    """
    rows = [(side.first, len(side.own), len(side.all)) for side in sides]
    first, own, batch = rows[0]
    if rows.count(rows[0]) != len(rows) or not 0 <= first <= batch - own:
        raise ValueError(f"sides must be of the same rows of a batch, got (first, rows, batch) {rows}")


def detached(side: Side) -> Side:
    """A side that gradients do not reach: the teacher's."""
    return replace(side, own=side.own.detach(), all=side.all.detach())
