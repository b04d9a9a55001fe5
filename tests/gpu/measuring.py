"""What tests on a device compare, watch and reset; on a CPU the same calls do nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from modules.devices import free_memory, select_device, send

NONSENSE = 255  # in every byte: not a number in all floating types


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Return ||ours - reference|| / ||reference||, computed in float64 on the CPU.

    Raises AssertionError if the shapes differ or a value of ours is NaN or infinite.
    """
    assert ours.shape == reference.shape, f"shapes differ: {tuple(ours.shape)}, {tuple(reference.shape)}"
    mine, theirs = (each.detach().to("cpu", torch.float64) for each in (ours, reference))
    assert torch.isfinite(mine).all(), "not all values are finite"
    scale = theirs.norm()
    return float((mine - theirs).norm() / (scale if scale > 0 else 1.0))


def equal_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether shape, dtype and all bytes are equal, wherever the two are; NaN of equal bits are equal."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    mine, other = (each.detach().cpu().contiguous().view(-1).view(torch.uint8) for each in (ours, theirs))
    return torch.equal(mine, other)


def sent(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a network's inputs as a run gives them: floats on the device, whole numbers on the host."""
    return tree_map_only(Tensor, lambda tensor: send(tensor, device), inputs)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError inside if the host waits for a CUDA device.

    torch sees copies to the host, reads of single values, and operations whose result's size the host must
    know. It does not see events and streams that are waited for by name, nor memory that is pinned.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def poison(device: torch.device, size_bytes: int) -> None:
    """Fill so many bytes of unused device memory, in pieces of several sizes, with NaN.

    A tensor that is read before it is written then shows: torch gives such memory out again as it is.
    """
    sizes = [size_bytes // 2, size_bytes // 4, *[size_bytes // 64] * 16]
    pieces = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    for piece in pieces:
        piece.fill_(NONSENSE)


def peak_of(device: torch.device, call: Callable[[], Any]) -> tuple[Any, int, int]:
    """Call; return its result, and by how many bytes CUDA held more at the peak, and holds more now."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return result, peak - before, torch.cuda.memory_allocated(device) - before


def release_cuda() -> None:
    """Wait for the current CUDA device, release all memory that nothing holds, count its peak anew."""
    torch.cuda.synchronize()
    free_memory(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()


# settings that a process has once: where, and the name
_SETTINGS: tuple[tuple[Any, str], ...] = (
    (torch.backends.cudnn, "enabled"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
)


@contextmanager
def settings_restored() -> Iterator[None]:
    """Put back torch's settings, its default dtype, its random states and the current CUDA device."""
    with ExitStack() as stack:
        for owner, name in _SETTINGS:
            stack.callback(setattr, owner, name, getattr(owner, name))
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        has_cuda = torch.cuda.is_available()
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count() if has_cuda else 0)))
        if has_cuda:
            stack.callback(torch.cuda.set_device, torch.cuda.current_device())
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
        yield


@contextmanager
def chosen(name: str) -> Iterator[torch.device]:
    """Return a device as a run chooses it. What is changed in torch's settings inside is changed back."""
    with settings_restored():
        where = select_device(name)
        if where.type == "cuda":
            release_cuda()
        yield where
        if where.type == "cuda":
            release_cuda()
