"""fp8 products for linear layers with a frozen fp8 weight: the output and the gradient of the input.

`y = x W^T + b` with W stored in e4m3, one scale for the tensor or one per output row. The other factor is
quantized on the fly to e4m3 with one scale per row (token), its largest magnitude over 448, so that an
outlier in one token costs no precision in another.

    output           y  = (x / a) W^T, its columns times the weight's scales s,
                     its rows times a = amax(x) / 448
    input gradient   dx = ((dy s) / g) W, its rows times g. The contraction runs over the output
                     features, so their scales are folded into dy before it is quantized

The backward pass needs only the weight and its scales: no activation is kept for a frozen base.
Rounding to e4m3 is unbiased, with an error of at most 2^-4 of a value (2.7 % root mean square); the fp8
weight itself is regarded as exact. Gradients are e4m3 too: with one scale per row they are well inside its 18
binades (error of a product of the pocket model's gradients: 2.1 %, in e5m2 4.3 %). Source of the recipe:
Micikevicius et al. 2022, arXiv 2209.05433, with row-wise scales as in torchao.
"""
# Letters: M tokens, K input features, N output features

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.errors import OptionError
from modules.private_torch import scaled_product

logger = logging.getLogger(__name__)

WEIGHT_DTYPE = torch.float8_e4m3fn
FEATURE_ALIGNMENT = 16  # K and N must be multiples of it: cuBLASLt needs rows aligned to 16 bytes
MIN_ROWS = 16  # rows of a hardware tile: fp8 is no faster for fewer tokens
MIN_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0, consumer Blackwell 12.0
# Up to this many tokens, sums are scaled after they are rounded, which then costs next to nothing: on Hopper
# cuBLAS has no kernel with row-wise scales for few tokens and many features (from 9216 to 3072 features up
# to 256 tokens: pytorch/ao#4582)
MAX_TOKENS_WITHOUT_ROW_SCALES = 256
MAX_FLOAT32_ELEMENTS = 1 << 26  # values quantized at a time in uncompiled code: 256 MiB of float32
# Hopper sums fp8 products in 14 bits, unless partial sums are moved to float32 regularly, which is slower.
# As in torchao's defaults, the forward pass uses the fast sums and the gradient the exact ones.
FAST_ACCUMULATION = True
EXACT_ACCUMULATION = False


# Multiplies a and b with scaled rows of a and columns of b, and adds a bias; sums in float32, rounds once.
# Takes a: M K e4m3, row-major; b: K N e4m3, column-major; scale_a: M 1, scale_b: 1 N, both float32; bias: N
# or None; dtype: of the result M N, bfloat16 or float16; uses_fast_accumulation: see FAST_ACCUMULATION.
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype, bool], Tensor]


def row_scaled_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    uses_fast_accumulation: bool,
) -> Tensor:
    """Return a @ b times both scales, plus bias; scales and bias are applied while sums are in registers.

    a is M x K and b is K x N, both e4m3; scale_a is M x 1, scale_b is 1 x N, bias is N.

    The result is rounded to bfloat16 even if `dtype` is float16, because only Hopper GPUs support other
    result dtypes with row-wise scales. Up to MAX_TOKENS_WITHOUT_ROW_SCALES rows are left to
    `tensor_scaled_product`, because torch lacks row-wise kernels for some sizes of so few rows.
    """
    if len(a) <= MAX_TOKENS_WITHOUT_ROW_SCALES:
        return tensor_scaled_product(
            a, b, scale_a, scale_b, bias=bias, dtype=dtype, uses_fast_accumulation=uses_fast_accumulation
        )
    half_bias = None if bias is None else bias.to(torch.bfloat16)
    return scaled_product(
        a,
        b,
        scale_a,
        scale_b,
        bias=half_bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=uses_fast_accumulation,
    ).to(dtype)


