"""The whole recipe: its sections, and what the settings of one demand of another."""

from pydantic import model_validator

from clip_cid.loss_table import rows_of
from clip_cid.recipe.balance import KEEP_RULES, LARGEST_FILE, OF_FIELD, BalanceConfig
from clip_cid.recipe.cluster import ClusterConfig
from clip_cid.recipe.distill import DistillConfig
from clip_cid.recipe.draw import DrawConfig
from clip_cid.recipe.embed import EmbedConfig
from clip_cid.recipe.evaluate import EvaluateConfig
from clip_cid.recipe.machine import MachineConfig
from clip_cid.recipe.pairs import PairsConfig
from clip_cid.recipe.report import ReportConfig
from clip_cid.recipe.section import Config
from clip_cid.recipe.values import AUTO
from clip_cid.stage_names import BALANCE, CLUSTER, EMBED, EVALUATE, TEXTS


class Recipe(Config):
    """The whole page."""

    pairs: PairsConfig = PairsConfig()
    embed: EmbedConfig = EmbedConfig()
    balance: BalanceConfig = BalanceConfig()
    cluster: ClusterConfig = ClusterConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    draw: DrawConfig = DrawConfig()
    report: ReportConfig = ReportConfig()
    machine: MachineConfig = MachineConfig()

    @property
    def has_teacher(self) -> bool:
        return self.embed.teacher != "none" or self.embed.existing is not None

    @property
    def uses_clusters(self) -> bool:
        """Whether a loss reads the clusters: their centers, and that of each image."""
        return self.distill.weights.any_reads("clusters")

    @property
    def uses_labels(self) -> bool:
        """Whether the training reads which cluster an image is in, for a loss or for the order of the pairs."""
        return self.uses_clusters or self.distill.per_cluster is not None

    @property
    def uses_several_labels(self) -> bool:
        """Whether the training first finds more labels of each image than its cluster."""
        return self.distill.weights.cluster_cls > 0 and self.distill.labels > 1

    @property
    def uses_text_clusters(self) -> bool:
        return self.distill.weights.any_reads("text_clusters")

    @property
    def uses_teacher_images(self) -> bool:
        """Whether a loss reads the teacher's image embeddings while the student learns."""
        return self.distill.weights.any_reads("teacher_image")

    @property
    def uses_teacher_texts(self) -> bool:
        """Whether a loss reads the teacher's text embeddings while the student learns."""
        settings, weights = self.distill, self.distill.weights
        as_students = weights.any_reads("text") or weights.any_reads("aligned_text") or settings.validation.share > 0
        read = any(loss.reads_teacher_texts for loss in rows_of(weights.switched_on))
        return read or (settings.keeps_text_tower and as_students)

    @property
    def uses_texts(self) -> bool:
        """Whether the student learns from texts without images."""
        return bool(self.distill.texts) and self.distill.weights.learn_from_texts

    def uses(self, stage: str) -> bool:
        """Whether this recipe has the stage: plain CLIP training has no embed, balance or cluster."""
        if not self.evaluate.student and stage != EVALUATE:
            return False
        used = {
            EMBED: self.has_teacher,
            BALANCE: self.has_teacher and self.balance.enabled,
            CLUSTER: self.has_teacher and (self.uses_labels or self.uses_text_clusters),
            TEXTS: self.uses_texts,
            EVALUATE: bool(self.evaluate.sets or self.evaluate.retrieval),
        }
        return used.get(stage, True)

    @model_validator(mode="after")
    def _teacher_fits(self) -> "Recipe":
        if self.has_teacher:
            return self

        # What learns from a teacher's embeddings.
        if self.distill.keeps_text_tower:
            raise ValueError(
                f"distill.text_tower: {self.distill.text_tower}, but embed.teacher: none, so there are no embeddings of"
                " it to learn from; set distill.text_tower: own"
            )
        if self.uses_clusters or self.uses_teacher_images or self.uses_teacher_texts:
            raise ValueError(
                "embed.teacher: none, but distill.weights asks for distillation; set distill.weights: clip-only in a recipe"
            )
        if self.distill.per_cluster is not None:
            raise ValueError(
                "embed.teacher: none, but distill.per_cluster needs clusters of a teacher's embeddings; leave it out"
            )

        # What a teacher embeds.
        if self.pairs.captions_are_optional:
            raise ValueError(
                "embed.teacher: none, but pairs.captions: optional takes images that only a teacher can say something"
                " of; set pairs.captions: required"
            )
        if self.embed.views:
            raise ValueError(f"embed.views: {self.embed.views}, but embed.teacher: none, so nothing embeds them")
        return self

    @model_validator(mode="after")
    def _captions_fit(self) -> "Recipe":
        balance = self.balance
        balanced = self.has_teacher and balance.enabled and balance.existing is None
        if self.distill.merged_captions and not (balanced and balance.merge_captions):
            why = "balance.merge_captions: false" if balanced else "nothing is balanced here"
            raise ValueError(
                f"distill.merged_captions: true, but {why}, so no pair is given captions of others; balance with"
                " balance.merge_captions: true, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_fit(self) -> "Recipe":
        embed = self.embed
        if self.uses_texts and embed.existing is not None:
            raise ValueError(
                "distill.texts: the teacher embeds them, but embed.existing takes embeddings that were made elsewhere,"
                " and no teacher is loaded; leave out one of the two"
            )
        if embed.match == "order" and (embed.existing is None or not self.pairs.source):
            raise ValueError(
                "embed.match: order gives the rows of embed.existing to the pairs of pairs.source; name both, or leave"
                " it out"
            )

        # Views are crops that a teacher embeds, and the only ones.
        if embed.views and self.distill.crop_scale != DistillConfig().crop_scale:
            raise ValueError(
                f"distill.crop_scale: {self.distill.crop_scale:g} has no effect with embed.views: {embed.views},"
                " whose crops the student sees; leave it out, and set embed.view_crop_scale"
            )
        return self

    @model_validator(mode="after")
    def _losses_fit(self) -> "Recipe":
        switched_on = rows_of(self.distill.weights.switched_on)
        if not switched_on:
            raise ValueError("distill.weights: all are 0, so there is nothing to learn")

        # An image has at most as many labels as there are clusters.
        clusters, labels = self.cluster, self.distill.labels
        of_number = clusters.num_centers if clusters.existing is None else AUTO
        if self.uses_several_labels and of_number != AUTO and labels > of_number:
            raise ValueError(
                f"distill.labels: {labels:,} labels for an image, but cluster.num_centers is {of_number:,}"
            )

        # Clusters of texts are made only where they are asked for.
        if self.uses_text_clusters and not clusters.texts:
            readers = ", ".join(loss.name for loss in switched_on if "text_clusters" in loss.reads)
            raise ValueError(f"distill.weights: {readers} read clusters of texts; set cluster.texts: true")

        # Clusters of texts are of the captions of kept pairs alone.
        if self.distill.merged_captions and self.uses_text_clusters:
            readers = ", ".join(loss.name for loss in switched_on if "text_clusters" in loss.reads)
            raise ValueError(
                f"distill.merged_captions: {readers} read the cluster of each caption, which those of removed images do"
                " not have; leave it out, or set the weights of these losses to 0"
            )

        # An image without a caption has no place in comparisons of texts with centers.
        of_texts = [loss.name for loss in switched_on if loss.reads_captions and "clusters" in loss.reads]
        if self.pairs.captions_are_optional and (clusters.texts or of_texts):
            asks = "cluster.texts" if clusters.texts else f"distill.weights.{of_texts[0]}"
            raise ValueError(
                f"pairs.captions: optional, but {asks} needs a caption for every image; leave out one of them"
            )
        return self

    @model_validator(mode="after")
    def _balance_fits(self) -> "Recipe":
        balance = self.balance
        if LARGEST_FILE in balance.keep and not self.pairs.source:
            raise ValueError("balance.keep: largest_file reads the images; set pairs.source")
        if balance.max_threshold is not None and balance.target_removed is None:
            low, high = balance.threshold, balance.max_threshold
            if high < low:
                raise ValueError(f"balance.max_threshold: {high:g} is below balance.threshold {low:g}")
        return self

    @model_validator(mode="after")
    def _names_refer(self) -> "Recipe":
        if self.draw.images_of is not None and self.draw.images_of not in self.evaluate.sets:
            raise ValueError(f"draw.images_of: {self.draw.images_of!r} is not among evaluate.sets")
        fields: list[tuple[str, str | None]] = [
            ("balance.truth_field", self.balance.truth_field),
            ("cluster.truth_field", self.cluster.truth_field),
            *(("balance.keep", rule.removeprefix(OF_FIELD)) for rule in self.balance.keep if rule not in KEEP_RULES),
        ]
        for setting, field in fields:
            # Embeddings made elsewhere keep all columns of their metadata.
            if field is not None and field not in self.pairs.keep_fields and self.embed.existing is None:
                raise ValueError(f"{setting}: {field!r} is not among pairs.keep_fields, so it is not stored")
        return self


def auto_settings(recipe: Recipe) -> tuple[str, ...]:
    """The numbers that are still to be chosen."""
    clusters, training = recipe.cluster, recipe.distill
    values = {
        "cluster.num_centers": clusters.num_centers,
        "distill.epochs": training.epochs,
        "distill.batch_size": training.batch_size,
        "distill.warmup_steps": training.warmup_steps,
    }
    return tuple(setting for setting, value in values.items() if value == AUTO)
