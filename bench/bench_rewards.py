"""The rewards of a step, on the device: matched IoU of the boxes of 64 groups of 8, then their advantages."""

import pytest
import torch

from bench.race import Contender, against
from bench.timing import count_launches, synced_clock
from bench.workloads import CUDA, DEVICE
from medground_kernels import box_iou, group_advantage
from medground_kernels.box_iou import matched_iou_reference
from medground_kernels.group_advantage import group_advantage_reference

pytestmark = pytest.mark.benchmark(timer=synced_clock)

B, G, P, M = 64, 8, 4, 4


def test_matched_iou_and_group_advantage(race):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        corners = torch.rand(B, 1, M, 2, 2).sort(-2).values
        truth = corners.flatten(-2).expand(B, G, M, 4).contiguous()
        pred = (corners + 0.05 * torch.randn(B, G, P, 2, 2)).flatten(-2)
        truth_count = torch.randint(1, M + 1, (B, 1)).expand(B, G).contiguous()
        pred_count = torch.randint(P + 1, (B, G))

    def call(iou, advantage, dtype):
        rewards = iou(pred.to(dtype), pred_count, truth.to(dtype), truth_count)
        return {"rewards": rewards, "advantages": advantage(rewards)}

    def batched(rewards):
        return group_advantage._advantage_torch(rewards[..., None], None, "group", False, 1e-4)

    def batched_iou(a, n, b, m):
        return box_iou._matched_torch(a.flatten(0, 1), n.flatten(), b.flatten(0, 1), m.flatten()).view(n.shape)

    # on a GPU the same search in plain torch, all sets at once; on a CPU that is ours, so the definition itself
    theirs = (batched_iou, batched) if CUDA else (matched_iou_reference, group_advantage_reference)
    contenders = {
        "ours": Contender(lambda: lambda: call(box_iou.matched_iou, group_advantage.group_advantage, torch.float32)),
        "torch": Contender(lambda: lambda: call(*theirs, torch.float32)),
    }
    judge = against(call(matched_iou_reference, group_advantage_reference, torch.float64))
    rows = race("rewards", f"B {B} G {G} P {P} M {M}", contenders, judge, dtype=torch.float32)
    if CUDA:
        rows[0].launches = count_launches(contenders["ours"].build())
