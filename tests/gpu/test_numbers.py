"""Norms, rotary turns, embeddings and whole tiny transformers on a device against float64 on the CPU."""

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.layers.norms import Float32LayerNorm, rms_norm
from modules.layers.rope import CPU, TABLES, exact_table, rotate, sinusoid
from tests.gpu.measuring import equal_bits, relative_error, sent
from tests.tiny.dits import DITS, TinyDit, gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error of a result rounded once to that dtype; float32 with some steps
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EACH = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EACH
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(2, 77, 5120), (1, 333, 40, 128)], ids=str)
def test_rms_norm_and_its_gradients(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, autocast: bool
) -> None:
    x, weight = drawn(*shape, dtype=dtype) * 3, drawn(shape[-1], seed=1)
    upstream = drawn(*shape, seed=2, dtype=dtype)
    ours, scale = x.to(device).detach().requires_grad_(), weight.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        found = rms_norm(ours, scale, 1e-6)
    found.backward(upstream.to(device))

    exact = x.double().requires_grad_()
    rounded = weight.to(dtype).double()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * rounded
    expected.backward(upstream.double())
    assert found.dtype == dtype
    assert relative_error(found, expected) < ROUNDED[dtype]
    assert ours.grad is not None
    assert exact.grad is not None
    assert relative_error(ours.grad, exact.grad) < 3 * ROUNDED[dtype]


@EACH
def test_layer_norm_is_computed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    x, upstream = drawn(2, 77, 1536, dtype=dtype) * 3 + 1, drawn(2, 77, 1536, seed=2)
    ours = x.to(device).detach().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = Float32LayerNorm(1536, 1e-6)(ours)
    found.backward(upstream.to(device))

    exact = x.double().requires_grad_()
    expected = functional.layer_norm(exact, (1536,), eps=1e-6)
    expected.backward(upstream.double())
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-6
    assert ours.grad is not None
    assert exact.grad is not None
    assert relative_error(ours.grad, exact.grad) < max(1e-6, ROUNDED[dtype])


@EACH
@pytest.mark.parametrize("kind", TABLES)
def test_rotary_turns_and_their_gradient(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    sizes, widths = (5, 6, 9), (44, 42, 42)
    table = TABLES[kind](sizes, widths, device=device)
    assert equal_bits(table, TABLES[kind](sizes, widths, device=CPU))  # angles are made on the host
    x, upstream = drawn(2, 270, 3, 128, dtype=dtype), drawn(2, 270, 3, 128, seed=2, dtype=dtype)
    ours = x.to(device).detach().requires_grad_()
    found = rotate(ours, table)
    found.backward(upstream.to(device))

    angles = torch.view_as_complex(exact_table(sizes, widths).double())
    turned, back = (
        torch.view_as_real(torch.view_as_complex(each.double().unflatten(-1, (-1, 2))) * factor).flatten(-2)
        for each, factor in ((x, angles), (upstream, angles.conj()))
    )
    assert found.dtype == dtype
    assert relative_error(found, turned) < max(ROUNDED[dtype], 2e-6)
    assert ours.grad is not None
    assert relative_error(ours.grad, back) < max(ROUNDED[dtype], 2e-6)


def test_embeddings_of_timesteps(device: torch.device) -> None:
    numbers = torch.tensor([0.0, 1.0, 333.25, 999.5, 6000.0])
    half = torch.arange(128, dtype=torch.float64) / 128
    angles = numbers.double()[:, None] * 10000.0**-half
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    found = sinusoid(numbers.to(device), 256)
    assert found.device.type == device.type
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tiny", DITS, ids=lambda tiny: tiny.name)
def test_transformers_and_their_gradients_are_those_of_the_cpu(
    cuda: torch.device, tiny: TinyDit, autocast: bool
) -> None:
    """Of a LoRA's gradients as one vector; in bf16 some dozens of roundings add up."""
    inputs, results = tiny.inputs((2, 6, 8, 11), 2), []
    for where in (CPU, cuda):
        dit, network = tiny.with_lora(blocks=2)
        velocity, grown = gradients(
            dit.to(where).train(), network.to(where), sent(inputs, where), autocast=autocast and where == cuda
        )
        results.append((velocity, torch.cat([one.flatten() for one in grown])))
    (velocity, grown), (found, found_grown) = results
    assert relative_error(found, velocity) < (0.03 if autocast else 1e-4)
    assert relative_error(found_grown, grown) < (0.06 if autocast else 1e-3)
