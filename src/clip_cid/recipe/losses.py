"""The weights of the losses, and the sets of weights that have names."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

from pydantic import Field, create_model

from clip_cid.loss_table import LOSSES, Reading, rows_of
from clip_cid.recipe.section import Config

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_WeightOfEach: type[Config] = create_model(
    "_WeightOfEach",
    __base__=Config,
    **cast(Any, {loss.name: (_Weight, Field(default=loss.weight, description=loss.help)) for loss in LOSSES}),
)


class LossWeights(_WeightOfEach):
    """Weights of the losses; 0 switches a loss off (paper Table 5)."""

    if TYPE_CHECKING:  # the fields come from the table

        def __getattr__(self, name: str) -> float: ...

    @property
    def switched_on(self) -> tuple[str, ...]:
        """The losses whose weight is above 0."""
        return tuple(loss.name for loss in LOSSES if getattr(self, loss.name) > 0)

    @property
    def learn_from_texts(self) -> bool:
        """Whether a loss that is switched on learns from texts without images."""
        return any(loss.learns_from_texts for loss in rows_of(self.switched_on))

    def any_reads(self, reading: Reading) -> bool:
        """Whether a loss that is switched on reads this."""
        return any(reading in loss.reads for loss in rows_of(self.switched_on))

    @property
    def any_reads_bank(self) -> bool:
        """Whether a loss that is switched on reads a draw of stored embeddings."""
        return any(loss.reads_bank for loss in rows_of(self.switched_on))


class Preset(NamedTuple):
    """A named preset of loss weights, and the settings that belong to it."""

    weights: dict[str, float]
    settings: Mapping[str, float] = MappingProxyType({})


OF_TEXT = tuple(loss.name for loss in LOSSES if loss.trains_text_only)
_NOTHING = dict.fromkeys(LossWeights.model_fields, 0.0)
_CLIP_CID = {loss.name: loss.weight for loss in LOSSES}
PRESETS: dict[str, Preset] = {
    "clip-cid": Preset(_CLIP_CID),
    "best": Preset(_CLIP_CID | {"cosine_text": 100.0}),
    "paper-r1": Preset(
        _NOTHING | {"clip": 1.0, "cluster_cls": 0.999, "cluster_kl": 0.001, "instance_image": 0.5, "instance_text": 0.5}
    ),
    "paper-r2": Preset(
        _NOTHING | {"clip": 1.0, "cluster_cls": 0.001, "cluster_kl": 0.999, "instance_image": 0.5, "instance_text": 0.5}
    ),
    "clip-only": Preset(_NOTHING | {"clip": 1.0}),
    "siglip-only": Preset(_NOTHING | {"siglip": 1.0}),
    "open-clip": Preset(_NOTHING | {"clip": 1.0, "affinity": 1.0}),
    "clip-kd": Preset(_NOTHING | {"clip": 1.0, "affinity": 1.0, "feature": 2000.0, "icl": 1.0}),
    "tiny-clip": Preset(_NOTHING | {"affinity": 1.0}, {"teacher_scale": 50.0, "affinity_scale": 50.0}),
    "mobile-clip": Preset(_NOTHING | {"affinity": 1.0}),
    "mobile-clip-b": Preset(_NOTHING | {"clip": 0.25, "affinity": 0.75}),
}
