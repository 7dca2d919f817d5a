"""The ways to measure a model: each has its name here and nowhere else."""

from dataclasses import dataclass

ZERO_SHOT, LINEAR_PROBE, KNN, RETRIEVAL = "zero_shot", "linear_probe", "knn", "retrieval"


@dataclass(frozen=True)
class Protocol:
    """One way to measure. Its name is a setting of `evaluate:`, the `task` of its scores, and the file of its table."""

    name: str
    title: str
    """As a heading."""
    short: str
    """Inside a sentence."""
    mean: str
    """What its mean over sets is called."""
    clip_benchmark: str | None
    """The name of the same task in CLIP_benchmark, if it has one."""
    needs_training_images: bool = False

    @property
    def table_file(self) -> str:
        """Its table in the `evaluate/` folder."""
        return f"{self.name}.json"


_ROWS = (
    Protocol(ZERO_SHOT, "Zero-shot", "zero-shot", "zero-shot", "zeroshot_classification"),
    Protocol(LINEAR_PROBE, "Linear probe", "linear probe", "linear probe", "linear_probe", needs_training_images=True),
    Protocol(KNN, "Nearest neighbors", "neighbors", "neighbors", None, needs_training_images=True),
    Protocol(RETRIEVAL, "Retrieval", "retrieval", "mean recall", "zeroshot_retrieval"),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ROWS}
"""In the order in which they are measured and shown."""
