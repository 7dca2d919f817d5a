"""The settings that change how fast a result is made, and not the result."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import Texts


class MachineConfig(Config):
    """How the work is done. These settings do not change results, so none of them makes a stage stale."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps. auto takes CUDA where there is one."""
    threads: NonNegativeInt = 0
    """CPU threads of the computations. 0 leaves it to the libraries, most of which take one for
    each core."""
    workers: NonNegativeInt = 2
    """Processes that decode images; 0 decodes in the main process."""
    embed_batch: PositiveInt = 256
    """Images in a batch of the models in embed and evaluate."""
    distance_block: PositiveInt = 4096
    """Removed images in a batch that draw compares with the centers."""
    balance_processes: NonNegativeInt = 0
    """Processes that share the tasks of balance and cluster. 0 is one for each core where the work is
    expected to be long (for cluster as far as their memory goes), else one."""
    ray: str | None = None
    """A Ray cluster that does the tasks of embed, balance, cluster and evaluate: HOST:PORT, or auto for
    the one of this host. Every node must see the run folder and the pairs at the same path. When
    absent: processes of this machine. Needs `pip install "clip-cid[ray]"`; docs/scale.md starts a cluster."""
    micro_batch: PositiveInt | None = None
    """Pairs of a step that are in the student at once, for batches that do not fit into memory. The
    gradient is that of the whole batch; a step takes about a third longer."""
    grad_checkpointing: bool = False
    """Compute the student's activations again in the backward pass instead of storing them: less
    memory, and a step takes about a third longer."""
    compile: bool = False
    """torch.compile for the student; worth it for long runs."""
    loss_kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the losses from their logits: operations of PyTorch, or Triton kernels, each one
    pass over memory for a dozen. auto takes Triton on CUDA where it is installed."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Minutes between two checkpoints of the training."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """How many of the last checkpoints are kept; at least 2, in case the newest is damaged."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write the metrics for TensorBoard, into the folder of the training. auto does so where
    the package is installed."""
    callbacks: Texts = ()
    """Python functions `package.module:name` that are called with every line of metrics.jsonl as a
    dict. docs/training.md sends them to Weights & Biases."""
    cache_dir: Path | None = None
    """Where what is read from addresses is kept. When absent: ~/.cache/clip_cid."""
