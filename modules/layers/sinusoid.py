"""Sinusoidal embeddings of numbers such as timesteps.

Source: Vaswani et al. 2017, arXiv 1706.03762, and for timesteps Ho et al. 2020, arXiv 2006.11239; the video
models put cosines first.
"""

import math

import torch
from torch import Tensor

LONGEST = 10000.0  # the frequencies fall from 1 to nearly 1 / LONGEST


def sinusoid(numbers: Tensor, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return cosines, then sines, of numbers (B) at falling frequencies: B width float32. width: even.

    dtype: of frequencies and angles, as the model was trained. At 6000 a float32 angle is wrong in the
    fourth digit.
    """
    half = width // 2
    # Apple GPUs have no float64
    device = torch.device("cpu") if numbers.device.type == "mps" else numbers.device
    numbered = torch.arange(half, dtype=dtype, device=device)
    # each dtype has the formula of the models trained with it: the two formulas round differently, in float32
    # by up to 6e-5 of the result at 1000. The power itself is float64's in both: float32's is off by up to
    # five last digits, by other ones on each processor, and 1000 times as much reaches the result
    if dtype == torch.float64:
        frequencies = LONGEST ** -(numbered / half)
    else:
        frequencies = (-math.log(LONGEST) * numbered / half).double().exp().to(dtype)
    angles = torch.outer(numbers.to(device, dtype), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(numbers.device, torch.float32)
