"""Measure a device's peak rates in the same run as the rates that are compared with them."""

import statistics
from collections.abc import Callable

import torch

SIDE = 8192  # rows and columns of the matrices
COPIED = 1 << 30  # bytes to upload; a device copies eight times as many, more than its caches hold


def matmul_peak(dtype: torch.dtype = torch.bfloat16, side: int = SIDE) -> float:
    """Return operations per second of a square product of random matrices on the current CUDA device."""
    left, right = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: left @ right)


def upload_peak(size: int = COPIED) -> float:
    """Return bytes per second from pinned host memory to the current CUDA device."""
    host, device = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    return size / seconds_of(lambda: device.copy_(host, non_blocking=True))


def copy_peak(size: int = 8 * COPIED) -> float:
    """Return the bytes per second that a copy on the current CUDA device reads and writes, counting both."""
    source, target = (torch.empty(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_(0, 256)
    return size / seconds_of(lambda: target.copy_(source))


def seconds_of(call: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
    """Return the median time of a call on the current CUDA device, by the device's clock."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
