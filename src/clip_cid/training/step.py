"""One step: the losses of a batch by name, the gradient of their weighted sum, and the optimizers' update."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clip_cid import log
from clip_cid.errors import ConfigError
from clip_cid.method.distill.arithmetic import LossKernels, why_no_triton
from clip_cid.method.distill.gradient_weights import weights_by_gradients
from clip_cid.method.distill.objective import weighted_sum
from clip_cid.recipe import DistillConfig, MachineConfig, Precision, settled
from clip_cid.training.batches import Batch
from clip_cid.training.ema import EMA
from clip_cid.training.gradient_norms import GradientNorms
from clip_cid.training.model import Distillation, Outputs, backward_in_micro_batches, step_seed
from clip_cid.training.optimizer import (
    clip_gradients,
    learning_rate_share,
    make_optimizers,
    scheduled,
    set_learning_rate,
)
from clip_cid.training.ranks.distributed import Ranks
from clip_cid.training.ranks.parallel import join_model, running_statistics, with_spread


@dataclasses.dataclass(frozen=True)
class Measured:
    """One step in plain numbers, of the whole batch."""

    loss: float
    parts: dict[str, float]
    lr: float
    grad_norm: float
    """Norm of the whole gradient before it is clipped."""
    part_norms: dict[str, float]
    """Norm of the gradient of each weighted loss in the embeddings; of the steps that are recorded."""
    weights: dict[str, float]
    """The weights of the losses, where they follow the gradients."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def sick_part(self) -> str:
        """The part of the step that is not finite: its loss, or its gradient alone."""
        return "gradient" if math.isfinite(self.loss) else "loss"


