"""Run tests marked `gpu` on the emulated device: `python -m tests.emulated_cuda.testing -m gpu tests/gpu`.

All words go to pytest. Where the host waits, `torch.cuda.set_sync_debug_mode` warns or raises as on a GPU.
"""

import os
import sys
import warnings
from typing import Any

from tests.emulated_cuda import loading  # before all that imports torch

loading.compile_it()
loading.load()

MODES = {"default": 0, "warn": 1, "error": 2}
# torch does not see these
UNSEEN = {"event", "stream", "device"}


def main() -> None:
    import pytest
    import torch

    from tests.emulated_cuda.device import switch_on

    device, mode = switch_on(), [0]
    note = device.note

    def warn(kind: str, operation: str) -> None:
        note(kind, operation)
        if mode[0] and operation not in UNSEEN:
            said = f"called a synchronizing CUDA operation: {kind} {operation}"
            if mode[0] > 1:
                raise RuntimeError(said)
            warnings.warn(said, stacklevel=2)

    def change(wanted: Any) -> None:
        mode[0] = MODES.get(wanted, wanted)
        device.is_recording = bool(mode[0])

    device.note = warn  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode = change
    torch.cuda.get_sync_debug_mode = lambda: mode[0]
    code = pytest.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(int(code))  # as loaded kernels do not outlive torch


if __name__ == "__main__":
    main()
