"""What scales positions and texts in the FramePack transformer: from the command line to what it computes."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frame_pack.family import HISTORY, FramePack, family_for_generation
from frame_pack.options import FramePackGenerationOptions
from hunyuan_model.options import AS_TRAINED
from hunyuan_model.token_refiner import FRAMEPACK_REFINER, multiply_text
from modules.contract.data import Conditions
from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from tests.frame_pack.making import tiny_inputs, tiny_model
from tests.tiny.framepack_dit import tiny_state, write_dit

INPUTS = tiny_inputs((7,))
NAMES = {"llama_vec": "llama", "llama_attention_mask": "llama_mask", "clip_l_pooler": "clip_l"}
NAMES |= {name: latents for name, (latents, _) in HISTORY.items()}
CONDITIONS: Conditions = {ours: INPUTS[theirs] for ours, theirs in NAMES.items()} | {
    name: value
    for name, value in INPUTS.items()
    if name in ("guidance", "image_embeddings") or name.endswith("indices")
}


def options(*words: str) -> FramePackGenerationOptions:
    parser = argparse.ArgumentParser()
    add_options(parser, FramePackGenerationOptions)
    return read_options(FramePackGenerationOptions, parser.parse_args(list(words)))


def velocity(
    family: FramePack, dit: nn.Module, timestep: float, guidance: torch.dtype = torch.float32
) -> Tensor:
    conditions = {**CONDITIONS, "guidance": INPUTS["guidance"].to(guidance)}
    return family.predict(dit, INPUTS["noisy"], torch.tensor([timestep]), conditions)


def scaled(dit: nn.Module, timestep: float, factor: float, guidance: torch.dtype = torch.float32) -> Tensor:
    given: dict[str, Any] = INPUTS | {
        "timesteps": torch.tensor([timestep]),
        "guidance": INPUTS["guidance"].to(guidance).float(),
    }
    return dit(**given, position_scale=factor)


def test_positions_are_scaled_from_the_threshold_on() -> None:
    family, dit = family_for_generation(options("--rope_scaling_timestep_threshold", "800")), tiny_model()

    assert torch.equal(velocity(family, dit, 799.0), scaled(dit, 799.0, 1.0))
    assert torch.equal(velocity(family, dit, 800.0), scaled(dit, 800.0, 0.5))
    assert not torch.equal(scaled(dit, 800.0, 0.5), scaled(dit, 800.0, 1.0))
    family = family_for_generation(
        options("--rope_scaling_timestep_threshold", "800", "--rope_scaling_factor", "0.7")
    )
    assert torch.equal(velocity(family, dit, 900.0), scaled(dit, 900.0, 0.7))


def test_the_text_is_multiplied_in_the_transformer_that_is_loaded(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state())
    family = family_for_generation(options("--dit", str(path), "--te_multiplier", "1.3", "0.7"))
    expected = tiny_model()
    plain = expected(**INPUTS)
    multiply_text(expected, FRAMEPACK_REFINER, 1.3, 0.7)

    found = family.load_dit(Placement(torch.device("cpu")))(**INPUTS)

    assert torch.equal(found, expected(**INPUTS))
    assert not torch.equal(found, plain)
    unchanged = replace(family, files=replace(family.files, reading=AS_TRAINED)).load_dit(
        Placement(torch.device("cpu"))
    )
    assert torch.equal(unchanged(**INPUTS), plain)
