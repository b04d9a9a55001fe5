"""LoRA products that add to the tensors of the frozen layer: values, gradients, memory that others use."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints.stored.forms import attach
from checkpoints.stored.fp8 import Fp8
from modules.speed_options import Quantization
from networks.lora_layer import Dropouts, LoraLayer
from networks.lora_products import add_up, project_in_place_gradient, save_for_add_up
from networks.train.dora import extend
from tests.fp8_reference import emulated_product
from tests.networks.making import join_all, randomize

Inputs = tuple[Tensor, ...]


def factors(dtype: torch.dtype = torch.float64) -> Inputs:
    """x 2 5 8, frozen weight 12 x 8 and its bias, down 4 x 8, up 12 x 4."""
    torch.manual_seed(0)
    shapes = ((2, 5, 8), (12, 8), (12,), (4, 8), (12, 4))
    x, weight, bias, down, up = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    return x.requires_grad_(), weight, bias, down.requires_grad_(), up.requires_grad_()


def test_layers_that_share_their_input_leave_each_others_gradients_alone() -> None:
    x, weight, bias, down, up = factors()

    def joined(x: Tensor) -> Tensor:
        seen, hidden = project_in_place_gradient(x, down)
        held = save_for_add_up(hidden, up, ())
        return add_up(functional.linear(seen, weight, bias), hidden, up, (), held)

    def separate(x: Tensor) -> Tensor:
        return functional.linear(x, weight, bias) + functional.linear(functional.linear(x, down), up)

    def gradients(one: Callable[[Tensor], Tensor]) -> Inputs:
        out = one(x)
        out = out + one(out[..., :8]) + one(x).square() + x.sum()
        weights = torch.arange(out.numel()).view(out.shape)
        return torch.autograd.grad((out * weights).sum(), [x, down, up])

    torch.testing.assert_close(gradients(joined), gradients(separate))


def test_an_input_without_gradient_costs_no_product_with_the_frozen_weight() -> None:
    x, weight, bias, down, up = factors()
    seen, hidden = project_in_place_gradient(x.detach(), down)

    assert not seen.requires_grad
    assert hidden.requires_grad


def test_an_output_that_is_needed_again_is_refused_rather_than_wrong() -> None:
    x, weight, bias, down, up = factors()
    seen, hidden = project_in_place_gradient(x, down)
    out = functional.linear(seen, weight, bias).exp()  # keeps its result for the backward pass

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        add_up(out, hidden, up, (), save_for_add_up(hidden, up)).sum().backward()


def test_sums_are_rounded_once() -> None:
    x, weight, bias, down, up = (one.detach().bfloat16() for one in factors(torch.float32))
    out, hidden = functional.linear(x, weight, bias), functional.linear(x, down)
    exact = out.float() + hidden.float() @ up.float().T

    assert torch.equal(add_up(out, hidden, up, (), None), exact.bfloat16())


@pytest.mark.parametrize("kind", ["float32", "bf16", "autocast", "fp8", "fp8 products"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_layer_is_its_frozen_weight_plus_the_product_of_its_factors(kind: str, recomputes: bool) -> None:
    torch.manual_seed(1)
    original = nn.Linear(32, 48)
    if kind in {"bf16", "autocast"}:
        original.bfloat16()
    original.requires_grad_(False)
    if kind.startswith("fp8"):
        product = emulated_product if kind == "fp8 products" else None
        quantization = Quantization("rows", fp8_matmul=product is not None, product=product)
        attach(original, Fp8(quantization).quantize(original.weight))
    layer = LoraLayer(original, 4, 2.0)
    layer.min_in_place_numel = 0
    nn.init.normal_(layer.lora_up.weight)
    plain = original.forward
    layer.attach()
    x = torch.randn(2, 24, 32, dtype=torch.bfloat16 if kind == "bf16" else torch.float32, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            return checkpoint(original, x, use_reentrant=False) if recomputes else original(x)

    def expected() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            added = layer.lora_up(layer.lora_down(x if kind == "autocast" else x.float()) * 0.5)
            out = plain(x)
            return out + added.to(out.dtype)

    parameters = [x, layer.lora_down.weight, layer.lora_up.weight]
    weights = torch.randn(2, 24, 48)
    ours, theirs = run(), expected()
    tolerance = 2e-2 if kind in {"bf16", "autocast"} else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), parameters),
        torch.autograd.grad((theirs * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


KINDS = [
    "one",
    "two on a layer",
    "two, one without",
    "multiplier",
    "neuron",
    "rank",
    "module",
    "parts",
    "noise",
    "dora",
]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_else_a_layer_does_is_done_in_place_too(kind: str, recomputes: bool) -> None:
    torch.manual_seed(2)
    original = nn.Linear(16, 24).requires_grad_(False)
    split_sizes = (8, 10, 6) if kind == "parts" else ()
    count = 2 if kind.startswith("two") else 1
    loras = nn.ModuleList(LoraLayer(original, 4, 2.0, split_sizes) for _ in range(count))
    if kind == "dora":
        for layer in loras:
            assert isinstance(layer, LoraLayer)
            extend(layer)
    randomize(loras)
    strengths = nn.Module()
    strengths.register_buffer("noise", torch.rand(24))
    for lora in loras:
        assert isinstance(lora, LoraLayer)
        lora.attach()
        lora.multiplier = 0.5 if kind == "multiplier" else 1.0
        lora.ggpo_noise_buffer = (strengths, "noise") if kind == "noise" else None
        shares = {kind: 0.4} if kind in {"neuron", "rank"} else {"module": 1.0 if kind == "module" else 0.0}
        lora.dropouts, lora.index = Dropouts(**shares), 3
        lora.seed.value = 5
    if kind == "two, one without":
        loras[1].multiplier = 0  # type: ignore[assignment]
    x = torch.randn(3, 20, 16).transpose(0, 1).requires_grad_()  # in memory in another order
    weights = torch.randn(20, 3, 24)

    def results() -> Inputs:
        out = checkpoint(original, x, use_reentrant=False) if recomputes else original(x)
        loss = (out * weights).sum() + (x * 3).sum()
        found = torch.autograd.grad(loss, [x, *loras.parameters()], materialize_grads=True)
        with torch.inference_mode():
            return out.detach(), original(x), *found

    apart = results()
    join_all(loras)

    torch.testing.assert_close(results(), apart, rtol=1e-5, atol=1e-5)
    assert (kind == "module") == torch.equal(apart[1], functional.linear(x, original.weight, original.bias))


def test_a_gradient_that_only_one_of_both_ways_has_goes_on() -> None:
    x, _, _, down, _ = factors()
    for way, expected in enumerate((torch.ones(8).to(x), down.sum(0))):
        (of_x,) = torch.autograd.grad(project_in_place_gradient(x, down)[way].sum(), x)
        torch.testing.assert_close(of_x, expected.expand_as(x))


class Counted(nn.Linear):
    """A linear layer that counts its products."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.count += 1
        return out


def test_recomputation_leaves_out_the_product_of_the_last_frozen_layer() -> None:
    torch.manual_seed(0)
    layers = [Counted(16, 16).requires_grad_(False) for _ in range(2)]
    loras = nn.ModuleList(LoraLayer(layer, 2, 2.0) for layer in layers)
    for lora in loras:
        assert isinstance(lora, LoraLayer)
        nn.init.normal_(lora.get_parameter("lora_up.weight"))
        lora.attach()
    join_all(loras)
    block = nn.Sequential(layers[0], nn.GELU(), layers[1])
    x = torch.randn(3, 16, requires_grad=True)
    inputs = [x, *loras.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    found = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), inputs)

    assert [layer.count for layer in layers] == [3, 2]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
