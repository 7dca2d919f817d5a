"""Every figure of a run."""

from clip_cid.report.drawing import of_balance, of_clusters, of_models, of_scores, of_training

FIGURES = tuple(
    sorted(
        (
            *of_balance.FIGURES,
            *of_clusters.FIGURES,
            *of_training.FIGURES,
            *of_scores.FIGURES,
            *of_models.FIGURES,
        ),
        key=lambda figure: figure.name,
    )
)
"""By name: the order of the draw stage and of its summary."""