class Learner:
    """Everything that a step updates: the model, its optimizers, the scaler of float16, the EMA and the gradient norms.

    Args:
        model: What learns.
        settings: Of the training.
        steps: Of the whole run.
        ranks: Who train together.
        machine: Whether to compile, how many pairs the student takes at once, and what computes the losses.

    Raises:
        ConfigError: Triton kernels were asked for by name and cannot be used.
    """

    def __init__(
        self, model: Distillation, settings: DistillConfig, *, steps: int, ranks: Ranks, machine: MachineConfig
    ) -> None:
        refuse_absent_kernels(machine.loss_kernels, ranks.device)
        model.objective.kernels = machine.loss_kernels
        self.model = model.to(ranks.device)
        self.settings, self.steps, self.ranks, self.micro_batch = settings, steps, ranks, machine.micro_batch
        self.precision = resolve_precision(settings.precision, ranks.device)
        self.statistics = running_statistics(model.student)

        if machine.compile:
            model.compile()
        self.joint = join_model(model, ranks)

        self.optimizers = make_optimizers(model.student, model.objective, settings, steps=steps)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == torch.float16)
        self.ema = EMA(model.student, decay=settings.ema_decay) if settings.ema_decay else None
        every = settings.weigh_gradients_every
        self.gradient_norms = GradientNorms(every) if every is not None else None

    def compute_gradient(self, batch: Batch, step: int, *, with_part_norms: bool) -> Measured:
        """Leave the clipped gradient of the step's weighted loss in the parameters; returns the step in numbers.

        A batch with a loss or gradient that is not finite leaves no trace in the statistics of batch normalizations, nor
        in the norms of the gradients.
        """
        lr_share = learning_rate_share(step, warmup_steps=settled(self.settings.warmup_steps), steps=self.steps)
        set_learning_rate(self.optimizers, lr_share)
        for optimizer in self.optimizers:
            optimizer.zero_grad()

        # Student, losses by name, one sum, backward.
        weights, statistics = self._weights(step), [value.clone() for value in self.statistics]
        norms_before = self.gradient_norms.mean if self.gradient_norms is not None else {}
        parts: dict[str, Tensor] = {}
        part_norms: dict[str, float] = {}

        def loss_of(outputs: Outputs) -> Tensor:
            parts.update(self._losses(outputs, batch, step))
            if self.gradient_norms is not None:
                part_norms.update(self._weigh(parts, outputs, weights, step, with_part_norms=with_part_norms))
            elif with_part_norms:
                part_norms.update(self._part_norms(parts, outputs, weights))
            return self.scaler.scale(weighted_sum(parts, weights))

        backward_in_micro_batches(
            self.joint,
            batch,
            loss_of,
            micro_batch=self.micro_batch,
            precision=self.precision,
            seed=step_seed(self.settings.seed, step, self.ranks.rank),
        )
        grad_norm = self._clip_gradients()

        # The same numbers on every rank, so that all decide alike. Here the host waits for the step's work, once.
        found = [part.detach().float().to(grad_norm.dtype) for part in parts.values()]
        *own, length = torch.stack([*found, grad_norm]).tolist()
        numbers = self.ranks.mean(dict(zip(parts, own, strict=True)))
        loss = sum(weights[name] * value for name, value in numbers.items())
        followed = {name: weights[name] for name in numbers} if self.gradient_norms is not None else {}
        measured = Measured(loss, numbers, lr_share * self.settings.lr, length, part_norms, followed)
        if not measured.is_finite:
            if self.gradient_norms is not None:
                self.gradient_norms.mean = norms_before
            for value, before in zip(self.statistics, statistics, strict=True):
                value.copy_(before)
        return measured

    def update(self) -> None:
        """Update all trained parameters by the gradient."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.model.clamp_scales()
        if self.ema is not None:
            self.ema.update()

    def is_overflow(self, measured: Measured) -> bool:
        """Whether a step is not finite only because float16 scaled it too far, which is normal at times."""
        return math.isfinite(measured.loss) and self.scaler.get_scale() > 1

    def rescale(self, *, finite: bool) -> None:
        """As `GradScaler.update`, which knows of overflow only in optimizers that were stepped."""
        if not self.scaler.is_enabled():
            return
        if finite:
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
            # a scale that is given leaves the count of finite steps as it was
            self.scaler.load_state_dict({**self.scaler.state_dict(), "_growth_tracker": 0})

    def _losses(self, outputs: Outputs, batch: Batch, step: int) -> dict[str, Tensor]:
        generator = torch.Generator(self.ranks.device).manual_seed(step_seed(self.settings.seed, step))
        return self.model.objective(outputs, batch.targets, gather=self.ranks.gather, generator=generator)

    def _weights(self, step: int) -> dict[str, float]:
        """The weights of this step."""
        weights, share = self.settings.weights.model_dump(), step / self.steps
        return {
            name: weight * scheduled(self.settings.schedule.get(name, ()), share) for name, weight in weights.items()
        }

    def _weigh(
        self,
        parts: Mapping[str, Tensor],
        outputs: Outputs,
        weights: dict[str, float],
        step: int,
        *,
        with_part_norms: bool,
    ) -> dict[str, float]:
        """Let the weights of this step follow the gradients; returns the weighted norms, if they are asked for."""
        assert self.gradient_norms is not None
        norms: dict[str, float] = {}
        due = self.gradient_norms.is_due(step)
        if due or with_part_norms:
            norms = self._part_norms(parts, outputs, dict.fromkeys(parts, 1.0))
        if due:
            self.gradient_norms.add(norms)

        weights.update(weights_by_gradients(weights, self.gradient_norms.mean))
        return {name: weights[name] * norm for name, norm in norms.items()} if with_part_norms else {}

    def _part_norms(
        self, parts: Mapping[str, Tensor], outputs: Outputs, weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Gradient norm of each weighted loss in the embeddings (the student's and those in the teacher's space)."""
        rows = [value for value in outputs.values() if value.ndim]
        squares: list[Tensor] = []
        for name, part in parts.items():
            gradients = torch.autograd.grad(weights[name] * part, rows, retain_graph=True, allow_unused=True)
            squares.append(
                torch.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum()
            )
        norms = self.ranks.sum(torch.stack(squares)).sqrt() / self.ranks.size
        return dict(zip(parts, norms.tolist(), strict=True))

    def _clip_gradients(self) -> Tensor:
        """Clip the gradient to `grad_clip_norm`; returns its norm before."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        max_norm = self.settings.grad_clip_norm
        return clip_gradients(with_spread(self.model), math.inf if max_norm is None else max_norm, self.ranks)


def refuse_absent_kernels(kernels: LossKernels, device: torch.device) -> None:
    """Refuse kernels that were asked for by name, before anything is computed; say so if auto cannot take them on CUDA.

    Raises:
        ConfigError: They cannot be used here.
    """
    reason = None if kernels == "torch" else why_no_triton(device)
    if reason is None:
        return
    if kernels == "triton":
        raise ConfigError(
            f"machine.loss_kernels: triton, but {reason}.",
            fix="Set machine.loss_kernels: auto, which takes Triton only where it can be used.",
        )
    if device.type == "cuda":
        log.info(f"distill   PyTorch computes the losses, not Triton: {reason}")


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the student; `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
