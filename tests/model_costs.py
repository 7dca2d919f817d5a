"""Parameters and operations of a named architecture, for the pages that count with them."""

from clip_cid.models.architectures import architecture, build_skeleton
from clip_cid.models.costs import Costs, count_costs


def costs(name: str) -> Costs:
    """Of an image and of a text of 77 tokens."""
    skeleton = build_skeleton(architecture(name)[0])
    assert skeleton is not None
    counted = count_costs(skeleton, context_length=77)
    assert counted is not None
    return counted
