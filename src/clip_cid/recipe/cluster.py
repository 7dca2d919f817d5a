"""The settings of the cluster stage."""

from pydantic import NonNegativeInt, PositiveInt

from clip_cid.recipe.section import Config
from clip_cid.recipe.values import AUTO, Input, PositiveOrAuto, settled


class ClusterConfig(Config):
    """Spherical k-means over the kept teacher image embeddings (paper section 3.2, Eq. 1)."""

    at_addresses = ("existing",)

    num_centers: PositiveOrAuto = AUTO
    """K, the number of clusters. auto: one for 30 kept images, and not more than the paper's million
    (for 225 million images). 20 to 200 images a cluster are usual."""
    iterations: PositiveInt = 20
    """Rounds of assignment and update."""
    max_points_per_center: PositiveInt = 256
    """Train on at most this many images per center, drawn at random. All images are assigned at the
    end."""
    seed: NonNegativeInt = 0
    """Seed of the sample and of the first centers."""
    truth_field: str | None = None
    """The field with the class of an image, one of pairs.keep_fields. The purity of the clusters is
    then reported."""
    texts: bool = False
    """Cluster the text embeddings of the captions of the kept images too, for the losses that read
    clusters of texts. The paper clusters images only."""
    num_text_centers: PositiveInt | None = None
    """The number of clusters of texts. When absent: num_centers."""
    existing: Input | None = None
    """Use this folder with centers.npy and labels.npy (with `texts` also text_centers.npy and
    text_labels.npy) instead of clustering. On the command line: `--clusters`."""

    @property
    def text_centers(self) -> int:
        """How many clusters of texts are made, if any."""
        return self.num_text_centers or settled(self.num_centers)
