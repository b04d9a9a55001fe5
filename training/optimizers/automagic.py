"""Automagic: each single weight has a learning rate of its own, which no one has to choose.

A weight whose updates keep their sign is on its way, so its rate rises; one whose updates change their sign
has arrived, or swings, so its rate falls. The updates are those of Adafactor (Shazeer and Stern 2018, arXiv
1804.04235) with a fixed decay and without momentum. After the optimizer of this name by Ostris, with its
arguments and their defaults; written from its description.

Rates are counted in steps of `lr_bump`, two bytes for each weight, so they are exact and small.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_COUNT = torch.iinfo(torch.int16).max
HIGHEST_START = 1e-3  # of the rate: rates are found from below
START = "start_lr"  # key of a parameter group: the rate without the schedule


class Automagic(Optimizer):
    """Adafactor's updates, with a rate for each element by the agreement of the signs of its updates."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 1e-6,
        eps: float | tuple[float, ...] = 1e-30,
        clip_threshold: float = 1.0,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
    ) -> None:
        """Create the optimizer.

        Args:
            params: Weights or parameter groups.
            lr: Rate at which each element starts. A schedule multiplies the rates of all elements.
            min_lr: Lowest rate of an element.
            max_lr: Highest rate of an element.
            lr_bump: Amount by which a rate rises or falls in a step.
            eps: Added to squared gradients; of several numbers, the first one.
            clip_threshold: Largest root mean square of the update of a weight.
            beta2: Decay of the mean of squared gradients.
            weight_decay: Decay of the weights, times the rate of each element.

        Raises:
            ValueError: If an argument is invalid.
        """
        if not 0 < min_lr <= max_lr:
            raise ValueError("min_lr must be above 0 and at most max_lr")
        if lr_bump <= 0 or (max_lr - min_lr) / lr_bump > MAX_COUNT:
            raise ValueError(f"lr_bump must be above 0 and at least {(max_lr - min_lr) / MAX_COUNT:g}")
        if not 0 <= beta2 < 1 or clip_threshold <= 0 or weight_decay < 0:
            raise ValueError("beta2 is from 0 to below 1, clip_threshold above 0, weight_decay from 0 on")
        settings = {
            "lr": lr,
            "min_lr": min_lr,
            "max_lr": max_lr,
            "lr_bump": lr_bump,
            "eps": float(eps[0] if isinstance(eps, (tuple, list)) else eps),
            "clip_threshold": clip_threshold,
            "beta2": beta2,
            "weight_decay": weight_decay,
        }
        super().__init__(params, settings)
        for group in self.param_groups:
            group[START] = float(group["lr"])
            if group[START] > HIGHEST_START:
                raise ValueError(
                    f"the rate {group[START]:g} is too high to start with, as Automagic raises it by itself: "
                    "use --learning_rate 1e-6"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Update all weights that have gradients. A closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_weight(weight, weight.grad.float(), group)

    def _step_weight(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        update = normalize(gradient, state, group["beta2"], group["eps"])
        size = update.square().mean().sqrt()
        update /= (size / group["clip_threshold"]).clamp_(min=1.0)
        is_positive = update > 0
        if "count" not in state:  # the first update agrees with none
            state["count"] = torch.zeros_like(weight, dtype=torch.int16)
        else:
            change = (is_positive == state["is_positive"]).to(torch.int16).mul_(2).sub_(1)
            lowest, highest = count_limits(group)
            state["count"].add_(change).clamp_(lowest, highest)
        state["is_positive"] = is_positive
        rates = element_rates(state["count"], group)
        if group["weight_decay"]:
            weight.sub_(weight * rates * group["weight_decay"])
        weight.sub_(update.mul_(rates))


def count_limits(group: Mapping[str, Any]) -> tuple[int, int]:
    """Return the counts at which the rate of an element reaches its lowest and its highest value."""
    lowest = -round((group[START] - group["min_lr"]) / group["lr_bump"])
    highest = round((group["max_lr"] - group[START]) / group["lr_bump"])
    return max(min(lowest, 0), -MAX_COUNT), min(max(highest, 0), MAX_COUNT)


def element_rates(count: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return the rate of each element: where it started plus its count of bumps, times the schedule."""
    factor = group["lr"] / group[START] if group[START] else 0.0
    rates = count.float().mul_(group["lr_bump"]).add_(group[START])
    return rates.clamp_(group["min_lr"], group["max_lr"]).mul_(factor)


def normalize(gradient: Tensor, state: dict[str, Any], beta2: float, eps: float) -> Tensor:
    """Return a gradient divided by the root of its mean square; the mean is kept by rows and columns.

    Args:
        gradient: The gradient, float32.
        state: Of the weight; the means are updated.
        beta2: Decay of the means.
        eps: Added to squares.
    """
    square = gradient.square().add_(eps)
    if gradient.ndim < 2:
        if "mean_square" not in state:
            state["mean_square"] = torch.zeros_like(square)
        return gradient * state["mean_square"].lerp_(square, 1 - beta2).rsqrt()
    rows, columns = square.mean(dim=-1), square.mean(dim=-2)
    if "row_mean_square" not in state:
        state["row_mean_square"] = torch.zeros_like(rows)
        state["column_mean_square"] = torch.zeros_like(columns)
    row_means = state["row_mean_square"].lerp_(rows, 1 - beta2)
    column_means = state["column_mean_square"].lerp_(columns, 1 - beta2)
    row_factor = (row_means / row_means.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
    return gradient * row_factor * column_means.rsqrt().unsqueeze(-2)
