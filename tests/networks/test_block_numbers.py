"""Ranks and learning rates of a U-Net's blocks, by the numbers of known trainers."""

import re
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from modules.errors import OptionError
from networks.block_numbers import read_rate_factors
from networks.builtin_networks import build_network, select_modules
from networks.lora_settings import read_settings
from protocols.family import DitSpec
from stable_diffusion.training_files import number_blocks, unet_spec
from tests.tiny.loras import network_options
from tests.tiny.stable_diffusion import KINDS, RELEASED_UNETS


@cache
def released_unet(kind: str) -> nn.Module:
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**RELEASED_UNETS[kind])
    unet.spec = unet_spec(dict(unet.config))  # type: ignore[assignment, arg-type]
    return unet


def choose(unet: nn.Module, **arguments: str) -> dict[str, tuple[int, float]]:
    targets = select_modules(unet, read_settings(4, 2.0, None, arguments))
    return {name: (target.rank, target.alpha) for name, target in targets.items()}


@pytest.mark.parametrize(("kind", "linear", "with_conv"), [("sd1", 192, 278), ("sdxl", 722, 788)])
def test_a_lora_is_on_the_modules_of_known_trainers(kind: str, linear: int, with_conv: int) -> None:
    """In SDXL 38 convolutions of 3x3, 11 shortcuts and 17 projections of times; in SD 1 50, 14 and 22."""
    unet = released_unet(kind)

    assert len(choose(unet)) == linear
    chosen = choose(unet, conv_dim="8", conv_alpha="1")
    assert len(chosen) == with_conv
    assert chosen["lora_unet_down_blocks_1_resnets_0_conv1"] == (8, 1.0)
    assert chosen["lora_unet_down_blocks_1_resnets_0_time_emb_proj"] == (4, 2.0)


def test_blocks_of_sd_1_have_the_numbers_of_known_trainers() -> None:
    unet = released_unet("sd1")
    numbered = number_blocks(RELEASED_UNETS["sd1"] | dict(unet.config))  # type: ignore[arg-type]

    assert numbered.count == 25
    pattern = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|upsamplers|downsamplers)\.(\d+)$")
    for path, _ in unet.named_modules():
        match = pattern.fullmatch(path)
        if match is not None:
            layer = 2 if "sampler" in match[3] else int(match[4])
            start = 1 if match[1] == "down" else 13
            assert numbered.number_of(f"{path}.x") == start + 3 * int(match[2]) + layer
    assert numbered.number_of("mid_block.attentions.0.proj_in") == 12


def test_blocks_of_sdxl_are_those_of_the_released_file() -> None:
    unet = released_unet("sdxl")
    dims = ",".join(str(number) for number in range(23))

    chosen = choose(unet, block_dims=dims, block_alphas=dims)

    assert chosen["lora_unet_down_blocks_1_attentions_0_proj_in"] == (5, 5.0)  # input_blocks_4_1
    assert chosen["lora_unet_mid_block_attentions_0_proj_in"] == (11, 11.0)  # middle_block_1
    assert chosen["lora_unet_up_blocks_1_attentions_2_proj_out"] == (18, 18.0)  # output_blocks_5_1


def test_blocks_of_rate_0_have_no_modules_and_others_have_rates_of_their_own() -> None:
    unet: Any = UNet2DConditionModel(**KINDS["sd1"].unet)
    unet.spec = unet_spec(dict(unet.config))
    arguments = {"down_lr_weight": "1,0.1", "mid_lr_weight": "0.5", "block_lr_zero_threshold": "0.1"}

    network = build_network("networks.lora", network_options("lora", 4, arguments=arguments), unet, {})

    kept = {name for name in network.names if "_down_blocks_" in name}
    assert kept
    assert not any("_down_blocks_0_attentions_0_" in name for name in kept)
    groups, labels = network.parameter_groups(0.01)
    rates = {label: group["lr"] for label, group in zip(labels, groups, strict=True)}
    assert rates == {"unet": 0.01, "unet x 0.5": 0.005}


def test_curves_and_short_lists_are_those_of_known_trainers(caplog: pytest.LogCaptureFixture) -> None:
    assert read_rate_factors("up_lr_weight", "reverse_linear+.25", 3) == [1.25, 0.75, 0.25]
    assert read_rate_factors("up_lr_weight", "sine", 3) == pytest.approx([0, 2**-0.5, 1])
    assert read_rate_factors("up_lr_weight", "0.5,0.25", 3) == [0.5, 0.25, 1.0]
    assert "missing ones are 1" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"block_dims": "4,4"}, "2 values, but this model has 25"),
        ({"block_alphas": "4,4"}, "needs block_dims"),
        ({"block_lr_zero_threshold": "0.1"}, "needs one of"),
        ({"up_lr_weight": "1,x"}, "not a number of at least 0"),
    ],
)
def test_wrong_lists_are_refused(arguments: dict[str, str], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        choose(released_unet("sd1"), **arguments)


def test_models_without_numbered_blocks_refuse_them() -> None:
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    network.spec = DitSpec(block_lists=("blocks",))  # type: ignore[assignment]
    with pytest.raises(OptionError, match="cannot be addressed by number"):
        choose(network, block_dims="1")
