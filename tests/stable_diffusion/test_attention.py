"""Attention of a U-Net by the back end of the command line."""

from pathlib import Path

import pytest
import torch

from modules.speed_options import AttentionChoice
from protocols.data import SIZES
from protocols.loading import Placement
from stable_diffusion.attention import ChosenAttention
from tests.stable_diffusion.test_training_step import make_family

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_chosen_back_end_computes_what_diffusers_does(tmp_path: Path, kind: str) -> None:
    family = make_family(kind, tmp_path)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 1, 8, 8, generator=generator)
    conditions = {key: torch.randn(2, 77, 64, generator=generator) for key in family.text_keys - {"pool2"}}
    conditions |= {"pool2": torch.randn(2, 64, generator=generator), SIZES: torch.full((2, 6), 64.0)}

    outputs = []
    for choice in (AttentionChoice("sdpa"), AttentionChoice("sdpa", split=True)):
        unet = family.load_dit(Placement(CPU, attention=choice))
        processors = {type(processor) for processor in unet.attn_processors.values()}  # type: ignore[union-attr, operator]
        assert (processors == {ChosenAttention}) == choice.split
        outputs.append(family.predict(unet, noisy, torch.tensor([1.0, 900.0]), conditions))

    # sums of 64 numbers in another order
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
