"""The number of replicas for the load of an endpoint: the policy that Ray Serve's controller calls.

The load of a replica is measured in replicas (`Scheduler.load`): the share of its slots, or of its memory for keys and
values if that is more, which all its requests need, those that wait included. It is a function of the tokens of
prompts and completions, not only of the number of requests.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

LOAD = "load"  # the metric of each replica
TARGET_LOAD = 0.8  # of a replica; at 1, every new request would wait


def replicas_for_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas that the load needs. Ray Serve applies the delays and the bounds."""
    loads = (context.aggregated_metrics or {}).get(LOAD, {})
    if not loads:  # no replica has reported yet
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(loads.values()) / TARGET_LOAD)), {}
