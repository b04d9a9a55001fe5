"""What the options for less memory do to a U-Net, which runs its own loop over its blocks; by counting."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from modules.compile_options import Compilation
from networks.builtin_networks import build_network
from protocols.loading import Placement
from runtime.network_setup import Checkpointing, set_up_network
from runtime.offload.checkpointing import Offload, checkpoint_blocks, offload_to_host
from stable_diffusion.family import StableDiffusion
from tests.stable_diffusion.test_training_step import make_batch, make_family
from tests.tiny.loras import network_options

CPU = torch.device("cpu")
TIMESTEPS = (10, 800)


class AttentionCount(TorchDispatchMode):
    """Counts the calls of attention, without their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.calls += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def load_learning(family: StableDiffusion) -> torch.nn.Module:
    """Load the U-Net in train mode, with gradients of the weights of attention."""
    unet = family.load_dit(Placement(CPU)).train()
    for path, parameter in unet.named_parameters():
        parameter.requires_grad_(".attentions." in path)
    return unet


def learn(family: StableDiffusion, unet: torch.nn.Module) -> tuple[dict[str, Tensor], int, int]:
    """Return the gradients of a step, the bytes that autograd keeps for them, and the calls of attention."""
    noisy = make_batch(family, TIMESTEPS)
    latents = noisy.batch.tensor("latents")
    conditions = family.batch_conditions(latents, noisy.batch)
    saved: dict[int, int] = {}  # first byte -> bytes

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    unet.zero_grad()
    count = AttentionCount()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), count:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = family.predict(unet, latents, noisy.timesteps, conditions)
        output.square().mean().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in unet.named_parameters()
        if parameter.grad is not None
    }
    return gradients, sum(size for place, size in saved.items() if place not in weights), count.calls


@pytest.mark.slow_cases("sdxl")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_checkpointing_keeps_less_and_computes_the_same_gradients(kind: str, tmp_path: Path) -> None:
    family = make_family(kind, tmp_path)
    gradients, kept, calls = learn(family, load_learning(family))
    cases: dict[str, tuple[bool, Offload | None]] = {
        "plain": (False, None),
        "attention kept": (True, None),
        "offloaded": (False, offload_to_host(CPU)),
    }
    for name, (keeps_attention, offload) in cases.items():
        unet = load_learning(family)
        checkpoint_blocks(unet, family.dit, keeps_attention, offload)

        again, kept_again, calls_again = learn(family, unet)

        assert again.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            # the same operations on the same numbers, of which some sums are made in another order
            torch.testing.assert_close(again[parameter], gradient, rtol=1e-4, atol=1e-6)
        assert kept_again < kept / 2, name
        # layers are recomputed one by one, after a projection that learns
        assert calls_again == (calls if keeps_attention else 2 * calls), name
        if offload is not None:
            assert offload.memory.size_bytes > 0


@pytest.mark.parametrize(
    ("compilation", "by_layers"),
    [(None, True), (Compilation("eager"), True), (Compilation("eager", dynamic=False), False)],
    ids=["eager", "compiled", "each size compiled"],
)
def test_layers_of_a_block_are_recomputed_one_by_one_unless_it_is_compiled_as_a_whole(
    tmp_path: Path, compilation: Compilation | None, by_layers: bool
) -> None:
    family = make_family("sdxl", tmp_path)
    unet = family.load_dit(Placement(CPU))

    set_up_network(unet, family.dit, CPU, compilation=compilation, checkpointing=Checkpointing())

    for block in family.dit.blocks_in_order(unet):
        layers: Any = getattr(block, "transformer_blocks", [])
        if len(layers):
            changed = ["forward" in vars(layer) for layer in layers]
            assert changed == [by_layers] * len(layers)
            assert ("forward" in vars(block)) == (not by_layers)


@pytest.mark.parametrize("dynamic", [None, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("nothing_compiled")
def test_another_bucket_compiles_nothing_unless_each_size_is_asked_for(
    tmp_path: Path, dynamic: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With eager in place of inductor, which takes minutes on a CPU. Gradients are those of plain blocks."""
    caplog.set_level(logging.INFO)
    family = make_family("sd1", tmp_path)
    unet, compiled = load_learning(family), load_learning(family)
    choice = Compilation("eager", dynamic=dynamic)
    set_up_network(compiled, family.dit, CPU, compilation=choice, checkpointing=Checkpointing())
    generator = torch.Generator().manual_seed(0)
    conditions = {"hidden_state": torch.randn(2, 77, 64, generator=generator)}

    graphs, told = [], []
    for height, width in ((8, 8), (4, 12), (12, 4), (8, 8)):
        noisy = torch.randn(2, 4, 1, height, width, generator=generator)
        outputs = []
        for network in (unet, compiled):
            output = family.predict(network, noisy, torch.tensor(TIMESTEPS), conditions)
            output.square().mean().backward()
            outputs.append(output)
        # the same operations, in float32
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
        told.append(caplog.text.count("Compiling took"))

    first, *others = graphs
    assert first > 0
    if dynamic is None:
        assert others == [first] * 3  # of each width of layers, and once more if its input needs no gradient
        assert told == [0, 1, 1, 1]
    else:
        assert others == [2 * first, 3 * first, 3 * first]
        assert told == [0, 1, 2, 3]
    for plain, other in zip(unet.parameters(), compiled.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(other.grad, plain.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_steps_of_a_lora_in_bf16_are_compiled_once(tmp_path: Path) -> None:
    """Their factors are cast anew in each pass."""
    family = make_family("sdxl", tmp_path)
    unet = family.load_dit(Placement(CPU)).train()
    network = build_network("networks.lora", network_options("lora", 2), unet, {})
    network.attach()
    set_up_network(unet, family.dit, CPU, compilation=Compilation("eager"), checkpointing=Checkpointing())
    batch = make_batch(family, TIMESTEPS).batch

    graphs = []
    for height, width in ((8, 8), (4, 12), (12, 4)):
        noisy = torch.randn(2, 4, 1, height, width)
        conditions = family.batch_conditions(noisy, batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = family.predict(unet, noisy, torch.tensor(TIMESTEPS), conditions)
        output.float().square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])

    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3
