"""Noise levels of a generation: shifted, and rounded to the thousandths that the model was trained at.

Source: the released schedule, as open ports have it, which are equal to the last bit.
"""

import torch

from modules.flow.schedule import TRAIN_TIMESTEPS, shift_sigmas


def snap_levels(steps: int, shift: float) -> tuple[float, ...]:
    """Return noise levels from 1 down in whole thousandths, followed by 0.

    Even levels, down to the one that the shift turns into a thousandth, are shifted, and each is rounded to
    the nearest thousandth, down if two are equally near. Duplicates are dropped, so there may be fewer than
    `steps`.
    """
    # float32, as released: a level close to the middle of two thousandths depends on it
    even = torch.linspace(1, shift / (TRAIN_TIMESTEPS - 1 + shift), steps, dtype=torch.float32)
    wanted = shift_sigmas(even, shift).double() * TRAIN_TIMESTEPS
    numbers = (wanted - 0.5).ceil().clamp(1, TRAIN_TIMESTEPS)
    thousandths = dict.fromkeys(int(number) for number in numbers.tolist())
    return (*(number / TRAIN_TIMESTEPS for number in thousandths), 0.0)
