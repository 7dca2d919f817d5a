"""Every setting of every stage, with its limits and its default: the paper's, or `auto` where that is for 64 GPUs.

A recipe is a YAML file of these sections; flags of the same dotted names override it. Settings in
`machine` change how fast a result is made, but not the result, and never make a stage stale.

Each section has a module of its own. The docstring of a setting is its help: `clip-cid init` and
`--help` print it. `whole` puts the sections together, `reading` and `writing` are the YAML.
"""

from clip_cid.recipe.balance import LARGEST_FILE, OF_FIELD, BalanceConfig, Metric, is_list_of_keys
from clip_cid.recipe.cluster import ClusterConfig
from clip_cid.recipe.distill import OWN_TEXT_TOWER, TEACHERS_TEXT_TOWER, DistillConfig
from clip_cid.recipe.embed import EmbedConfig
from clip_cid.recipe.evaluate import STUDENT, EvaluateConfig
from clip_cid.recipe.losses import PRESETS, LossWeights
from clip_cid.recipe.machine import MachineConfig
from clip_cid.recipe.pairs import ALLOW_PIPE, STORE_COLUMNS, PairsConfig
from clip_cid.recipe.reading import parse_recipe, read_recipe, read_run_recipe
from clip_cid.recipe.section import Config
from clip_cid.recipe.values import AUTO, Precision, settled
from clip_cid.recipe.whole import Recipe, auto_settings
from clip_cid.recipe.writing import as_yaml, commented_recipe, dump_recipe, one_line

__all__ = [
    "ALLOW_PIPE",
    "AUTO",
    "LARGEST_FILE",
    "OF_FIELD",
    "OWN_TEXT_TOWER",
    "PRESETS",
    "STORE_COLUMNS",
    "STUDENT",
    "TEACHERS_TEXT_TOWER",
    "BalanceConfig",
    "ClusterConfig",
    "Config",
    "DistillConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "LossWeights",
    "MachineConfig",
    "Metric",
    "PairsConfig",
    "Precision",
    "Recipe",
    "as_yaml",
    "auto_settings",
    "commented_recipe",
    "dump_recipe",
    "is_list_of_keys",
    "one_line",
    "parse_recipe",
    "read_recipe",
    "read_run_recipe",
    "settled",
]
