"""What the settings of the cluster losses do on real pairs, and the collapse that the paper warns of.

    python benchmarks/cluster_head.py settings RECIPE OUT      every variant x seed on one set of embeddings and clusters
    python benchmarks/cluster_head.py collapse OUT             head and student trained together, small and made up

Both go on where they were stopped, write one JSON line a run, and print Markdown tables. `--help` has the settings; the modules
`cluster_settings.py` and `cluster_collapse.py` say what is measured.
"""

import tyro
from cluster_collapse import collapse
from cluster_settings import settings

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"settings": settings, "collapse": collapse}, description=__doc__)
