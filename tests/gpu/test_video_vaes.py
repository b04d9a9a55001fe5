"""Autoencoders on a device: kernels, layouts and memory of their convolutions."""

import pytest
import torch
from torch import Tensor

from hunyuan_model.vae_blocks import HunyuanCausalConv
from modules.layers.convolution import lay_out, layouts
from tests.gpu.measuring import equal_bits, peak_of, relative_error
from wan.vae_blocks import TimeMemory, WanCausalConv, WanFrameAttention, WanResidualBlock

HALVES = (torch.bfloat16, torch.float16)


def clip(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device, dtype, memory_format=layouts(device)[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_chunks_kept_in_host_memory_give_the_bits_of_those_on_the_device(
    device: torch.device, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    block = WanResidualBlock(32, 32).to(device, dtype).requires_grad_(False)
    lay_out(block, device)
    x = clip(device, dtype, 1, 32, 13, 24, 16)

    def made(on_cpu: bool) -> Tensor:
        memory = TimeMemory(on_cpu)
        return torch.cat([block(part, memory) for part in x.split([1, 4, 4, 4], dim=2)], dim=2)

    assert equal_bits(made(True), made(False))


@pytest.mark.parametrize("dtype", HALVES)
def test_convolutions_in_16_bits_are_those_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    if (device.type, dtype) == ("cpu", torch.float16):
        pytest.skip("takes a minute")
    torch.manual_seed(0)
    for layer in (WanCausalConv(96, 96), HunyuanCausalConv(128, 128, enlarge=(2, 2, 2))):
        exact = layer.requires_grad_(False)
        x = clip(torch.device("cpu"), torch.float32, 1, next(exact.parameters()).shape[1], 5, 24, 16)
        expected = exact(x, None)
        ours = exact.to(device, dtype)
        lay_out(ours, device)

        found = ours(x.to(device, dtype, memory_format=layouts(device)[0]), None)

        assert relative_error(found, expected) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_attention_of_a_wide_head_keeps_no_table_of_scores(cuda: torch.device, dtype: torch.dtype) -> None:
    """FlashAttention takes heads of up to 256 channels, the VAE's only one has 384."""
    layer = WanFrameAttention(384).to(cuda, dtype).requires_grad_(False)
    places = 60 * 104
    x = clip(cuda, dtype, 1, 384, 1, 60, 104)
    layer(x, None)

    _, peak, _ = peak_of(cuda, lambda: layer(x, None))

    assert peak < places**2 * x.itemsize
