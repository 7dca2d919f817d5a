"""Which rows are compared with which centers: each comparison is one pass over centers, and gives one loss or two."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Centers = Literal["clusters", "text_clusters"]


@dataclass(frozen=True)
class ClusterPass:
    """The student's rows of one modality against one set of centers; `cluster_passes` in docs/method.md."""

    name: str
    """Of its divergence, which every pass has."""
    cls: str | None
    """Of its cross entropy; None where the centers are those of the other modality."""
    centers: Centers
    student: Literal["aligned_image", "aligned_text"]
    teacher: Literal["teacher_image", "teacher_text"]
    """Whose distribution is the target."""

    @property
    def losses(self) -> set[str]:
        return {self.name} if self.cls is None else {self.name, self.cls}


PASSES = (
    ClusterPass("cluster_kl", "cluster_cls", "clusters", "aligned_image", "teacher_image"),
    ClusterPass("text_cluster_kl", "text_cluster_cls", "text_clusters", "aligned_text", "teacher_text"),
    ClusterPass("cross_cluster_image", None, "text_clusters", "aligned_image", "teacher_image"),
    ClusterPass("cross_cluster_text", None, "clusters", "aligned_text", "teacher_text"),
)
"""In the order in which they are computed."""


def passes_of(losses: Collection[str]) -> list[ClusterPass]:
    """Those that give one of these losses."""
    return [one for one in PASSES if not one.losses.isdisjoint(losses)]
