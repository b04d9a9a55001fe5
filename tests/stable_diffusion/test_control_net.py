"""ControlNets: files in all layouts, and what they add to the U-Net, compared with diffusers' own."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from stable_diffusion.contract import SD1, UnetCall
from stable_diffusion.control_net import BatchGuides, check_control_nets, load_control_nets
from stable_diffusion.control_net_files import load_control_net
from stable_diffusion.network_options import ControlOptions, ControlSpec
from tests.manifests import write_hollow
from tests.stable_diffusion import loaded
from tests.tiny import control_nets
from tests.tiny.stable_diffusion import RELEASED_UNETS, ldm_unet, unet_state, write_sd1

CPU = torch.device("cpu")


def options_of(*paths: Path, **values: tuple[object, ...]) -> ControlOptions:
    return ControlOptions.from_defaults(control_net_models=paths, **values)


def theirs(kind: str, call: UnetCall, guides: Tensor, scale: float = 1.0, seed: int = 50) -> list[Tensor]:
    """The residuals of diffusers' own network."""
    down, mid = control_nets.control_net(kind, seed)(
        call.sample,
        torch.tensor(call.timestep),
        encoder_hidden_states=call.context,
        controlnet_cond=guides,
        conditioning_scale=scale,
        added_cond_kwargs=dict(call.added),
        return_dict=False,
    )
    return [*down, mid]


def residuals(call: UnetCall) -> list[Tensor]:
    down, mid = call.residuals
    return [*down, mid]


# Files


@pytest.mark.slow_cases("sd2-prefixed")
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("sd1", "released"),
        ("sd2", "prefixed"),
        ("sdxl", "diffusers"),
        ("sdxl", "released"),
        ("sd1", "folder"),
        ("sd1", "difference"),
    ],
)
def test_each_layout_gives_the_same_network(tmp_path: Path, kind: str, layout: str) -> None:
    path = control_nets.write_control_net(
        tmp_path / ("net" if layout == "folder" else "net.safetensors"), kind, layout
    )
    unet = loaded.unet_of(kind)

    words = loaded.OF_NAME[kind].title
    found = load_control_net(path, unet.config, words, CPU, torch.float32, unet).state_dict()

    wanted = control_nets.control_net_state(kind)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_torch_files_with_a_whole_model_are_read(tmp_path: Path) -> None:
    state = {
        f"control_model.{name}": each
        for name, each in control_nets.ldm_control_net(control_nets.control_net_state("sd1")).items()
    }
    beside = {f"model.diffusion_model.{name}": each for name, each in ldm_unet(unet_state("sd1")).items()}
    torch.save({"state_dict": {**state, **beside, "betas": torch.ones(3)}}, tmp_path / "whole.pth")

    check_control_nets(options_of(tmp_path / "whole.pth"), loaded.unet_of("sd1").config, SD1)


# What they add


def test_several_take_turns_in_sd1_and_are_averaged_in_sdxl(tmp_path: Path) -> None:
    guide = loaded.write_guide(tmp_path / "guide.png")
    images = loaded.pixels(guide).repeat(2, 1, 1, 1)
    for kind in ("sd1", "sdxl"):
        paths = [
            control_nets.write_control_net(tmp_path / f"{kind}{seed}.safetensors", kind, seed=seed)
            for seed in (50, 51)
        ]
        nets = load_control_nets(options_of(*paths), loaded.model_of(kind))
        assert nets is not None
        calls = [loaded.call_of(kind, step=step) for step in (0, 1)]
        wanted = [[theirs(kind, call, images, seed=seed) for seed in (50, 51)] for call in calls]

        with torch.no_grad(), nets.apply_to_batch([loaded.picture(guide)], 64, 48) as idea:
            assert idea is not None
            found = [residuals(idea(call)) for call in calls]

        for step, own in enumerate(found):
            for skip, each in enumerate(own):
                parts = [wanted[step][number][skip] for number in (0, 1)]
                one = parts[step] if kind == "sd1" else (parts[0] + parts[1]) / 2
                torch.testing.assert_close(each, one, atol=1e-5, rtol=1e-5)


