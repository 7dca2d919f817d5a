"""The names of the stages: each is a command, a folder of the run, and most are a section of the recipe."""

EMBED = "embed"
BALANCE = "balance"
CLUSTER = "cluster"
DISTILL = "distill"
EVALUATE = "evaluate"
DRAW = "draw"
REPORT = "report"
