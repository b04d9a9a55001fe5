"""What tools on finished videos compute on a device is what they compute on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blissful_tuner.latent_preview import bring_home
from modules.layers.convolution import repeat_pixels
from post.contract import to_pixels, to_tensor
from post.interpolation.layers import Correlation, grid_of, splat, warp
from post.upscaling.swinir import CUDA_WIDTH, attend
from tests.gpu.measuring import equal_bits, no_waits, relative_error

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keeps_volume", [True, False])
def test_features_are_compared_as_on_a_cpu(device: torch.device, keeps_volume: bool) -> None:
    first, second = drawn(1, 64, 24, 40), drawn(1, 64, 24, 40, seed=1)
    places = grid_of(first) + 3 * drawn(1, 2, 24, 40, seed=2)

    def found(where: torch.device) -> Tensor:
        correlation = Correlation(first.to(where), second.to(where), keeps_volume)
        return correlation.lookup(places.to(where))

    assert relative_error(found(device), found(CPU)) < 1e-5


def splat_all(image: Tensor, flow: Tensor) -> Tensor:
    return splat(image, flow, image[:, :1].abs())


@pytest.mark.parametrize("move", [warp, splat_all])
def test_pictures_are_moved_as_on_a_cpu(
    device: torch.device, move: Callable[[Tensor, Tensor], Tensor]
) -> None:
    image, flow = drawn(1, 3, 40, 56), 5 * drawn(1, 2, 40, 56, seed=1)
    assert relative_error(move(image.to(device), flow.to(device)), move(image, flow)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_with_heads_of_odd_widths_are_mixed_as_on_a_cpu(
    device: torch.device, dtype: torch.dtype
) -> None:
    q, k, v = (drawn(50, 6, 64, 30, seed=seed) for seed in range(3))
    bias = drawn(6, 64, 64, seed=3)

    found = attend(*(each.to(device, dtype) for each in (q, k, v)), bias.to(device), CUDA_WIDTH)

    assert relative_error(found, attend(q, k, v, bias, 1)) < {4: 1e-5, 2: 0.02}[dtype.itemsize]


@pytest.mark.parametrize("is_deep", [False, True])
def test_pixels_come_back_as_they_went(device: torch.device, is_deep: bool) -> None:
    import numpy as np

    kind = np.uint16 if is_deep else np.uint8
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (8, 9, 3), kind, endpoint=True)

    assert np.array_equal(to_pixels(to_tensor(pixels, device), is_deep), pixels)


@pytest.mark.gpu
def test_a_preview_is_brought_home_without_a_wait(cuda: torch.device) -> None:
    x = torch.arange(1 << 22, device=cuda)
    expected = (x * 3).cpu()

    with no_waits(cuda):
        torch.cuda._sleep(100_000_000)
        home = bring_home(x * 3)
        noise = [torch.full_like(x, -1) for _ in range(4)]  # would take the memory of the product

    assert equal_bits(home(), expected)
    assert len(noise) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(17, 256, 512, 512), (1, 256, 2176, 2048)])  # many frames, large ones
def test_pixels_are_repeated_beyond_what_32_bits_count(cuda: torch.device, size: tuple[int, ...]) -> None:
    """torch's kernel leaves zeros there, without an error (pytorch/pytorch#141831)."""
    x = torch.ones(size, dtype=torch.bfloat16, device=cuda).to(memory_format=torch.channels_last)
    x[-1, :, -1, -1] = 2

    large = repeat_pixels(x, 2)

    assert large.numel() > 1 << 31
    assert bool((large[-1, :, -2:, -2:] == 2).all())
    assert all(bool((frame[:, :-2] == 1).all()) for frame in large)
