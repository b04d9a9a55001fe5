"""Pictures and clips on a GPU: memory of convolutions, sizes beyond 32 bits, copies without a wait."""

import pytest
import torch
from torch import Tensor

from blissful_tuner.latent_preview import bring_home
from modules.layers.convolution import lay_out, layouts, repeat_pixels
from tests.gpu.measuring import equal_bits, no_waits, peak_of
from wan.vae_blocks import TimeMemory, WanCausalConv, WanFrameAttention, WanResidualBlock

pytestmark = pytest.mark.gpu


def clip(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, dtype, memory_format=layouts(device)[0])


def test_a_preview_is_brought_home_without_a_wait(cuda: torch.device) -> None:
    x = torch.arange(1 << 22, device=cuda)
    expected = (x * 3).cpu()

    with no_waits(cuda):
        torch.cuda._sleep(100_000_000)
        home = bring_home(x * 3)
        noise = [torch.full_like(x, -1) for _ in range(4)]  # would take the memory of the product

    assert equal_bits(home(), expected)
    assert len(noise) == 4


@pytest.mark.parametrize("size", [(17, 256, 512, 512), (1, 256, 2176, 2048)])  # many frames, large ones
def test_pixels_are_repeated_beyond_what_32_bits_count(cuda: torch.device, size: tuple[int, ...]) -> None:
    """torch's kernel leaves zeros there, without an error (pytorch/pytorch#141831)."""
    x = torch.ones(size, dtype=torch.bfloat16, device=cuda).to(memory_format=torch.channels_last)
    x[-1, :, -1, -1] = 2

    large = repeat_pixels(x, 2)

    assert large.numel() > 1 << 31
    assert bool((large[-1, :, -2:, -2:] == 2).all())
    assert all(bool((frame[:, :-2] == 1).all()) for frame in large)


def test_chunks_kept_in_host_memory_give_the_bits_of_those_on_the_device(cuda: torch.device) -> None:
    block = WanResidualBlock(32, 32).to(cuda, torch.bfloat16).requires_grad_(False)
    lay_out(block, cuda)
    x = clip(cuda, torch.bfloat16, 1, 32, 13, 24, 16)

    def made(on_cpu: bool) -> Tensor:
        memory = TimeMemory(on_cpu)
        return torch.cat([block(part, memory) for part in x.split([1, 4, 4, 4], dim=2)], dim=2)

    assert equal_bits(made(True), made(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_convolution_needs_no_column_for_each_pixel(cuda: torch.device, dtype: torch.dtype) -> None:
    """cuDNN computes it, also the versions that torch keeps from clips that are not channels last
    (pytorch/pytorch#166643): torch's own kernel would write out 27 values for each.
    """
    layer = WanCausalConv(96, 96).to(cuda, dtype).requires_grad_(False)
    lay_out(layer, cuda)
    x = clip(cuda, dtype, 1, 96, 4, 480, 832)
    layer(x, None)  # chooses its kernel

    _, peak, _ = peak_of(cuda, lambda: layer(x, None))

    assert peak < 4 * x.nbytes  # padded clip, result, workspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_a_wide_head_keeps_no_table_of_scores(cuda: torch.device, dtype: torch.dtype) -> None:
    """FlashAttention takes heads of up to 256 channels, the VAE's only one has 384."""
    layer = WanFrameAttention(384).to(cuda, dtype).requires_grad_(False)
    x = clip(cuda, dtype, 1, 384, 1, 60, 104)
    layer(x, None)

    _, peak, _ = peak_of(cuda, lambda: layer(x, None))

    assert peak < (60 * 104) ** 2 * x.itemsize
