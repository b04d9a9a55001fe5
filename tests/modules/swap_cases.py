"""Tiny transformers of all families with enough blocks to swap, dressed as in a run, and what is done with
them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from frame_pack.configs import DIT as FRAMEPACK
from frame_pack.model import FramePackModel
from hunyuan_model.model import HunyuanVideoModel
from hunyuan_model.spec import DIT as HUNYUAN
from modules.contract.family import DitSpec
from modules.offload.block_swap import move_network, swap_blocks
from modules.offload.checkpointing import checkpoint_blocks, offload_to_host
from modules.offload.host_memory import Transfer
from modules.offload.swap_plan import HostWeights, SwapPlan, host_weights
from modules.speed_options import SLOTS
from tests.gpu.measuring import sent
from tests.hunyuan_model import making
from tests.modules.fake_device import FakeDevice, hide
from tests.tiny import dits, framepack_dit, hunyuan_dit, wan_dit
from tests.tiny.loras import make_lora
from tests.wan.making import tiny_inputs as wan_inputs
from wan.model import WanModel
from wan.spec import DIT as WAN

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
    most: int  # blocks that can be swapped


def _wan() -> nn.Module:
    dit = WanModel(replace(wan_dit.CONFIGS["t2v"], num_layers=5))
    dit.load_state_dict(wan_dit.tiny_state("t2v", num_layers=5))
    return dit.requires_grad_(False)


def _wan_inputs(seed: int) -> dict[str, Any]:
    inputs = wan_inputs("t2v", batch=1, frames=1)
    return {
        **inputs,
        "noisy": torch.randn(inputs["noisy"].shape, generator=torch.Generator().manual_seed(seed)),
    }


def _hunyuan() -> nn.Module:
    sizes = {"double_blocks": 3, "single_blocks": 7}
    dit = HunyuanVideoModel(replace(hunyuan_dit.CONFIGS["t2v"], **sizes))
    dit.load_state_dict(hunyuan_dit.tiny_state("t2v", **sizes))
    return dit.requires_grad_(False)


def _hunyuan_inputs(seed: int) -> dict[str, Any]:
    inputs = making.tiny_inputs("t2v", (4,), frames=1)
    return {
        **inputs,
        "noisy": torch.randn(inputs["noisy"].shape, generator=torch.Generator().manual_seed(seed)),
    }


def _framepack() -> nn.Module:
    sizes = {"double_blocks": 3, "single_blocks": 7}
    dit = FramePackModel(replace(framepack_dit.CONFIG, **sizes))  # type: ignore[arg-type]
    dit.load_state_dict(framepack_dit.tiny_state(**sizes))
    return dit.requires_grad_(False)


def _framepack_inputs(seed: int) -> dict[str, Any]:
    inputs = dits.ONE_OF_EACH[2].inputs((2, 4, 6, 7), 1)
    return {
        **inputs,
        "noisy": torch.randn(inputs["noisy"].shape, generator=torch.Generator().manual_seed(seed)),
    }


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


CASES = (
    Case("wan", WAN, _wan, _wan_inputs, _lora("lora_wan"), (5,), 4),
    Case("hunyuan", HUNYUAN, _hunyuan, _hunyuan_inputs, _lora("lora_hunyuan"), (3, 7), 4),
    Case("framepack", FRAMEPACK, _framepack, _framepack_inputs, _lora("lora_framepack"), (3, 7), 4),
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
