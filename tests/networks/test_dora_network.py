"""DoRA as a network: `--network_args dora_wd=True`."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.contract.loading import Placement
from modules.fp8.weights import attach, dequantise, quantise
from modules.speed_options import Quantisation
from networks.apply import LoraPatch
from networks.deltas import decompose, weight_delta
from networks.loading import LoraUse, read_lora
from networks.lora_layer import LoraLayer
from tests.tiny.loras import lora_like
from tests.training.toy import ToyFamily, same, train_toy, write_caches

DORA = ["--network_args", "dora_wd=True"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def random_layer(bias: bool = True, is_fp8: bool = False) -> tuple[nn.Linear, Tensor, LoraLayer]:
    """A layer, its weight as it counts, and a DoRA with random values."""
    torch.manual_seed(2)
    original = nn.Linear(16, 24, bias=bias).requires_grad_(False)
    weight = original.weight.detach().clone()
    if is_fp8:
        how = Quantisation(kind="rows")
        rounded, scale = quantise(weight, how)
        attach(original, rounded, scale, how)
        weight = dequantise(rounded, scale)
    layer = LoraLayer(original, 3, 1.5, decomposes=True)
    assert layer.dora_scale is not None
    nn.init.normal_(layer.lora_up.weight)
    layer.dora_scale.data *= 1 + 0.3 * torch.rand(24, 1)
    return original, weight, layer


@pytest.mark.parametrize(
    ("bias", "is_fp8"), [(True, False), (False, False), (True, True)], ids=["bias", "plain", "fp8"]
)
def test_the_output_is_that_of_the_weight_that_generation_makes(bias: bool, is_fp8: bool) -> None:
    original, weight, layer = random_layer(bias, is_fp8)
    x = torch.randn(2, 5, 16)
    factors = layer.state_dict()
    assert factors.keys() == {"alpha", "lora_down.weight", "lora_up.weight", "dora_scale"}
    delta = weight_delta(factors, CPU)
    assert delta is not None
    merged = weight + 0.5 * decompose(weight, delta, factors["dora_scale"])
    layer.multiplier = 0.5
    layer.attach()

    with torch.no_grad():
        found = original(x)
    torch.testing.assert_close(found, nn.functional.linear(x, merged, original.bias), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_with_the_norm_as_a_constant() -> None:
    original, weight, layer = random_layer()
    x, seen = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 24)
    layer.attach()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad((original(x) * seen).sum(), leaves)

    whole = weight + layer.scale * layer.lora_up.weight @ layer.lora_down.weight
    norm = torch.linalg.vector_norm(whole.detach(), dim=1, keepdim=True)
    assert layer.dora_scale is not None
    out = nn.functional.linear(x, layer.dora_scale * whole / norm, original.bias)
    for mine, theirs in zip(found, torch.autograd.grad((out * seen).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_was_trained_is_what_generation_adds(tmp_path: Path) -> None:
    write_caches(tmp_path)
    tensors = train_toy(tmp_path, *DORA, "--max_train_steps", 4)
    path = tmp_path / "output" / "x.safetensors"
    patch = LoraPatch([LoraUse(read_lora(path))])
    merged = ToyFamily().load_dit(Placement(CPU, patch=patch))
    patch.check()
    dit = ToyFamily().load_dit(Placement(CPU))
    network = lora_like("lora", read_lora(path).tensors, dit)
    network.attach()
    assert network.load_weights(path) == []
    assert same(network.state_dict(), tensors)
    x = torch.randn(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]

    with torch.no_grad():
        torch.testing.assert_close(dit(*x), merged(*x), rtol=1e-4, atol=1e-5)
    start = ToyFamily().load_dit(Placement(CPU)).state_dict()["blocks.0.up.weight"]
    learned = tensors["lora_unet_blocks_0_up.dora_scale"]
    assert not torch.allclose(learned.flatten(), torch.linalg.vector_norm(start, dim=1))


@pytest.mark.parametrize(
    "how",
    [
        ["--gradient_checkpointing", "--blocks_to_swap", 1],
        ["--blocks_to_swap", 1],
        ["--compile", "--compile_args", "eager", "default", "auto", "true"],
    ],
    ids=["checkpointed and swapped", "swapped", "compiled"],
)
def test_dressing_changes_no_bit(tmp_path: Path, how: list[object]) -> None:
    write_caches(tmp_path)
    expected = train_toy(tmp_path, *DORA)

    assert same(train_toy(tmp_path, *DORA, *how), expected)


def test_it_resumes_with_lora_plus_dropout_and_autocast(tmp_path: Path) -> None:
    write_caches(tmp_path)
    usual = [*DORA, "loraplus_lr_ratio=4", "rank_dropout=0.2", "module_dropout=0.2"]
    usual += ["--mixed_precision", "bf16", "--scale_weight_norms", "0.5"]
    expected = train_toy(tmp_path, *usual)
    train_toy(tmp_path, *usual, "--max_train_steps", 4, "--save_state")

    assert same(train_toy(tmp_path, *usual, "--resume", "latest"), expected)
    path = tmp_path / "output" / "x.safetensors"
    still = ["--mixed_precision", "bf16", "--learning_rate", 0, "--max_train_steps", 1]
    wanted = load_file(path)
    found = train_toy(tmp_path, *still, "--network_weights", path, "--dim_from_weights")
    assert same(found, wanted)
