"""The names of the stages: each is a command, a folder of the run, and most are a section of the recipe."""

EMBED = "embed"
BALANCE = "balance"
CLUSTER = "cluster"
TEXTS = "texts"
DISTILL = "distill"
EVALUATE = "evaluate"
DRAW = "draw"
REPORT = "report"
STAGE_NAMES = (EMBED, BALANCE, CLUSTER, TEXTS, DISTILL, EVALUATE, DRAW, REPORT)
