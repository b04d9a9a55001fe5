"""LoRAs of modules with a common input: which modules those are, and that results are those of each alone."""

import re
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from networks.adjacent_weights import join_weights, view_as_one_matrix
from networks.cast_factors import cast_before_pass, group_layers, join_groups
from networks.lora_layer import Dropouts, LoraLayer
from tests.networks.test_cast_factors import Kernels
from tests.tiny.dits import DITS, TinyDit

WIDTH, RANK = 16, 4
SHARED = (("q", "k", "v"),)


@pytest.mark.parametrize("tiny", DITS, ids=lambda tiny: tiny.name)
def test_a_family_names_the_modules_that_get_the_same_tensor(tiny: TinyDit) -> None:
    dit, network = tiny.with_lora(blocks=1)
    layers = network.dit_layers()
    paths = {id(module): path for path, module in dit.named_modules()}
    groups = group_layers(dit, layers, tiny.spec.shared_inputs)
    expected = {frozenset(paths[id(layer.original)] for layer in group) for group in groups}
    inputs: list[tuple[Tensor, str]] = []  # tensors, kept so that no id is used twice
    for layer in layers:
        layer.original.forward = _noting(layer, paths[id(layer.original)], inputs)

    with torch.no_grad():
        dit.eval()(**tiny.inputs((2, 4, 4, 5), 1))

    # modulations of several blocks may get one tensor too, but a LoRA's group lies within a block, which is
    # recomputed by itself
    by_tensor: dict[tuple[int, str], set[str]] = defaultdict(set)
    for tensor, path in inputs:
        by_tensor[id(tensor), _block_of(path)].add(path)
    found = {frozenset(each) for each in by_tensor.values()}
    used = {path for each in found for path in each}
    assert found == {each for each in expected if each <= used}


def _block_of(path: str) -> str:
    """Return the path of a module's block, up to its number in the list; '' outside of blocks."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found.group() if found else ""


def _noting(layer: LoraLayer, path: str, inputs: list[tuple[Tensor, str]]) -> Any:
    def forward(x: Tensor) -> Tensor:
        inputs.append((x, path))
        return layer(x)

    return forward


class Attention(nn.Module):
    """Linear layers for q, k and v of one tensor."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        for name in "qkv":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.checkpoints = checkpoints

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = (getattr(self, name)(x) for name in "qkv")
        return torch.softmax(query @ key.mT, -1) @ value

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False) if self.checkpoints else self.attend(x)


class Model(nn.Module):
    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.block = Attention(checkpoints)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def build(shares: bool, checkpoints: bool = False, joins: bool = False) -> tuple[Model, list[LoraLayer]]:
    """Return a model with LoRAs."""
    torch.manual_seed(0)
    model = Model(checkpoints).requires_grad_(False)
    layers = []
    for module in model.block.children():
        assert isinstance(module, nn.Linear)
        layer = LoraLayer(module, RANK, 2.0)
        nn.init.normal_(layer.lora_up.weight)
        layer.min_in_place_numel = 0 if joins else 1 << 60
        layer.attach()
        layers.append(layer)
    cast_before_pass(model, layers, SHARED if shares else ())
    return model, layers


