"""Short probes of a GPU, each done in seconds: what a kernel does, not how long a run takes.

The open question is cuDNN's attention. On an H100 (torch 2.11) the gradients of two samples of 754 tokens in
one call were NaN, those of one sample never; since then `modules.attention.sdpa` gives cuDNN one sample at a
time if there are gradients. That fix has not run on a GPU yet. To be tried:

1. `cudnn_batches`: for which lengths and batches are gradients NaN? If for none, torch or cuDNN has fixed it,
and the loop over samples can end at that version. If only for lengths that are not a multiple of 64 or 128,
only those need it. 2. `cudnn_one_by_one`: are results finite and right with the fix for all of these? If not,
cuDNN has to leave `kernels` if there are gradients. 3. `cudnn_loop_cost`: what does the loop cost at 4 x
4,096 tokens, against one call and FlashAttention? If it costs more than FlashAttention does, batches should
use that. 4. `torch_own_choice`: which kernel does torch itself select for a batch, as diffusers' processors
would use it? The U-Nets of Stable Diffusion do not use those on CUDA for this reason.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ceilings
from modules.attention.attend import attend
from modules.devices import select_device
from protocols.loading import TensorInfo
from runtime.offload.host_memory import allocate

LENGTHS = (8, 77, 128, 500, 704, 754, 1024)
BATCHES = (1, 2, 3)
HEADS, WIDTH = 2, 64
Figures = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """A short measurement: its name, its estimated seconds, and a function from a device to figures."""

    name: str
    seconds: float
    ask: Callable[[torch.device], Figures]


def run_probe(probe: Probe, device: str) -> Figures:
    """Return the figures of a probe with its seconds, or the reason if it failed."""
    begun = time.monotonic()
    try:
        found = probe.ask(select_device(device))
    except Exception as error:  # of any kernel
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**found, "took": round(time.monotonic() - begun, 1)}


def draw_inputs(device: torch.device, batch: int, length: int) -> list[Tensor]:
    """Return query, key, value and a gradient of the result, B N L D in bf16 each, of a fixed seed."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, HEADS, length, WIDTH)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4)]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # B N L D -> B N L D


def worst_error(attention: Attention, inputs: list[Tensor]) -> float:
    """Return the largest relative error of result and gradients against float32; NaN if a value is NaN."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        *sources, gradient = (tensor.detach().to(dtype) for tensor in inputs)
        for source in sources:
            source.requires_grad_()
        if dtype == torch.float32:
            with sdpa_kernel(SDPBackend.MATH):
                output = functional.scaled_dot_product_attention(*sources)
        else:
            output = attention(*sources)
        results.append([output.detach(), *torch.autograd.grad(output, sources, gradient)])
    errors = [
        ((found.float() - exact).norm() / exact.norm()).item() for found, exact in zip(*results, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def with_kernel(kernel: SDPBackend) -> Attention:
    """Return attention with a single kernel of torch."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return functional.scaled_dot_product_attention(query, key, value)

    return attention


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention as every family does."""
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attend(*swapped).transpose(1, 2)


def _measure_errors(attention: Attention, device: torch.device) -> Figures:
    """Return which sizes give NaN, and the largest error of all others."""
    wrong, errors = [], [0.0]
    for length in LENGTHS if device.type == "cuda" else LENGTHS[:2]:
        for batch in BATCHES:
            error = worst_error(attention, draw_inputs(device, batch, length))
            if error != error:
                wrong.append(f"{batch} x {length}")
            else:
                errors.append(error)
    return {"nan": wrong, "worst": round(max(errors), 5)}


def cudnn_batches(device: torch.device) -> Figures:
    """Find the batches and lengths for which cuDNN's gradients are NaN, with the versions."""
    kernel = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    return {**versions, **_measure_errors(with_kernel(kernel), device)}


def cudnn_one_by_one(device: torch.device) -> Figures:
    """Find the same for attention as the families use it."""
    return _measure_errors(ours, device)


