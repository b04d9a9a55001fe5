"""Tiles change nothing that all of them agree on, and less is computed at once where memory ends."""

import itertools
import logging

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from modules.errors import MemoryPlanError
from post.tiling import WHOLE, Fitting, cut, pad_to_multiple, run_in_tiles

CPU = torch.device("cpu")


def doubled(images: Tensor) -> Tensor:
    return interpolate(images, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("tile", [16, 24, 40])
@pytest.mark.parametrize("overlap", [0, 3, 8])
@pytest.mark.parametrize("size", [(64, 40), (24, 72), (8, 8), (56, 56)])
def test_tiles_of_a_network_without_surroundings_give_the_whole_to_the_bit(
    size: tuple[int, int], overlap: int, tile: int
) -> None:
    images = torch.randn(2, 3, *size)
    for run, factor in ((lambda x: x, 1), (doubled, 2)):
        assert torch.equal(run_in_tiles(run, images, tile, overlap, 8, factor), run(images))


def test_tiles_are_of_one_size_few_and_no_larger_than_needed() -> None:
    for length, tile, overlap, step in itertools.product(range(8, 200, 8), (32, 40, 64), (0, 5, 16), (1, 8)):
        spans = cut(length, tile, overlap, step)
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert {end - start for start, end in spans} == {spans[0][1]}
        assert spans[0][1] <= max(tile, 1)
        assert all(start % step == 0 for start, _ in spans)
        assert all(end - start >= overlap for (_, end), (start, _) in itertools.pairwise(spans))
    assert cut(64, 64, 16) == [(0, 64)]
    assert cut(100, 96, 32) == [(0, 66), (34, 100)]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 20)])
def test_pictures_are_extended_by_their_mirror_image(size: tuple[int, int]) -> None:
    import numpy

    images = torch.rand(1, 3, *size)
    for repeats, mode in ((True, "symmetric"), (False, "reflect")):
        wide = [(0, 0), (0, 0), *((0, -each % 8) for each in size)]
        expected = torch.from_numpy(numpy.pad(images.numpy(), wide, mode=mode))
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
    fitting = Fitting(CPU, 4, WHOLE, is_auto=True, overlap=16, factor=2)

    made = fitting(network, images)
    tried = len(network.shapes)
    fitting(network, images)

    whole = Memory(1 << 30, error)(images)
    # the pool sees zeros behind each tile's edge: wrong in one pixel, which hardly counts there
    assert (made - whole).abs().max() < 0.03
    assert (fitting.batch, fitting.tile) == (1, 80)
    assert all(height * width <= 80 * 80 for _, _, height, width in network.shapes[tried:])
    assert [record.getMessage() for record in caplog.records] == [
        "Memory is full: from now on 2 at once.",
        "Memory is full: from now on 1 at once.",
        "Memory is full: from now on pictures are cut into tiles of 80 pixels.",
    ]


@pytest.mark.parametrize(("tile", "is_auto"), [(WHOLE, True), (WHOLE, False), (96, False)])
def test_what_never_fits_is_said(tile: int, is_auto: bool) -> None:
    fitting = Fitting(CPU, 1, tile, is_auto, overlap=16)
    with pytest.raises(MemoryPlanError, match=r"too little memory even for \d+ x \d+ pixels .*\n.*--tile"):
        fitting(Memory(10, ERRORS[0]), torch.rand(1, 3, 128, 160))


def test_what_follows_the_network_may_run_out_of_memory_too() -> None:
    fitting = Fitting(CPU, 4, WHOLE, is_auto=True, overlap=16)
    seen = []

    def finish(made: Tensor) -> Tensor:
        seen.append(len(made))
        if len(made) > 1:
            raise ERRORS[0]
        return made[..., :5]

    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(fitting(lambda given: given, images, finish), images[..., :5])
    assert seen == [3, 1, 1, 1]
