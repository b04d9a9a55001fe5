"""What the golden cases of face networks share: the picture by formula, and weights at full size."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden_cases import make_weights
from tests.manifests import tensor_list


def wave_face(size: int, phase: float) -> Tensor:
    """The input that the descriptions state, 1 3 size size."""
    channel = torch.arange(3, dtype=torch.float64)[:, None, None]
    y = torch.arange(size, dtype=torch.float64)[:, None]
    x = torch.arange(size, dtype=torch.float64)
    turn = 2 * math.pi / size
    first = 0.5 * torch.sin(turn * ((2 + channel) * x + (1 + 2 * channel) * y) + phase)
    second = 0.4 * torch.cos(turn * ((5 - channel) * x - (3 + channel) * y) + 2 * phase + channel)
    return (first + second).float()[None]


def fill(network: nn.Module, manifest: str, case: dict[str, Any]) -> nn.Module:
    """Fill a network made on the meta device with a case's weights, after comparing their sums."""
    table = [[name, list(shape)] for name, (dtype, shape) in tensor_list(manifest).items() if dtype != "I64"]
    weights = make_weights(case["weights_model_key"], table)
    total = sum(float(weight.double().sum()) for weight in weights.values())
    assert math.isclose(total, case["weights_check"]["sum"], rel_tol=1e-4, abs_tol=1e-2)
    missing, _ = network.load_state_dict(weights, strict=False, assign=True)
    assert not missing
    return network.eval()


def assert_close(found: Tensor, expected: Tensor, rtol_of_max: float) -> None:
    """The tolerance of the descriptions: of the largest absolute value."""
    limit = rtol_of_max * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