def cudnn_loop_cost(device: torch.device) -> Figures:
    """Measure the milliseconds of forward and backward: looped, in one call, with FlashAttention."""
    is_cuda = device.type == "cuda"
    length = 4096 if is_cuda else 64
    inputs = draw_inputs(device, 4, length)
    *sources, gradient = inputs
    for source in sources:
        source.requires_grad_()

    def milliseconds(attention: Attention) -> float:
        def call() -> None:
            torch.autograd.grad(attention(*sources), sources, gradient)

        return round(1000 * seconds_of(call, device), 3)

    math = SDPBackend.MATH
    return {
        "looped": milliseconds(ours),
        "one call": milliseconds(with_kernel(SDPBackend.CUDNN_ATTENTION if is_cuda else math)),
        "flash": milliseconds(with_kernel(SDPBackend.FLASH_ATTENTION if is_cuda else math)),
    }


def torch_own_choice(device: torch.device) -> Figures:
    """Find which operators torch itself selects for two samples with gradients."""
    *sources, gradient = draw_inputs(device, 2, 754)
    for source in sources:
        source.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = functional.scaled_dot_product_attention(*sources)
        gradients = torch.autograd.grad(output, sources, gradient)
    names = sorted({event.key for event in profile.key_averages() if "attention" in event.key})
    return {"operators": names, "finite": all(bool(each.isfinite().all()) for each in gradients)}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call."""
    if device.type == "cuda":
        return ceilings.seconds_of(call, repeats=5, warm_up=2)
    call()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def overlapping_copies(device: torch.device) -> Figures:
    """Measure the milliseconds of products alone, copies from pinned memory alone, and both at once."""
    is_cuda = device.type == "cuda"
    side, size = (8192, 1 << 29) if is_cuda else (64, 1 << 12)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device) if is_cuda else None

    def compute() -> None:
        for _ in range(8):
            left @ left

    def copy() -> None:
        target.copy_(host, non_blocking=True)

    def both() -> None:
        if stream is None:
            copy()
            compute()
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy()
        compute()
        torch.cuda.current_stream(device).wait_stream(stream)

    alone, copied, together = (1000 * seconds_of(call, device) for call in (compute, copy, both))
    hidden = (alone + copied - together) / min(alone, copied)
    return {
        "products": round(alone, 2),
        "copies": round(copied, 2),
        "both": round(together, 2),
        "hidden": round(hidden, 2),
    }


def page_locked(device: torch.device) -> Figures:
    """Measure how fast host memory is page-locked in the pieces of block swap, and whether all of it is."""
    is_cuda = device.type == "cuda"
    size = (8 << 30) if is_cuda else (1 << 20)
    infos = {f"block {number}": TensorInfo(torch.uint8, (size // 8,)) for number in range(8)}
    begun = time.perf_counter()
    held = allocate(infos, pinned=is_cuda)
    seconds = time.perf_counter() - begun
    return {"GB": size / 1e9, "GB a second": round(size / 1e9 / seconds, 2), "unlocked": held.unpinned_bytes}


def product_peaks(device: torch.device) -> Figures:
    """Measure the TFLOP/s of square products in bf16, fp8 and int8, which bound the gain of small forms."""
    is_cuda = device.type == "cuda"
    side, count = (8192, 2 * 8192**3) if is_cuda else (64, 2 * 64**3)
    wide = [torch.randn(side, side, device=device) for _ in range(2)]
    bf16 = [each.bfloat16() for each in wide]
    int8 = [each.mul(40).clamp(-127, 127).to(torch.int8) for each in wide]
    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: bf16[0] @ bf16[1],
        "int8": lambda: torch._int_mm(int8[0], int8[1]),
    }
    if is_cuda:
        fp8 = [each.to(torch.float8_e4m3fn) for each in wide]
        one = torch.ones((), device=device)
        calls["fp8"] = lambda: torch._scaled_mm(
            fp8[0], fp8[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return {name: round(count / seconds_of(call, device) / 1e12, 3) for name, call in calls.items()}


PROBES = (
    Probe("cudnn_batches", 6, cudnn_batches),
    Probe("cudnn_one_by_one", 5, cudnn_one_by_one),
    Probe("cudnn_loop_cost", 3, cudnn_loop_cost),
    Probe("torch_own_choice", 2, torch_own_choice),
    Probe("overlapping_copies", 3, overlapping_copies),
    Probe("page_locked", 8, page_locked),
    Probe("product_peaks", 3, product_peaks),
)