def step(model: Model, layers: list[LoraLayer], dtype: torch.dtype) -> list[Tensor]:
    """Return the output of a pass in bf16, and the gradients of the input and of all factors."""
    x = torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    factors = [factor for layer in layers for factor in layer.parameters()]
    return [out, *(each.grad for each in (x, *factors) if each.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_results_are_those_of_layers_apart(checkpoints: bool, joins: bool, dtype: torch.dtype) -> None:
    apart = step(*build(False, checkpoints, joins), dtype)
    together = step(*build(True, checkpoints, joins), dtype)

    assert len(apart) == len(together) == 2 + 6
    for one, other in zip(apart, together, strict=True):
        # the gradient of the input is a sum of six products, which is rounded to 8 bits at other places
        torch.testing.assert_close(other, one, rtol=0, atol=2**-6 * one.abs().max().item())


@pytest.mark.parametrize("checkpoints", [False, True])
def test_outputs_of_plain_layers_are_those_of_layers_apart(checkpoints: bool) -> None:
    results, counts = [], []
    for shares in (False, True):
        model, layers = build(shares, checkpoints, joins=True)
        model.to(torch.bfloat16)
        with Kernels() as kernels:
            results.append(step(model, layers, torch.float32))
        counts.append(kernels.counts)
    apart, together = counts

    for one, other in zip(*results, strict=True):
        # sums of products are rounded to 8 bits once, not after each product
        torch.testing.assert_close(other, one, rtol=0, atol=2**-6 * one.abs().max().item())
    # gradients of the input of q, k and v are added by the products themselves
    assert apart["aten::add.Tensor"] - together["aten::add.Tensor"] == 2
    assert together["aten::cat"] == 1  # the gradients of the up factors, whose copies are one matrix


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("widths", [(WIDTH, WIDTH, WIDTH), (WIDTH, 8, 8)], ids=["equal", "grouped heads"])
def test_outputs_of_joined_weights_are_those_of_each(checkpoints: bool, widths: tuple[int, ...]) -> None:
    results, counts = [], []
    for joins in (False, True):
        torch.manual_seed(0)
        model = Model(checkpoints)
        for name, width in zip("qkv", widths, strict=True):
            model.block.add_module(name, nn.Linear(WIDTH, width))
        model.block.attend = lambda x, block=model.block: torch.cat(  # type: ignore[method-assign]
            [block.q(x), block.k(x).square(), block.v(x)], -1
        )
        model.to(torch.bfloat16).requires_grad_(False)
        layers = [LoraLayer(module, RANK, 2.0) for module in model.block.children()]  # type: ignore[arg-type]
        for layer in layers:
            nn.init.normal_(layer.lora_up.weight)
            layer.attach()
        if joins:
            join_groups([layers])
        cast_before_pass(model, layers, SHARED)
        with Kernels() as kernels:
            results.append(step(model, layers, torch.float32))
        counts.append(kernels.counts)

    for one, other in zip(*results, strict=True):
        # the gradient of the input is one product, not a sum of three, each rounded to 8 bits
        torch.testing.assert_close(other, one, rtol=0, atol=2**-6 * one.abs().max().item())
    assert counts[1].total() < counts[0].total()


def test_joined_weights_are_found_until_one_is_replaced() -> None:
    modules = [nn.Linear(WIDTH, height).bfloat16().requires_grad_(False) for height in (4, 8)]
    values = [module.weight.clone() for module in modules]
    weights = [module.weight for module in modules]
    assert view_as_one_matrix(weights) is None

    join_weights(modules, torch.device("cpu"))

    for module, value in zip(modules, values, strict=True):
        assert torch.equal(module.weight, value)
    together = view_as_one_matrix(weights)
    assert together is not None
    assert torch.equal(together, torch.cat(values))
    modules[1].weight.data = values[1]  # as block swap does
    assert view_as_one_matrix(weights) is None


@pytest.mark.parametrize("other", ["trained", "half with bias", "part of a piece of memory", "float32"])
def test_weights_that_cannot_be_joined_stay(other: str) -> None:
    modules = [nn.Linear(WIDTH, WIDTH).bfloat16().requires_grad_(False) for _ in range(2)]
    if other == "trained":
        modules[0].weight.requires_grad_()
    elif other == "half with bias":
        modules[0].bias = None  # type: ignore[assignment]
    elif other == "part of a piece of memory":
        modules[0].weight.data = torch.zeros(2 * WIDTH, WIDTH, dtype=torch.bfloat16)[:WIDTH]
    else:
        modules[0].float()
    addresses = [module.weight.data_ptr() for module in modules]

    join_weights(modules, torch.device("cpu"))

    assert [module.weight.data_ptr() for module in modules] == addresses


def test_layers_of_which_one_is_not_reached_have_a_gradient_of_zero_of_it() -> None:
    model, layers = build(True)
    model.to(torch.bfloat16)
    model.block.attend = lambda x: model.block.q(x) + model.block.k(x)  # type: ignore[method-assign]

    step(model, layers, torch.float32)

    assert layers[0].lora_up.weight.grad is not None
    for factor in layers[2].parameters():
        assert factor.grad is not None
        assert not factor.grad.any()


def test_nothing_is_held_after_a_pass() -> None:
    model, layers = build(True, checkpoints=True)

    step(model, layers, torch.float32)

    shared = layers[0].shared_input
    assert shared is not None
    assert all(layer.shared_input is shared for layer in layers)
    assert [
        value
        for name, value in {**vars(shared), **vars(shared._state)}.items()
        if name not in ("layers", "ranks", "down", "ups", "stacked_up", "computes_outputs", "_state")
        and value
    ] == []


def test_products_of_the_input_are_made_once() -> None:
    counts = []
    for shares in (False, True):
        built = build(shares, checkpoints=True, joins=True)
        with Kernels() as kernels:
            step(*built, torch.float32)
        counts.append(kernels.counts)
    apart, together = counts

    # of three layers two less: down factors, twice because of the checkpoint, and their gradients
    assert apart["aten::mm"] - together["aten::mm"] == 2 * 2 + 2
    assert apart["aten::addmm_"] - together["aten::addmm_"] == 2  # to the gradient of the input
    assert apart["aten::_to_copy"] - together["aten::_to_copy"] == 3 * 2  # of the input, and of its gradient


def test_layers_with_dropouts_stay_apart() -> None:
    model, layers = build(True)
    layers[1].dropouts = Dropouts(module=0.5)

    groups = group_layers(model, layers, SHARED)

    assert groups == [[layers[0], layers[2]], [layers[1]]]


def test_compiled_blocks_give_the_same_without_sharing() -> None:
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model, layers = build(True, checkpoints=False)
        if compiles:
            model.block.forward = torch.compile(model.block.forward, backend="aot_eager", fullgraph=True)
        results.append(step(model, layers, torch.bfloat16))

    assert len(results[1]) == 2 + 6
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=2**-6 * eager.abs().max().item())


def test_tensors_of_a_plan_are_compared_without_a_warning() -> None:
    """They have no memory whose address could be asked for."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = torch.empty(6, 4)
        assert view_as_one_matrix(whole.split(2)) is not None
        assert view_as_one_matrix([torch.empty(2, 4), torch.empty(2, 4)]) is None
