"""Tiles change nothing that all of them agree on, and less is computed at once where memory ends."""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules.errors import CheckpointError, MemoryPlanError
from postprocessing.contract import to_pixels, to_tensor
from postprocessing.options import ToolNetworkOptions
from postprocessing.streaming import read_in_thread, write_in_thread
from postprocessing.tiling import (
    WHOLE_IMAGE,
    Float32Fallback,
    MemoryFittedRunner,
    network_dtype,
    pad_to_multiple,
    run_in_tiles,
    split_into_tiles,
)
from tests.waiting import PATIENCE

CPU = torch.device("cpu")


def doubled(images: Tensor) -> Tensor:
    return interpolate(images, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [((64, 40), 16, 3), ((24, 72), 24, 8), ((56, 56), 40, 0), ((8, 8), 16, 8), ((64, 40), 40, 8)],
)
def test_tiles_of_a_network_without_surroundings_give_the_whole_to_the_bit(
    size: tuple[int, int], tile: int, overlap: int
) -> None:
    images = torch.randn(2, 3, *size)
    for run, factor in ((lambda x: x, 1), (doubled, 2)):
        assert torch.equal(run_in_tiles(run, images, tile, overlap, 8, factor), run(images))


def test_tiles_are_of_one_size_few_and_no_larger_than_needed() -> None:
    for length, tile, overlap, step in itertools.product(range(8, 200, 8), (32, 40, 64), (0, 5, 16), (1, 8)):
        spans = split_into_tiles(length, tile, overlap, step)
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert {end - start for start, end in spans} == {spans[0][1]}
        assert spans[0][1] <= max(tile, 1)
        assert all(start % step == 0 for start, _ in spans)
        assert all(end - start >= overlap for (_, end), (start, _) in itertools.pairwise(spans))
    assert split_into_tiles(64, 64, 16) == [(0, 64)]
    assert split_into_tiles(100, 96, 32) == [(0, 66), (34, 100)]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 20)])
@pytest.mark.parametrize(("repeats", "mode"), [(True, "symmetric"), (False, "reflect")])
def test_pictures_are_extended_by_their_mirror_image(size: tuple[int, int], repeats: bool, mode: Any) -> None:
    images = torch.rand(1, 3, *size)
    wide = [(0, 0), (0, 0), *((0, -each % 8) for each in size)]
    expected = torch.from_numpy(np.pad(images.numpy(), wide, mode=mode))
    assert torch.equal(pad_to_multiple(images, 8, repeats), expected)


class Memory:
    """A network that fits the memory only up to so many pixels at once."""

    def __init__(self, pixels: int, error: Exception) -> None:
        self.pixels, self.error = pixels, error
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        if images.numel() // images.shape[1] > self.pixels:
            raise self.error
        return doubled(avg_pool2d(images, 3, 1, 1))


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_batches_then_tiles_are_halved_until_they_fit_which_is_remembered(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    images = torch.rand(4, 3, 128, 160)
    network = Memory(80 * 80, error)
    runner = MemoryFittedRunner(CPU, 4, WHOLE_IMAGE, is_auto=True, overlap=16, factor=2)

    made = runner(network, images)
    tried = len(network.shapes)
    runner(network, images)

    full = Memory(1 << 30, error)(images)
    # the pool sees zeros behind each tile's edge: wrong in one pixel, which hardly counts there
    assert (made - full).abs().max() < 0.03
    assert (runner.batch, runner.tile) == (1, 80)
    assert all(height * width <= 80 * 80 for _, _, height, width in network.shapes[tried:])
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory: the batch size is now 2.",
        "Out of memory: the batch size is now 1.",
        "Out of memory: images are now split into tiles of 80 pixels.",
    ]


@pytest.mark.parametrize("is_auto", [True, False])
def test_what_never_fits_is_said(is_auto: bool) -> None:
    runner = MemoryFittedRunner(CPU, 1, WHOLE_IMAGE if is_auto else 96, is_auto, overlap=16)
    with pytest.raises(MemoryPlanError, match=r"enough memory even for \d+ x \d+ pixels .*\n.*--tile"):
        runner(Memory(10, ERRORS[0]), torch.rand(1, 3, 128, 160))


