"""The model over several ranks: whole on each, with gradients that are the mean over the ranks (DDP)."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_cid.errors import ConfigError
from clip_cid.training.model import Distillation
from clip_cid.training.ranks.distributed import Ranks

_HEAD_PREFIX, _TEXT_HEAD_PREFIX = "objective.head.", "objective.text_head."
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def join_model(model: Distillation, ranks: Ranks) -> nn.Module:
    """The model wrapped for all ranks (DDP); with one rank the model itself.

    The cluster heads are left to each rank: one is frozen, or each rank has its own centers.
    """
    if ranks.size == 1:
        return model
    named = [*model.named_parameters(), *model.named_buffers()]  # also buffers that are not saved
    ignored = [name for name, _ in named if name.startswith((_HEAD_PREFIX, _TEXT_HEAD_PREFIX))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def with_joint_statistics(student: nn.Module, ranks: Ranks, micro_batch: int | None) -> nn.Module:
    """A student whose batch normalization (if trained) uses the batch of all ranks.

    Raises:
        ConfigError: The batch is in micro-batches, or the ranks are not on CUDA; both make this impossible.
    """
    normalizes = any(isinstance(part, _BATCH_NORM) and part.training for part in student.modules())
    if not normalizes:
        return student

    if micro_batch is not None:
        raise ConfigError(
            "machine.micro_batch: this student normalizes over the batch, and would normalize over each micro-batch.",
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
    """The buffers in which batch normalizations count the batches so far."""
    return [value for part in student.modules() if isinstance(part, _BATCH_NORM) for value in part.buffers()]


def with_spread(model: Distillation) -> list[tuple[nn.Parameter, bool]]:
    """Each parameter, and whether ranks hold different rows of it, as of a cluster head spread over ranks."""
    head_is_spread = model.objective.head is not None and model.objective.head.shard is not None
    return [
        (parameter, head_is_spread and name.startswith(_HEAD_PREFIX)) for name, parameter in model.named_parameters()
    ]
