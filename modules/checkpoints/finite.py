"""Find weights that are NaN or infinite while they are read: one pass over a tensor that is in memory
anyway.
"""

from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError

# fp8 has no minimum and maximum of its own: the lowest code without its sign bit that is no number
_LOWEST_CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
_SIGN = 0x80


def is_finite(tensor: Tensor) -> Tensor:
    """Return a bool without axes, on the tensor's device: whether no value is NaN or infinite. Whole numbers
    always are finite.

    It takes no memory of the tensor's size, and a tenth of the time of a copy on a CPU.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype == torch.float8_e8m0fnu:
        return tensor.view(torch.uint8).max() < 0xFF
    if tensor.dtype in _LOWEST_CODES:
        lowest = _LOWEST_CODES[tensor.dtype]
        return (tensor.view(torch.int8).max() < lowest) & (tensor.view(torch.uint8).max() < _SIGN + lowest)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return torch.isfinite(torch.stack(tensor.aminmax())).all()  # NaN wins in both


class FiniteCheck:
    """Raises CheckpointError for the first tensors of a file that are NaN or infinite.

    Results on a CPU count at once. Those on another device are read in `finish`, so that copies to it do not
    wait.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[tuple[str, Tensor]] = []

    def note(self, name: str, tensor: Tensor) -> None:
        """Look at a tensor of the file. On the meta device there is nothing to see."""
        if tensor.device.type == "meta":
            return
        result = is_finite(tensor)
        if tensor.device.type != "cpu":
            self._found.append((name, result))
        elif not result:
            wrong = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
            raise self._error([f"{name} ({wrong} of {tensor.numel()} values)"])

    def finish(self) -> None:
        """Read the results that are still on a device; call when the file is read."""
        if not self._found:
            return
        results = torch.stack([result for _, result in self._found]).tolist()
        wrong = [name for (name, _), good in zip(self._found, results, strict=True) if not good]
        self._found.clear()
        if wrong:
            raise self._error(wrong)

    def _error(self, names: list[str]) -> CheckpointError:
        more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
        return CheckpointError(
            f"{self._path} has weights that are NaN or infinite: {', '.join(names[:3])}{more}.\n"
            "  The file is damaged, or was saved by a training that diverged. Download or copy it again, or "
            "give another file.",
            self._path,
        )
