"""LoRA factors that are cast once for each pass: results, gradients and kernels."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from networks.cast_factors import cast_before_pass
from networks.lora_layer import Dropouts, LoraLayer

WIDTH, RANK = 16, 4
SPLIT_SIZES = (8, 4, 4)  # of the parts of a fused layer


class Chain(nn.Module):
    """Two linear layers; the second one is a fused layer. Some passes omit it."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.checkpoints = checkpoints

    def forward(self, x: Tensor, skips_second: bool = False) -> Tensor:
        if self.checkpoints:
            x = checkpoint(self.first, x, use_reentrant=False)
        else:
            x = self.first(x)
        return x if skips_second else self.second(x)


def build(
    casts: bool, alpha: float = 2.0, checkpoints: bool = False, joins: bool = False
) -> tuple[Chain, list[LoraLayer]]:
    """Return a chain with LoRAs. casts: before each pass. joins: products are added in place."""
    torch.manual_seed(0)
    chain = Chain(checkpoints).requires_grad_(False)
    layers = [
        LoraLayer(chain.first, RANK, alpha),
        LoraLayer(chain.second, RANK, alpha, split_sizes=SPLIT_SIZES),
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_up.weight)
        layer.min_in_place_numel = 0 if joins else 1 << 60
        layer.attach()
    if casts:
        cast_before_pass(chain, layers)
    return chain, layers


def parameters_of(layers: Sequence[LoraLayer]) -> list[Tensor]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def step(chain: Chain, layers: Sequence[LoraLayer], **inputs: Any) -> list[Tensor]:
    """Return the output of a pass in bf16, and the gradients of all factors."""
    x = torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = chain(x, **inputs)
    out.float().square().sum().backward()
    return [out, *(parameter.grad for parameter in parameters_of(layers) if parameter.grad is not None)]


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_scale_that_is_a_power_of_two_gives_equal_bits(joins: bool, checkpoints: bool) -> None:
    own = step(*build(casts=False, checkpoints=checkpoints, joins=joins))
    cast = step(*build(casts=True, checkpoints=checkpoints, joins=joins))

    assert len(own) == 5
    for one, other in zip(own, cast, strict=True):
        assert torch.equal(one, other)


def test_another_scale_differs_by_what_bf16_rounds() -> None:
    own = step(*build(casts=False, alpha=1.3))
    cast = step(*build(casts=True, alpha=1.3))

    for one, other in zip(own, cast, strict=True):
        # one rounding to 8 bits at another place, through sums of 16 products
        torch.testing.assert_close(other, one, rtol=0, atol=2**-6 * one.abs().max().item())


def test_the_multiplier_of_the_moment_counts() -> None:
    chain, layers = build(casts=True)
    outputs = []
    for multiplier in (1.0, -1.0):
        for layer in layers:
            layer.multiplier = multiplier
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(chain(torch.ones(1, 1, WIDTH)))
    other, other_layers = build(casts=False)
    for layer in other_layers:
        layer.multiplier = -1.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = other(torch.ones(1, 1, WIDTH))

    assert torch.equal(outputs[1], expected)
    assert not torch.equal(*outputs)


def test_changed_weights_count_in_the_next_pass_however_they_were_changed() -> None:
    chain, layers = build(casts=True)
    step(chain, layers)
    for parameter in parameters_of(layers):
        parameter.data.mul_(2)  # unseen by the version of the tensor, as in a kernel of an 8-bit optimizer
        parameter.grad = None
    other, other_layers = build(casts=False)
    for parameter in parameters_of(other_layers):
        parameter.data.mul_(2)

    for one, expected in zip(step(chain, layers), step(other, other_layers), strict=True):
        assert torch.equal(one, expected)


def test_a_layer_that_a_pass_leaves_out_gets_no_gradient() -> None:
    chain, layers = build(casts=True)

    found = step(chain, layers, skips_second=True)

    assert len(found) == 3
    assert layers[1].lora_down.weight.grad is None


def test_dropout_draws_the_same_masks() -> None:
    results = []
    for casts in (False, True):
        chain, layers = build(casts=casts)
        for index, layer in enumerate(layers):
            layer.dropouts = Dropouts(neuron=0.3, rank=0.3)
            layer.index, layer.seed.value = index, 7
        results.append(step(chain, layers))

    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_without_autocast_the_layers_use_their_own_factors() -> None:
    x = torch.linspace(-1, 1, WIDTH).view(1, 1, WIDTH)
    chain, layers = build(casts=True)
    with torch.autocast("cpu", torch.bfloat16):
        chain(x)
    assert layers[0].cast_factors is not None

    found = chain(x)

    assert layers[0].cast_factors is None
    assert torch.equal(found, build(casts=False)[0](x))


class Kernels(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_no_factor_is_cast_by_itself() -> None:
    counts = []
    for casts in (False, True):
        with Kernels() as kernels:
            step(*build(casts=casts, checkpoints=True, joins=True))
        counts.append(kernels.counts)
    own, cast = counts

    # of two layers: two factors forward, those of the checkpointed one again, and four gradients
    assert own["aten::_to_copy"] - cast["aten::_to_copy"] == 4 + 2 + 4
    assert cast["aten::_foreach_copy_"] == 2
    assert own["aten::_foreach_copy_"] == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_compiled_blocks_share_one_compilation_in_all_steps() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        chain = nn.Sequential(Block(), Block(), Block()).requires_grad_(False)
        layers = [LoraLayer(block.linear, RANK, 2.0) for block in chain]
        for layer in layers:
            nn.init.normal_(layer.lora_up.weight)
            layer.attach()
        cast_before_pass(chain, layers)
        counter = CompileCounterWithBackend("aot_eager")
        for block in chain:
            forward = (
                torch.compile(block.forward, backend=counter, fullgraph=True) if compiles else block.forward
            )
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        x = torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH).requires_grad_()
        for _ in range(3):
            for parameter in parameters_of(layers):
                parameter.grad = None
            with torch.autocast("cpu", torch.bfloat16):
                out = chain(x)
            out.float().square().sum().backward()
        results.append([out, *(parameter.grad for parameter in parameters_of(layers))])
        # for all steps: the first block, whose input is in float32, and the others
        assert counter.frame_count == (2 if compiles else 0)

    for own, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, own, rtol=0, atol=2**-6 * own.abs().max().item())
