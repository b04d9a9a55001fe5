"""What is told of a device."""

import pytest
import torch

from modules.devices import warn_if_emulated

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("processor", "device", "dtype", "is_told"),
    [
        ("AVX2", CPU, torch.bfloat16, True),
        ("AVX512", CPU, torch.bfloat16, False),
        ("AVX2", CPU, torch.float32, False),
        ("AVX2", torch.device("cuda"), torch.bfloat16, False),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_told(
    processor: str,
    device: torch.device,
    dtype: torch.dtype,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)

    warn_if_emulated(device, dtype, "the VAE")

    assert ("the VAE computes in bfloat16" in caplog.text) == is_told
