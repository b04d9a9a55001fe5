"""What the other tests of this folder measure with."""

import pytest
import torch

from modules.devices import make_deterministic
from tests.gpu.measuring import equal_bits, no_waits, poison, relative_error, settings_restored, wait_for


def test_a_relative_error_is_that_of_float64(device: torch.device) -> None:
    reference = torch.tensor([3.0, 4.0])
    ours = torch.tensor([3.0, 4.5], device=device)
    assert relative_error(ours, reference) == pytest.approx(0.1)
    with pytest.raises(AssertionError, match="finite"):
        relative_error(torch.tensor([float("nan"), 0.0], device=device), reference)
    with pytest.raises(AssertionError, match="shapes differ"):
        relative_error(ours[:1], reference)


def test_bits_are_compared_not_values(device: torch.device) -> None:
    zeros = torch.zeros(3)
    assert equal_bits(zeros.to(device), zeros)
    assert not equal_bits(-zeros.to(device), zeros)
    assert not equal_bits(zeros.to(device), zeros.double())
    nan = torch.full((3,), float("nan"))
    assert equal_bits(nan.to(device), nan)


def test_settings_are_put_back() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    state = torch.random.get_rng_state()
    with settings_restored():
        torch.backends.cudnn.benchmark = not before[0]
        torch.backends.cuda.matmul.allow_tf32 = not before[1]
        make_deterministic()
        torch.set_default_dtype(torch.float64)
        torch.rand(3)
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.gpu
def test_a_wait_for_the_gpu_raises(cuda: torch.device) -> None:
    numbers = torch.ones(3, device=cuda)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits(cuda):
        numbers.sum().item()
    with no_waits(cuda):
        numbers.add_(1)
    assert numbers.sum().item() == 6


@pytest.mark.gpu
def test_torch_gives_out_memory_that_was_poisoned(cuda: torch.device) -> None:
    poison(cuda, 1 << 24)
    wait_for(cuda)
    assert torch.empty(1 << 20, device=cuda).isnan().any()