def tensor_scaled_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    uses_fast_accumulation: bool,
    max_float32_elements: int = MAX_FLOAT32_ELEMENTS,
) -> Tensor:
    """Return a @ b times both scales, plus bias, without torch's row-wise scales (missing on Windows).

    a is M x K and b is K x N, both e4m3; scale_a is M x 1, scale_b is 1 x N, bias is N.

    The unscaled sums are rounded to bfloat16 and then scaled. That costs one more pass over the result and a
    second rounding of 2^-9, which is small compared with the rounding to e4m3. `max_float32_elements` is the
    number of values that have a float32 copy at a time.
    """
    no_scale = torch.ones(1, device=a.device)
    sums = scaled_product(
        a, b, no_scale, no_scale, out_dtype=torch.bfloat16, use_fast_accum=uses_fast_accumulation
    )
    parts = _split_rows(sums, max_float32_elements)
    if len(parts) == 1:
        return _scale_sums(sums, scale_a, scale_b, bias).to(dtype)
    out = sums if dtype == sums.dtype else torch.empty(sums.shape, dtype=dtype, device=sums.device)
    for part in parts:
        out[part] = _scale_sums(sums[part], scale_a[part], scale_b, bias)
    return out


def _scale_sums(sums: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    out = sums * scale_a * scale_b  # float32, as the scales are
    return out if bias is None else out + bias


def _split_rows(x: Tensor, max_float32_elements: int) -> list[slice]:
    """Split the rows of x, M x K, so that only one slice at a time needs float32; no split in a compile."""
    rows = len(x) if torch.compiler.is_compiling() else max(1, max_float32_elements // x.shape[1])
    if len(x) <= rows:
        return [slice(None)]
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def supports_fp8(device: torch.device) -> bool:
    """Return whether torch can multiply in fp8 on the device: NVIDIA GPUs of compute capability 8.9 or later.

    AMD GPUs use a different fp8 format.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def select_product(
    device: torch.device,
    supported: Callable[[torch.device], bool] = supports_fp8,
    products: Sequence[Product] = (row_scaled_product, tensor_scaled_product),
) -> Product:
    """Return the first of `products` that works on the device; each is tried once on small tiles.

    Logs the reason if it is not the first product.

    Raises:
        OptionError: If the device has no fp8 units, or torch cannot use them.
    """
    remedy = "Omit --fp8_fast: the weights stay in fp8 and are multiplied in 16 bits."
    if not supported(device):
        raise OptionError(
            f"--fp8_fast: {_name(device)} has no fp8 units (NVIDIA RTX 40, L4, H100 and later have them). "
            f"{remedy}"
        )
    reasons = []
    for product in products:
        try:
            for tokens in (FEATURE_ALIGNMENT, MAX_TOKENS_WITHOUT_ROW_SCALES + FEATURE_ALIGNMENT):
                tile = torch.ones(tokens, FEATURE_ALIGNMENT, device=device).to(WEIGHT_DTYPE)
                rows = torch.ones(tokens, 1, device=device)
                columns = torch.ones(1, FEATURE_ALIGNMENT, device=device)
                bias = torch.zeros(FEATURE_ALIGNMENT, device=device)
                out = product(
                    tile, tile[:FEATURE_ALIGNMENT].t(), rows, columns, bias, torch.bfloat16, FAST_ACCUMULATION
                )
                if not bool((out == FEATURE_ALIGNMENT).all()):
                    number = float(out.flatten()[0])
                    raise RuntimeError(
                        f"the product of two tiles of ones is {number}, not {FEATURE_ALIGNMENT}"
                    )
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reasons.append(str(error).partition("\n")[0])
        else:
            if reasons:
                logger.info(
                    "fp8 products are scaled after they are summed, because torch reports: %s", reasons[0]
                )
            return product
    raise OptionError(
        f"--fp8_fast: torch {torch.__version__} cannot multiply in fp8 on {_name(device)}: {reasons[-1]}. "
        f"{remedy}"
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"


def suits_fp8(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Return whether `fp8_linear` supports this layer and input.

    It needs an e4m3 weight with one scale or one scale per row, sizes that are multiples of 16, and at least
    16 tokens. Only shapes and dtypes matter, not values.

    Args:
        x: Input, ... x K.
        weight: Weight, N x K.
        scale: One number, one per row (N x 1), or None.
    """
    rows, columns = weight.shape
    is_by_tensor = scale is None or scale.numel() == 1
    is_by_row = scale is not None and scale.numel() == rows and scale.ndim <= 2
    return (
        weight.dtype == WEIGHT_DTYPE
        and rows % FEATURE_ALIGNMENT == 0
        and columns % FEATURE_ALIGNMENT == 0
        and x.numel() >= MIN_ROWS * columns
        and (is_by_tensor or is_by_row)
    )


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, product: Product
) -> Tensor:
    """Compute x W^T + b with W = weight * scale in fp8; differentiable in x only.

    The inputs must satisfy `suits_fp8`. `x` is ... x K, of any magnitude; a row with NaN or an infinite value
    results in a row of NaN. `weight` is N x K e4m3. `scale` is one number, N x 1, or None for 1. `bias` is N.
    Returns ... x N in autocast's dtype if it is on, else in the dtype of x.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return _FrozenLinear.apply(x, weight, scale, bias, dtype, product)


class _FrozenLinear(torch.autograd.Function):
    """Linear layer with an fp8 weight; for the backward pass, it saves only the weight and its scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        product: Product,
    ) -> Tensor:
        """Quantize rows of x to fp8 and multiply them by the weight; return the result in `dtype`."""
        ctx.save_for_backward(weight, scale)
        ctx.product, ctx.dtype = product, x.dtype
        quantized, row_scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        out = product(
            quantized,
            weight.t(),
            row_scales,
            _expand_scale(weight, scale),
            bias,
            _select_product_dtype(dtype),
            FAST_ACCUMULATION,
        )
        return out.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, also computed in fp8; the other arguments of `forward` get none."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        quantized, row_scales = quantize_rows(
            gradient.reshape(-1, gradient.shape[-1]), _expand_scale(weight, scale)
        )
        # N x K, column-major as the fp8 units need it; freed when this call ends
        columns = weight.t().contiguous().t()
        # no more scales: the gradient was multiplied by the weight's scales before it was rounded
        ones = torch.ones(1, weight.shape[1], device=weight.device)
        out = ctx.product(
            quantized,
            columns,
            row_scales,
            ones,
            None,
            _select_product_dtype(gradient.dtype),
            EXACT_ACCUMULATION,
        )
        return out.to(ctx.dtype).view(*gradient.shape[:-1], weight.shape[1]), None, None, None, None, None


