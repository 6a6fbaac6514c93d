"""`train --dry-run`: the resolved config and what the run would cost, without starting it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from simvq_moe.config.schema import Config
from simvq_moe.config.tasks import without_other_tasks
from simvq_moe.costs.cluster import fitting_gpus, read_cluster
from simvq_moe.costs.estimate import estimate
from simvq_moe.engine.launched import launched_ranks
from simvq_moe.errors import ConfigError
from simvq_moe.files.yaml import plain_yaml
from simvq_moe.training.preflight import check_settings, check_start, resolved


def dry_run(config: Config, cluster_file: Path | None = None) -> None:
    """Print the resolved config and what the run would cost, the costs on standard output as JSON;
    write nothing. Data that are not here are said, and not needed.

    Args:
        cluster_file: YAML of the machines to predict the step time on.
    """
    config = resolved(config)
    cluster = None if cluster_file is None else read_cluster(cluster_file)
    ranks = launched_ranks() if cluster is None else fitting_gpus(config, cluster)[-1]
    check_settings(config, ranks)
    text, costs = estimate(config, ranks, cluster)
    try:
        check_start(config)
    except ConfigError as error:
        text += f"\n! would not start here: {error}"
    print(plain_yaml(without_other_tasks(config)), text, sep="\n", file=sys.stderr)
    print(json.dumps(costs))
