"""The model over several ranks: whole on each (DDP), or spread over them (FSDP)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from clip_cid.errors import ConfigError
from clip_cid.training.model import Distillation
from clip_cid.training.ranks.distributed import Ranks

_HEAD = "objective.head."
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def join_model(model: Distillation, ranks: Ranks, *, fsdp: bool) -> nn.Module:
    """The model as all ranks train it together: gradients are the mean over the ranks.

    The cluster head is left to each rank: it is frozen, or each rank has its own centers.

    Args:
        model: On its device; with FSDP its parameters are replaced, so optimizers are made afterwards.
        ranks: With one alone, the model itself is returned.
        fsdp: Spread weights, gradients and optimizer state over the ranks, block by block.

    Raises:
        ConfigError: FSDP was asked for without several ranks.
    """
    if ranks.size == 1:
        if fsdp:
            raise ConfigError(
                "machine.fsdp: there is one process only, so nothing to spread over.",
                fix="Start with torchrun, or set machine.fsdp: false.",
            )
        return model
    if fsdp:
        return _spread(model, ranks)
    ignored = [name for name, _ in model.named_parameters() if name.startswith(_HEAD)]
    ignored += [name for name, _ in model.named_buffers() if name.startswith(_HEAD)]  # also those that are not saved
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def with_joint_statistics(student: nn.Module, ranks: Ranks, micro_batch: int | None) -> nn.Module:
    """A student whose batch normalization, where it has any that learns, is over the batch of all ranks.

    Raises:
        ConfigError: The batch is in pieces, or the ranks are not on CUDA, where this cannot be had.
    """
    normalizes = any(isinstance(part, _BATCH_NORM) and part.training for part in student.modules())
    if not normalizes:
        return student
    if micro_batch is not None:
        raise ConfigError(
            "machine.micro_batch: this student normalizes over the batch, and would do so over each piece instead.",
            fix="Leave out machine.micro_batch, or take a student without batch normalization (a ViT, a ConvNeXt).",
        )
    if ranks.size == 1:
        return student
    if ranks.device.type != "cuda":
        raise ConfigError(
            "distill.student: it normalizes over the batch, which PyTorch joins over ranks on CUDA only.",
            fix="Train it in one process, or take a student without batch normalization.",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(student)


def running_statistics(student: nn.Module) -> list[Tensor]:
    """What batch normalizations keep of the batches they have seen."""
    return [value for part in student.modules() if isinstance(part, _BATCH_NORM) for value in part.buffers()]


def whole(value: Any) -> Any:
    """Plain tensors, on the CPU, in the place of those that are spread; all ranks call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value


def forget_whole(model: nn.Module) -> None:
    """Drop the whole copies of spread weights that a forward pass has left for the next one: the weights changed."""
    if isinstance(model, FSDPModule):
        model.reshard()


def like(value: Tensor, spread: Tensor) -> Tensor:
    """A plain tensor, spread as another of its shape is; the same one where that is not."""
    if not isinstance(spread, DTensor):
        return value
    return distribute_tensor(value.to(spread.device), spread.device_mesh, spread.placements)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Put plain tensors into the model, by name; returns the names of its state that got none."""
    own = model.state_dict()
    assert state.keys() <= own.keys(), sorted(state.keys() - own.keys())
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(like(value, own[name]))
    return own.keys() - state.keys()


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a plain state into the optimizer; what it keeps of each number of a parameter is spread as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        number: {
            name: like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in kept.items()
        }
        for number, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_spread(name: str, parameter: Tensor, head_is_spread: bool) -> bool:
    """Whether ranks hold different parts of it."""
    return isinstance(parameter, DTensor) or (head_is_spread and name.startswith(_HEAD))


def _spread(model: Distillation, ranks: Ranks) -> Any:
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for block in _blocks(model.student):
        fully_shard(block, mesh=mesh)
    # numbers cannot be spread; `backward_in_pieces` exchanges their gradients
    ignored = {value for name, value in model.named_parameters() if name.startswith(_HEAD) or value.ndim == 0}
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


def _blocks(student: nn.Module) -> Iterable[nn.Module]:
    """The layers of the towers: the parts of every list of modules that learn."""
    found: Iterator[nn.Module] = (
        part
        for layers in student.modules()
        if isinstance(layers, nn.ModuleList | nn.Sequential)
        for part in layers
        if sum(value.numel() for value in part.parameters()) > 0
    )
    inside: set[nn.Module] = set()
    for part in found:  # from the outside in: a block of a block is spread with it
        if part not in inside:
            inside.update(part.modules())
            yield part
