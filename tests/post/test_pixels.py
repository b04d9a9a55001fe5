"""Pixels go to tensors and back without a change."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from post.contract import to_pixels, to_tensor

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


class NoUnsigned(TorchDispatchMode):
    """A device that does not know 16 bits without a sign, as some of Apple's."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        assert all(getattr(leaf, "dtype", None) != torch.uint16 for leaf in tree_leaves([args, made])), func
        return made


def test_no_device_has_to_know_sixteen_bits_without_a_sign() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).repeat(3).reshape(256, 256, 3)

    with NoUnsigned():
        made = to_pixels(to_tensor(values, CPU), is_deep=True)

    assert np.array_equal(made, values)
    assert made.dtype == np.uint16
