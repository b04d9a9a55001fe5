"""Tiny transformers of all families with enough blocks to swap, dressed as in a run, and what is done with
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.speed_options import SLOTS
from protocols.family import DitSpec
from runtime.offload.block_swap import move_network, swap_blocks
from runtime.offload.checkpointing import checkpoint_blocks, offload_to_host
from runtime.offload.host_memory import Transfer
from runtime.offload.swap_plan import HostWeights, SwapPlan, host_weights
from tests.gpu.measuring import sent
from tests.modules.fake_device import FakeDevice, hide
from tests.tiny.dits import ONE_OF_EACH, Size, TinyDit
from tests.tiny.loras import make_lora

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One family.

    `make` gives a frozen transformer, `inputs` what its forward takes, `network` a LoRA for it.
    """

    name: str
    spec: DitSpec
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]  # seed
    network: Callable[[nn.Module], nn.Module]
    blocks: tuple[int, ...]
    maximum: int  # blocks that can be swapped


def _case(name: str, tiny: TinyDit, blocks: tuple[int, ...], size: Size) -> Case:
    def inputs(seed: int) -> dict[str, Any]:
        given, generator = tiny.inputs(size, 1), torch.Generator().manual_seed(seed)
        return {**given, "noisy": torch.randn(given["noisy"].shape, generator=generator)}

    def make() -> nn.Module:
        return tiny.make(blocks)

    return Case(name, tiny.spec, make, inputs, _lora(tiny.lora), blocks, maximum=4)


def _lora(name: str) -> Callable[[nn.Module], nn.Module]:
    def build(dit: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = make_lora(name, 2, 2.0, dit)
            network.attach()
            for parameter, weight in network.named_parameters():
                if "lora_up" in parameter:
                    nn.init.normal_(weight, std=0.02)
        return network.requires_grad_(True)

    return build


WAN, HUNYUAN, FRAMEPACK = ONE_OF_EACH
CASES = (
    _case("wan", WAN, (5,), (1, 4, 6, 9)),
    _case("hunyuan", HUNYUAN, (3, 7), (1, 4, 6, 4)),
    _case("framepack", FRAMEPACK, (3, 7), (2, 4, 6, 7)),
)


def swapped(
    dit: nn.Module,
    spec: DitSpec,
    blocks: int,
    device: Transfer | None = None,
    input_layers: bool = False,
    slots: int = SLOTS,
    where: torch.device = CPU,
) -> HostWeights | None:
    """Swap; with a fake device, whose host memory is hidden then."""
    host = host_weights(SwapPlan(spec, blocks, input_layers, slots), where)
    swap_blocks(dit, host, where, device)
    if host is not None and isinstance(device, FakeDevice):
        for tensor in host.adopt(dit).values():
            hide(tensor)
    return host


def learner(
    case: Case,
    blocks: int,
    checkpointing: bool,
    device: Transfer | None = None,
    cast: torch.dtype | None = None,
    *,
    where: torch.device = CPU,
    slots: int = SLOTS,
    offload: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """A transformer dressed for training, and its LoRA. where: the device that it computes on."""
    dit = case.make()
    if cast is not None:
        dit = dit.to(cast)
    network = case.network(dit)
    if checkpointing:
        checkpoint_blocks(dit, case.spec, offload=offload_to_host(where) if offload else None)
    swapped(dit, case.spec, blocks, device, slots=slots, where=where)
    if where != CPU:
        move_network(dit, where)
        network.to(where)
    return dit.train(checkpointing), network


def gradients(
    case: Case, dit: nn.Module, network: nn.Module, seed: int = 1, where: torch.device = CPU
) -> list[Tensor]:
    """The output of a pass and the gradients of the LoRA."""
    network.zero_grad()
    output = dit(**sent(case.inputs(seed), where))
    (output * torch.linspace(-1, 1, output.numel()).to(where).view_as(output)).sum().backward()
    return [
        output.detach(),
        *(weight.grad.clone() for weight in network.parameters() if weight.grad is not None),
    ]


def step_in_backward(network: nn.Module) -> None:
    """Step each weight as soon as it has its gradient; with momentum, so that a lost step shows."""
    optimizers = {
        weight: torch.optim.SGD([weight], lr=1e-3, momentum=0.9)
        for weight in network.parameters()
        if weight.requires_grad
    }

    def step(weight: Tensor) -> None:
        optimizers[weight].step()  # type: ignore[index]
        weight.grad = None

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all are equal to the bit, and numbers."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) and bool(torch.isfinite(a).all()) for a, b in pairs)
