"""What the backward pass computes again: the gradients are the same, the memory and the products are not."""

from collections.abc import Callable

import pytest
import torch
import torch._functorch.config as compiler
from closeness import Products
from stream_cases import made_group, made_prompt, policy_of, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from bench.timing import PeakMemory
from medground.activation_checkpointing import checkpoint_activations
from medground.config import LoraConfig
from medground.packing import pack
from medground.policy import Policy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VLM = small_model(vision={"depth": 1, "fullatt_block_indexes": [0]}, num_hidden_layers=2).to(DEVICE)
GROUPS = [
    made_group(made_prompt("a", [40, 60], [(3, 4)]), [30, 10, 9], seed=1),
    made_group(made_prompt("b", [50]), [40, 7], seed=2),
]
PACKED = pack(GROUPS, VLM.config, DEVICE)
KINDS = ("none", "selective", "full")
Grads = dict[str, torch.Tensor]


def policy_with(kind: str, lora: bool = False, compiled: str | None = None) -> Policy:
    policy = policy_of(VLM).to(DEVICE).train()
    if lora:
        policy.add_adapters(LoraConfig(rank=3), seed=0)
    checkpoint_activations(policy.vlm, kind, compiled=bool(compiled))
    if compiled:
        torch.compiler.reset()
        policy.compile_layers(backend=compiled)
    return policy


def loss_of(policy: Policy) -> torch.Tensor:
    return (policy(PACKED, 1.0).logp * torch.linspace(-1, 1, len(PACKED.targets), device=DEVICE)).sum()


def gradients(policy: Policy) -> Grads:
    policy.zero_grad()
    loss_of(policy).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


class Attention(TorchDispatchMode):
    """How often attention was computed."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls += ("attention" in name or "attn" in name) and "backward" not in name
        return func(*args, **(kwargs or {}))


def work_of_the_backward_pass(policy: Policy) -> tuple[int, int]:
    """Products, and calls of attention."""
    loss = loss_of(policy)
    with Products() as products, Attention() as attention:
        loss.backward()
    return len(products.names), attention.calls


def most_memory(policy: Policy) -> int:
    with PeakMemory() as peak:
        gradients(policy)
    return peak.bytes


@pytest.mark.parametrize("lora", [False, True])
def test_recomputation_changes_memory_and_nothing_else(lora: bool):
    if lora:
        pytest.importorskip("peft")
    none, selective, full = (policy_with(kind, lora) for kind in KINDS)
    want = gradients(none)
    for policy in (selective, full):
        found = gradients(policy)
        assert found.keys() == want.keys() and all(torch.equal(found[name], grad) for name, grad in want.items())
    (products, attention), (kept, never), (again, twice) = map(work_of_the_backward_pass, (none, selective, full))
    assert attention == never == 0 < twice
    # of an adapter's two products the one that is hardly any work, but for the last one's, whose result nothing needs
    assert kept == products + 2 * 6 * lora
    made = 2 * 7 * (3 if lora else 1) + 5 * (not lora)  # of the layers; an adapter has two
    assert products + made - 4 <= again <= products + made, "but for what comes last"
    most, less, least = (most_memory(policy) for policy in (none, selective, full))
    assert most > 1.1 * less > 1.2 * least


def test_of_a_compiled_layer_the_compiler_is_asked_for_the_same():
    """aot_eager cuts graphs as inductor does, so what it keeps is what is kept."""
    layer = VLM.model.language_model.layers[0]
    x = torch.randn(50, 64, device=DEVICE, requires_grad=True)

    def part(x: torch.Tensor) -> torch.Tensor:
        return layer.mlp(layer.post_attention_layernorm(x))

    want, kept = torch.autograd.grad(part(x).sum(), x)[0], {}
    for kind in ("none", "selective"):
        policy = policy_with(kind, compiled="eager")
        assert not policy.vlm.is_gradient_checkpointing
        compiled = torch.compile(part, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], want)
        kept[kind] = bytes_kept(compiled, x)
    full = policy_with("full", compiled="eager")
    assert full.vlm.is_gradient_checkpointing and not compiler.aggressive_recomputation
    assert kept["none"] > 1.2 * kept["selective"]


def bytes_kept(compiled: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """What a forward pass keeps for its backward pass."""
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compiled(x)
    return sum(sizes.values()) - sum(weight.nbytes for weight in VLM.model.language_model.layers[0].mlp.parameters())
