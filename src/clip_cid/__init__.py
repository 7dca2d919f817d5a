"""CLIP-CID: distill a huge CLIP into a small one on your own image-text data.

The public names are loaded when they are first used, so that importing the package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_cid.data.embeddings.store import EmbeddingStore
    from clip_cid.evaluation.linear_probe import ProbeResult, linear_probe
    from clip_cid.method.balance.semantic_balance import Balance, balance
    from clip_cid.method.cluster.clustering import Clusters, spherical_kmeans
    from clip_cid.method.distill.fused_cluster_loss import fused_cluster_loss

    __version__: str

__all__ = [
    "Balance",
    "Clusters",
    "EmbeddingStore",
    "ProbeResult",
    "__version__",
    "balance",
    "fused_cluster_loss",
    "linear_probe",
    "spherical_kmeans",
]

_HOME = {
    "Balance": "clip_cid.method.balance.semantic_balance",
    "Clusters": "clip_cid.method.cluster.clustering",
    "EmbeddingStore": "clip_cid.data.embeddings.store",
    "ProbeResult": "clip_cid.evaluation.linear_probe",
    "balance": "clip_cid.method.balance.semantic_balance",
    "fused_cluster_loss": "clip_cid.method.distill.fused_cluster_loss",
    "linear_probe": "clip_cid.evaluation.linear_probe",
    "spherical_kmeans": "clip_cid.method.cluster.clustering",
}


_EXTRA = {"ProbeResult": "evaluate", "linear_probe": "evaluate"}
"""The optional part that a name needs."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("clip-cid")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _EXTRA:
        importlib.import_module("clip_cid.extras").require(f"clip_cid.{name}", _EXTRA[name])
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
