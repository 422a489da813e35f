"""The least time that a step of ours can take, phase by phase, from rates measured on the same device.

The floors are those of `medground.plan.floors`, and its rate of products that of one large matrix product. Data, reward
and checkpoint have no floor of the device's.
"""

import torch

from bench.packed_floors import copy_rate, product_rate
from bench.step_job import PHASES, Job
from bench.step_ours import OurSide
from medground.costs import sizes_of, step_operations
from medground.plan.floors import Rates, floors, model_of


def measure_rates(job: Job) -> Rates:
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    return Rates(copy_rate(job.device), product_rate(job.device, dtype))


def step_floors(ours: OurSide, rates: Rates) -> dict[str, float]:
    """Seconds of each phase of the last step."""
    itemsize = ours.asker.whole.policy.vlm.lm_head.weight.itemsize
    model, groups = model_of(ours.asker.policy, itemsize, network=ours.network), sizes_of(ours.groups)
    return dict.fromkeys(PHASES, 0.0) | floors(model, groups, step_operations(ours.network, groups), rates)
