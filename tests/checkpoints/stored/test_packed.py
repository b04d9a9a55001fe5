"""Packed weights have the values that comfy-kitchen and bitsandbytes give them."""

import pytest
import torch
from torch import Tensor

from checkpoints.stored import packed

kitchen = pytest.importorskip("comfy_kitchen.backends.eager")


def _weight(rows: int, columns: int) -> Tensor:
    """The example of the reference: all numbers are exact in bf16, and one is an outlier."""
    weight = ((7 * torch.arange(rows)[:, None] + 13 * torch.arange(columns)) % 29 - 14) / 16
    weight[0, 5] = 8
    return weight


WEIGHT = torch.randn(160, 256, generator=torch.Generator().manual_seed(1))


def test_nvfp4_is_that_of_kitchen_and_of_the_reference() -> None:
    from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4, quantize_nvfp4

    for weight in (WEIGHT, _weight(32, 64)):
        rows, columns = weight.shape
        scale = weight.abs().max() / (448 * 6)
        stored, scales = quantize_nvfp4(weight, scale)
        flat = packed.untile(scales, rows, columns // 16)
        found = packed.nvfp4_rows(stored, flat, scale.view(1, 1), None)
        assert torch.equal(found, dequantize_nvfp4(stored, scale, scales, torch.float32))
    assert stored[0, :6].tolist() == [152, 24, 23, 25, 9, 1]
    assert flat[0].float().tolist() == [448, 48, 44, 48]
    torch.testing.assert_close(
        found[0, :6], torch.tensor([-2 / 3, 0, 2 / 3, 0, 2 / 3, 8]), rtol=1e-6, atol=1e-6
    )
    assert not torch.equal(flat, scales[:32, :4]), "the tiles are in another order"
    factor = torch.linspace(1, 2, 64)[None]
    assert torch.equal(packed.nvfp4_rows(stored, flat, scale.view(1, 1), factor), found * factor)


def test_mxfp8_is_that_of_kitchen_and_of_the_reference() -> None:
    from comfy_kitchen.backends.eager.quantization import dequantize_mxfp8, quantize_mxfp8

    for weight in (WEIGHT, _weight(32, 64)):
        rows, columns = weight.shape
        stored, scales = quantize_mxfp8(weight)
        flat = packed.untile(scales.view(torch.float8_e8m0fnu), rows, columns // 32)
        found = packed.mxfp8_rows(stored, flat)
        assert torch.equal(found, dequantize_mxfp8(stored, scales, torch.float32))
    assert torch.equal(found, _weight(32, 64)), "the example is exact"
    assert flat[0].float().tolist() == [0.03125, 0.001953125]


def test_int4_after_a_rotation_is_that_of_kitchen() -> None:
    from comfy_kitchen.backends.eager.convrot_w4a4 import (
        dequantize_convrot_w4a4_weight,
        quantize_convrot_w4a4_weight,
    )

    stored, scale = quantize_convrot_w4a4_weight(WEIGHT, 64)
    found = packed.rotate(packed.w4a4_rows(stored, scale.view(-1, 1)), 64)
    torch.testing.assert_close(found, dequantize_convrot_w4a4_weight(stored, scale, 64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "codebook"), [(4, True), (4, False), (6, False)])
def test_int4_and_6_in_groups_are_those_of_kitchen(bits: int, codebook: bool) -> None:
    from comfy_kitchen.backends.eager.w4a8_int8 import dequantize_w4a8_int8_weight, quantize_w4a8_int8_weight

    stored, scales, scale, _, levels = quantize_w4a8_int8_weight(WEIGHT, bits=bits, codebook=codebook)
    make = packed.w4a8_rows if bits == 4 else packed.w6a8_rows
    found = packed.rotate(make(stored, scales, scale.view(-1, 1), levels), 256)
    expected = dequantize_w4a8_int8_weight(stored, scales, scale, levels, output_dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # another order of sums


def test_awq_is_that_of_kitchen() -> None:
    from comfy_kitchen.backends.eager.awq import gemv_awq_w4a16

    random = torch.Generator().manual_seed(2)
    stored = torch.randint(-128, 128, (160, 128), dtype=torch.int8, generator=random)
    scales, zeros = torch.randn(2, 4, 160, generator=random)
    product = gemv_awq_w4a16(torch.eye(256), stored, scales, zeros)
    assert torch.equal(packed.awq_rows(stored, scales.t(), zeros.t()), product.t())
