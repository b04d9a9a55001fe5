"""Pixels go to tensors and back without a change."""

import numpy as np
import pytest
import torch

from post.pixels import to_pixels, to_tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_all_values_come_back(dtype: type, recwarn: pytest.WarningsRecorder) -> None:
    most = np.iinfo(dtype).max
    values = np.linspace(0, most, 3 * 60 * 70).astype(dtype).reshape(60, 70, 3)[:, ::2]  # not in one piece
    values.flags.writeable = False

    image = to_tensor(values, CPU)

    assert image.shape == (1, 3, 60, 35)
    assert image.dtype == torch.float32
    assert np.array_equal(to_pixels(image, dtype is np.uint16), values)
    assert not recwarn.list


def test_pixels_are_on_the_device_asked_for() -> None:
    assert to_tensor(np.zeros((2, 3, 3), np.uint8), torch.device("meta")).device.type == "meta"
