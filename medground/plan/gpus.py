"""GPUs to plan for: what their data sheets say, and what is assumed of how far it is reached.

Rates of products are in `costs.PEAK_RATES`. `medground plan` prints which of the other figures it used; docs/plan.md
has the sources.
"""

from __future__ import annotations

from typing import NamedTuple

NODE = 8
"""GPUs of a node."""


class Gpu(NamedTuple):
    """A kind of GPU in nodes of 8.

    Attributes:
        name: its key in `costs.PEAK_RATES`; empty for a CPU.
        memory: bytes that CUDA can hand out.
        bandwidth: bytes a second of its memory.
        link: bytes a second, each way, to the other GPUs of its node.
        network: bytes a second, each way, between nodes, for each GPU.
        wires: what link and network are.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    network: float
    wires: str


_GIB = 1 << 30
_PCIE4, _PCIE4_NET = 32e9, 3.125e9
_SXM_H = "NVLink 4, 900 GB/s both ways; 400 Gb/s of InfiniBand for each GPU"
_SXM_A = "NVLink 3, 600 GB/s both ways; 200 Gb/s of InfiniBand for each GPU"
_PCIE = "PCIe 4.0 x16; 200 Gb/s of network for a node"

GPUS = {
    "h100-80gb": Gpu("H100", 79.1 * _GIB, 3.35e12, 450e9, 50e9, _SXM_H),
    "h200-141gb": Gpu("H200", 139.8 * _GIB, 4.8e12, 450e9, 50e9, _SXM_H),
    "a100-40gb": Gpu("A100", 39.5 * _GIB, 1.555e12, 300e9, 25e9, _SXM_A),
    "a100-80gb": Gpu("A100", 79.1 * _GIB, 2.039e12, 300e9, 25e9, _SXM_A),
    "l40s-48gb": Gpu("L40S", 44.4 * _GIB, 0.864e12, _PCIE4, _PCIE4_NET, _PCIE),
    "rtx-4090-24gb": Gpu("RTX 4090", 23.6 * _GIB, 1.008e12, _PCIE4, _PCIE4_NET, _PCIE),
    "rtx-a6000-48gb": Gpu("RTX A6000", 47.5 * _GIB, 0.768e12, _PCIE4, _PCIE4_NET, _PCIE),
    "cpu": Gpu("", 16 * _GIB, 25e9, 5e9, 1.25e9, "shared memory through gloo; 10 Gb/s Ethernet"),
}
"""Memory is less than the name says: what out-of-memory messages of PyTorch give as total capacity (docs/plan.md)."""


def shards_of(replicas: int, gpus: int) -> int:
    """GPUs that share one copy of the weights, for `sharding.replicas` on nodes of 8.

    Raises:
        ValueError: the GPUs cannot be shared out evenly.
    """
    if not replicas and gpus > NODE and gpus % NODE:
        raise ValueError(f"--gpus: want whole nodes of {NODE} where there are more; got {gpus}")
    found = replicas or -(-gpus // NODE)
    if gpus % found:
        raise ValueError(f"sharding.replicas: want a divisor of the {gpus} GPUs; got {found}")
    return gpus // found


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in the table.

    Raises:
        ValueError: it is not there.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu: want one of {', '.join(GPUS)}; got {name!r}")
    return GPUS[name]
