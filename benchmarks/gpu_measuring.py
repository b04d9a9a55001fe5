"""Measure one row of benchmarks/gpu.py, in the process that loads its model."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_encoders import latents, texts
from benchmarks.gpu_families import training_family
from benchmarks.gpu_files import forget
from benchmarks.gpu_profile import profile_calls, report
from benchmarks.gpu_results import GIB
from benchmarks.gpu_rows import GENERATION, LATENTS, LOADING, TEXTS, TRAINING, Row
from benchmarks.gpu_steps import Bench, generation, train_steps
from benchmarks.process_memory import STATUS, is_known, peak, start_of_peak
from runtime.network_setup import make_host_weights
from training.experts import choose_placement

MIN_CALLS, MAX_CALLS = 2, 5  # timed calls
LONG = 10.0  # seconds of a call that is timed once
CONTEXT = 0.6  # GiB that CUDA takes of a card for itself
ENOUGH = 25.0  # seconds of timed calls, after which there is no other
Figures = dict[str, Any]  # of a row, as the result file holds them


def measure_row(
    row: Row,
    path: Path,
    high: Path | None,
    device: torch.device,
    enough: float = ENOUGH,
    profiled: bool = False,
) -> Figures:
    """Return the figures of a row.

    Args:
        row: The row.
        path: File of its model.
        high: File of the expert for high noise; None without one.
        device: The device.
        enough: Seconds to measure.
        profiled: Also profile a call.
    """
    if row.card:
        limit_memory(device, row.card)
    if row.kind == LOADING:
        return {**_measure_loading(row, path, device), "host": _host_peak()}
    bench = prepare(row, path, high, device)
    found = measure(bench, path, device, enough)
    return {**found, "profile": _profile(bench, device)} if profiled else found


def limit_memory(device: torch.device, card: float) -> None:
    """Let torch use no more of a CUDA device than a card of this many GiB has free."""
    if device.type == "cuda":
        full = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction((card - CONTEXT) / full, device.index or 0)


def forget_row(device: torch.device) -> None:
    """Release what a row has left, so that the next one starts as in a new process."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index or 0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if is_known():
        start_of_peak()


def _profile(bench: Bench, device: torch.device) -> list[str]:
    """Return the lines of a profile of one call, or the reason why there is none; the row stays valid.

    Times are of a step, clip or text.
    """
    try:
        return report(profile_calls(bench.call, 1, device), max(round(bench.per), 1)).splitlines()
    except (RuntimeError, AssertionError) as error:
        return [f"failed: {error}"]


def prepare(row: Row, path: Path, high: Path | None, device: torch.device) -> Bench:
    """Load a row's model and prepare its timed work."""
    if row.kind == GENERATION:
        return generation(row, path, device, high)
    return {TRAINING: train_steps, LATENTS: latents, TEXTS: texts}[row.kind](row, path, device)


def measure(bench: Bench, path: Path, device: torch.device, enough: float) -> Figures:
    """Time a bench. The peak of the device's memory counts from the second call on."""
    (warm_up,) = time_call(bench.warm_up, device, 1, 1, 0)
    first = reset_peak(device)
    times = time_call(bench.call, device, MIN_CALLS, MAX_CALLS, enough)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "calls": len(times),
        "per": bench.per,
        "whole": bench.whole,
        "warm_up": warm_up,
        "operations": bench.operations,
        "model_operations": bench.model_operations,
        "device": reset_peak(device),
        "device_first": first,
        "reserved": reserved,
        "planned": bench.planned,
        "host": _host_peak(),
        "loading": bench.loading,
        "loaded": path.stat().st_size,
        "losses": [float(loss) for loss in bench.losses],
        "norms": [float(norm) for norm in bench.norms],
    }


def time_call(
    call: Callable[[], object], device: torch.device, minimum: int, maximum: int, enough: float
) -> list[float]:
    """Return the seconds of each call, each ended by the device's last kernel.

    There are at least `minimum` and at most `maximum` calls, and no other after `enough` seconds or after a
    long one.
    """
    times: list[float] = []
    synchronize(device)
    while len(times) < minimum or (len(times) < maximum and sum(times) < enough):
        if times and times[0] > LONG:
            break
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Return the peak of a CUDA device's memory, and reset it; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _host_peak() -> int:
    """Return the peak of host memory in bytes; 0 if the system does not report it."""
    return peak() if STATUS.exists() and "VmHWM" in STATUS.read_text(encoding="ascii") else 0


def _measure_loading(row: Row, path: Path, device: torch.device) -> Figures:
    """Time loading a transformer from a cached file, and from one that was dropped from the cache.

    The first loading, which also starts the device, is reported separately.
    """
    options, family = training_family(row, path)

    def load() -> None:
        host = make_host_weights(family.dit, options.speed.swap, device)
        placement = choose_placement(options, device, options.speed.fp8.quantization)
        dit = family.load_dit(replace(placement, host_weights=host))
        synchronize(device)
        del dit
        gc.collect()

    (warm_up,) = time_call(load, device, 1, 1, 0)
    reset_peak(device)
    times = time_call(load, device, MIN_CALLS, MIN_CALLS + 1, ENOUGH)
    found = {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "calls": len(times),
        "per": path.stat().st_size / 1e9,
        "warm_up": warm_up,
        "device": reset_peak(device),
        "loaded": path.stat().st_size,
        "forgotten": None,
    }
    if forget(path):
        (found["forgotten"],) = time_call(load, device, 1, 1, 0)
    return found
