"""FLUX's autoencoder against recorded numbers, diffusers and its files."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from encoders.autoencoder import SCALE, SHIFT, load_autoencoder
from tests.golden_cases import make_weights, read_case

CPU = torch.device("cpu")


def test_numbers_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("flux_ae")
    save_file(make_weights("flux-ae", case["weights"]), tmp_path / "ae.safetensors")
    network = load_autoencoder(tmp_path / "ae.safetensors", CPU, torch.float32)

    moments = network.moments(tensors["image"].unsqueeze(2)).squeeze(2)
    decoded = network.decode_unclamped(tensors["z"].unsqueeze(2)).squeeze(2)

    mean, log_variance = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, tensors["mean"], atol=3e-4, rtol=0)
    torch.testing.assert_close(log_variance, tensors["logvar"], atol=3e-4, rtol=0)
    latent = (mean + (log_variance / 2).exp() * tensors["noise"] - SHIFT) * SCALE
    torch.testing.assert_close(latent, tensors["latent"], atol=3e-4, rtol=0)
    torch.testing.assert_close(decoded, tensors["decoded"], atol=1e-3, rtol=0)