def added(
    folder: Path, call: UnetCall, name: str = "net", parts: int = 1, size: tuple[int, int] = (64, 48)
) -> tuple[list[Tensor], Path]:
    """What the ControlNet of a file adds to a call, and its guide, which is 64 pixels wide."""
    guide = loaded.write_guide(folder / "guide.png", size=(64, 64 if size != (64, 48) else 48))
    path = control_nets.write_control_net(folder / f"{name}.safetensors", "sd1")
    nets = load_control_nets(options_of(path), loaded.model_of("sd1"))
    assert nets is not None
    with torch.no_grad(), nets.apply_to_batch([loaded.picture(guide, parts=parts)], *size) as idea:
        assert idea is not None
        return residuals(idea(call)), guide


def test_the_last_part_of_a_prompt_counts(tmp_path: Path) -> None:
    call = loaded.call_of("sd1")
    both = replace(call, context=torch.cat([-call.context, call.context], dim=1))

    found, guide = added(tmp_path, both, parts=2)

    wanted = theirs("sd1", call, loaded.pixels(guide).repeat(2, 1, 1, 1))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_shuffle_acts_beside_the_prompt_alone_and_everywhere_alike(tmp_path: Path) -> None:
    call = loaded.call_of("sd1")

    found, guide = added(tmp_path, call, name="a_Shuffle")

    for own, wanted in zip(found, theirs("sd1", call, loaded.pixels(guide).repeat(2, 1, 1, 1)), strict=True):
        torch.testing.assert_close(own[:1], wanted[:1].mean((2, 3), keepdim=True), atol=1e-5, rtol=1e-5)
        assert not own[1:].any()


def test_guides_follow_the_size_of_the_latents(tmp_path: Path) -> None:
    call = loaded.call_of("sd1")

    found, guide = added(tmp_path, call, size=(128, 96))  # the latents are half of it

    image = Image.open(guide).resize((64, 48), Image.Resampling.LANCZOS)
    resized = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None] / 255
    wanted = theirs("sd1", call, resized.repeat(2, 1, 1, 1))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# Wrong files


def test_other_files_are_named(tmp_path: Path) -> None:
    def holding(name: str) -> Path:
        return loaded.save(tmp_path / f"{name}.safetensors", {name: torch.zeros(1)})

    write = control_nets.write_control_net
    paths = {
        r"Stable Diffusion XL, but --ckpt is Stable Diffusion 1\.x": write(
            tmp_path / "xl.safetensors", "sdxl"
        ),
        "9 .* channels.*inpainting": write(tmp_path / "9.safetensors", "sd1", in_channels=9),
        "pass it to --control_net_lllite_models": control_nets.write_lllite(tmp_path / "lllite.safetensors"),
        "a model without ControlNet": write_sd1(tmp_path),
        "a T2I adapter": holding("body.0.block1.weight"),
        "an IP-Adapter": holding("ip_adapter.1.to_k_ip.weight"),
        "Control-LoRA": holding("lora_controlnet"),
        "several tasks": holding("task_embedding"),
        "an unknown model": holding("something"),
        "no such file": tmp_path / "missing.safetensors",
    }

    for words, path in paths.items():
        with pytest.raises(CheckpointError, match=words):
            check_control_nets(options_of(path), loaded.unet_of("sd1").config, SD1)


def test_a_cut_file_names_what_is_missing(tmp_path: Path) -> None:
    state = control_nets.ldm_control_net(control_nets.control_net_state("sd1"))
    del state["zero_convs.2.0.weight"]
    path = loaded.save(tmp_path / "net.safetensors", state)

    with pytest.raises(CheckpointError, match=r"missing: controlnet_down_blocks\.2\.weight"):
        load_control_nets(options_of(path), loaded.model_of("sd1"))


def test_the_number_of_guides_is_compared(tmp_path: Path) -> None:
    guide = loaded.write_guide(tmp_path / "guide.png")
    path = control_nets.write_control_net(tmp_path / "net.safetensors", "sd1")
    nets = load_control_nets(options_of(path), loaded.model_of("sd1"))
    assert nets is not None

    with pytest.raises(OptionError, match="line 1: 2 guide images, but --control_net_models has 1"):
        nets.apply_to_batch([loaded.picture(guide, guide)], 64, 48).__enter__()