def quantize_rows(
    x: Tensor, column_scales: Tensor | None = None, max_float32_elements: int = MAX_FLOAT32_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Quantize x * column_scales to e4m3 with one scale per row; each row is divided by its scale.

    A row of zeros stays zeros. A NaN or infinite value makes the row's scale NaN or infinite, so that
    every product with the row is NaN.

    Args:
        x: Values, M x K.
        column_scales: Factors of the columns, 1 x K float32; None for 1.
        max_float32_elements: How many values have a float32 copy at a time; unlimited while compiling,
            because the copy is fused away.

    Returns:
        The quantized values, M x K e4m3, and their scales, M x 1 float32.
    """
    parts = _split_rows(x, max_float32_elements)
    if len(parts) == 1:
        return _quantize(x, column_scales)
    out = torch.empty(x.shape, dtype=WEIGHT_DTYPE, device=x.device)
    scales = torch.empty(x.shape[0], 1, device=x.device)
    for part in parts:
        out[part], scales[part] = _quantize(x[part], column_scales)
    return out, scales


def _quantize(x: Tensor, column_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    if column_scales is not None:
        x = x * column_scales  # float32, as the scales are
    largest = x.abs().amax(dim=1, keepdim=True).float()
    # the smallest scale keeps rows of zeros (and of the smallest bf16 numbers) from dividing by zero. Limits
    # come from finfo, not from a constant of this file: compiling for dynamic shapes turns those into inputs
    scales = (largest / torch.finfo(WEIGHT_DTYPE).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).to(WEIGHT_DTYPE), scales


def _expand_scale(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the weight's scale as one float32 value per output channel, 1 x N."""
    if scale is None:
        return torch.ones(1, weight.shape[0], device=weight.device)
    return scale.float().reshape(1, -1).expand(1, weight.shape[0]).contiguous()


def _select_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute fp8 products in; even 16 bits are more precise than the product."""
    return dtype if dtype == torch.float16 else torch.bfloat16