def test_what_follows_the_network_may_run_out_of_memory_too() -> None:
    runner = MemoryFittedRunner(CPU, 4, WHOLE_IMAGE, is_auto=True, overlap=16)
    seen = []

    def finish(made: Tensor) -> Tensor:
        seen.append(len(made))
        if len(made) > 1:
            raise ERRORS[0]
        return made[..., :5]

    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(runner(lambda given: given, images, finish), images[..., :5])
    assert seen == [3, 1, 1, 1]


def precision_options(dtype: str = "fp32", compile: bool = False) -> ToolNetworkOptions:
    return ToolNetworkOptions(model=Path("x.pth"), dtype=dtype, compile=compile)


def squared(images: Tensor) -> Tensor:
    """Too large for float16 from 256 on."""
    return images * images


def test_only_pictures_that_overflow_are_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loads = []

    def exact() -> object:
        loads.append(1)
        return squared

    guarded = Float32Fallback(squared, torch.float16, exact, "SwinIR")
    images = torch.rand(3, 3, 4, 5)
    images[1, 0, 0, 0] = 300.0

    made = [guarded(images), guarded(images)][1]

    assert made.dtype == torch.float32
    assert torch.equal(made[1], squared(images[1]))
    for index in (0, 2):
        assert torch.equal(made[index], squared(images[index].half()).float())
    assert (len(loads), len(caplog.records)) == (1, 1)
    assert "SwinIR in float16 is not finite" in caplog.text


def test_a_result_that_is_not_finite_in_float32_either_is_an_error() -> None:
    guarded = Float32Fallback(squared, torch.bfloat16, lambda: squared, "SwinIR")
    with pytest.raises(CheckpointError, match="NaN or infinite, in float32 too"):
        guarded(torch.full((1, 3, 2, 2), 1e30))


def test_float16_is_float32_on_a_cpu() -> None:
    assert network_dtype(precision_options("fp16"), CPU, "x") == torch.float32
    assert network_dtype(precision_options("fp16"), torch.device("cuda"), "x") == torch.float16
    assert network_dtype(precision_options("bf16"), CPU, "x") == torch.bfloat16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_all_values_come_back(dtype: type, recwarn: pytest.WarningsRecorder) -> None:
    maximum = np.iinfo(dtype).max
    values = np.linspace(0, maximum, 3 * 60 * 70).astype(dtype).reshape(60, 70, 3)[:, ::2]  # not in one piece
    values.flags.writeable = False

    image = to_tensor(values, CPU)

    assert image.shape == (1, 3, 60, 35)
    assert image.dtype == torch.float32
    assert np.array_equal(to_pixels(image, dtype is np.uint16), values)
    assert not recwarn.list


class NoUnsigned(TorchDispatchMode):
    """A device that does not know 16 bits without a sign, as some of Apple's."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        assert all(getattr(leaf, "dtype", None) != torch.uint16 for leaf in tree_leaves([args, made])), func
        return made


def test_no_device_has_to_know_sixteen_bits_without_a_sign() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).repeat(3).reshape(256, 256, 3)

    with NoUnsigned():
        made = to_pixels(to_tensor(values, CPU), is_deep=True)

    assert np.array_equal(made, values)
    assert made.dtype == np.uint16


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name in {"reading ahead", "writing behind"}]


def test_reading_ends_and_closes_its_file_when_nobody_reads() -> None:
    closed: list[str] = []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(threading.current_thread().name)

    with read_in_thread(source()) as items:
        assert next(items) == 1

    assert closed == ["reading ahead"]
    assert not threads()


def test_an_error_of_writing_ends_the_run_with_it_and_does_not_wait_for_ever() -> None:
    def write(items: Iterator[int]) -> None:
        next(items)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), write_in_thread(write) as put:
        all(put(number) is None for number in range(100))

    assert not threads()


def test_an_error_of_writing_at_the_very_end_is_raised_too() -> None:
    def write(items: Iterator[int]) -> None:
        assert list(items) == [1]
        raise OSError("no room for the index")

    with pytest.raises(OSError, match="no room"), write_in_thread(write) as put:
        put(1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")
def test_ctrl_c_while_the_last_is_written_does_not_wait_for_ever() -> None:
    is_over = threading.Event()

    def write(items: Iterator[int]) -> None:
        list(items)
        is_over.wait(2 * PATIENCE)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt), write_in_thread(write, last_wait=0.2) as put:
            put(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert time.monotonic() - started < PATIENCE
    assert threads() == ["writing behind"]  # it dies with the program
    is_over.set()
    while threads():
        time.sleep(0.01)