# Sizes of the released ones


SMALL: dict[str, object] = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
FULL: list[tuple[str, str, dict[str, object]]] = [
    ("sd1", "released", {}),
    ("sd2", "diffusers", {}),
    ("sdxl", "diffusers", {}),
    ("sdxl", "diffusers", {"transformer_layers_per_block": (0, 0, 1)}),
    ("sdxl", "diffusers", SMALL),
]


def hollow(path: Path, kind: str, layout: str, sizes: dict[str, object]) -> Path:
    """A file with the tensors of a full-size ControlNet, without their data."""
    released = {name: one for name, one in RELEASED_UNETS[kind].items() if name != "up_block_types"}
    with torch.device("meta"):
        state = ControlNetModel(**{**released, **sizes}).state_dict()
    if layout == "released":
        state = control_nets.ldm_control_net(state)
    return write_hollow(path, {name: ("F16", tuple(tensor.shape)) for name, tensor in state.items()})


@pytest.mark.slow_cases("sdxl-diffusers-sizes2")
@pytest.mark.parametrize(("kind", "layout", "sizes"), FULL)
def test_those_of_released_sizes_fit(
    tmp_path: Path, kind: str, layout: str, sizes: dict[str, object]
) -> None:
    path = hollow(tmp_path / "net.safetensors", kind, layout, sizes)
    config = {"block_out_channels": (320, 640, 1280, 1280), **RELEASED_UNETS[kind]}

    check_control_nets(options_of(path), config, loaded.OF_NAME[kind])  # builds it, and compares all shapes


def test_a_released_one_of_xl_is_refused_for_sd1(tmp_path: Path) -> None:
    path = hollow(tmp_path / "net.safetensors", "sdxl", "diffusers", SMALL)

    with pytest.raises(CheckpointError, match="320, 640, 1280 in the ControlNet, 320, 640, 1280, 1280 in"):
        check_control_nets(options_of(path), RELEASED_UNETS["sd1"], SD1)


TWO = (Path("0.safetensors"), Path("1.safetensors"))


def test_edges_are_white_lines_at_the_size_of_the_picture(tmp_path: Path) -> None:
    image = np.zeros((96, 128, 3), dtype=np.uint8)
    image[32:64, 32:96] = (255, 128, 0)
    Image.fromarray(image).save(tmp_path / "guide.png")
    canny = ControlSpec(Path("net"), (63, 191), 1.0, 1.0)

    (found,) = BatchGuides(
        [canny], "--control_net_models", [loaded.picture(tmp_path / "guide.png")], 64, 48
    ).guides

    small = Image.fromarray(image).resize((64, 48), Image.Resampling.LANCZOS)
    edges = cv2.Canny(np.asarray(small.convert("L")), 63, 191)
    assert found.unique().tolist() == [0, 1]
    assert torch.equal(found[0, 0], torch.from_numpy(edges).float() / 255)
    assert torch.equal(found[0, 0], found[0, 2])


def test_values_belong_to_models_in_their_order() -> None:
    first, second = options_of(
        *TWO,
        control_net_preps=("none", "canny_10_20"),
        control_net_multipliers=(0.5, 2.0),
        control_net_ratios=(1.0, 0.25),
    ).specs

    assert first == ControlSpec(Path("0.safetensors"), None, 0.5, 1.0)
    assert second == ControlSpec(Path("1.safetensors"), (10, 20), 2.0, 0.25)
    assert options_of(TWO[0], control_net_preps=("canny",)).specs[0].canny == (63, 191)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"control_net_preps": ("canny",)}, "--control_net_preps has 1 value for 2 models"),
        ({"control_net_multipliers": (1.0, 1.0, 1.0)}, "--control_net_multipliers has 3 values for 2 models"),
        ({"control_net_ratios": (0.5,)}, "--control_net_ratios has 1 value for 2 models"),
        ({"control_net_preps": ("none", "openpose")}, "--control_net_preps openpose: only none and canny"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, tuple[object, ...]], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        options_of(*TWO, **values)
