"""The FLUX.1 and Chroma transformers against recorded vectors, against diffusers, and against themselves."""

import pytest
import torch

from flux.model import pack
from tests.flux.making import golden_model


@pytest.mark.parametrize("case", ["flux_dit_guidance", "flux_dit_noguidance"])
def test_flux_equals_the_recorded_output(case: str) -> None:
    model, description, stored = golden_model(case)
    tolerance = description["tolerance"]["out*"]
    given = (stored["latents"].unsqueeze(2), 1000 * stored["t"], stored["t5"])

    plain = model(*given, None, stored["pooled"], stored.get("guidance"))
    masked = model(*given, stored["t5_mask"], stored["pooled"], stored.get("guidance"))

    assert plain.dtype == torch.float32
    torch.testing.assert_close(pack(stored["latents"].unsqueeze(2)), stored["img"])
    torch.testing.assert_close(pack(plain), stored["out"], **tolerance)
    torch.testing.assert_close(plain.squeeze(2), stored["out_unpacked"], **tolerance)
    torch.testing.assert_close(pack(masked), stored["out_t5_mask"], **tolerance)


def test_chroma_equals_the_recorded_output() -> None:
    model, description, stored = golden_model("chroma_dit")
    timesteps = 1000 * stored["t"]

    rows = model.distilled_guidance_layer(timesteps, torch.zeros_like(timesteps))
    velocity = model(stored["latents"].unsqueeze(2), timesteps, stored["t5"], stored["t5_mask"])

    torch.testing.assert_close(rows, stored["mod_vectors"], rtol=0, **description["tolerance"]["mod_vectors"])
    torch.testing.assert_close(pack(velocity), stored["out"], **description["tolerance"]["out"])
