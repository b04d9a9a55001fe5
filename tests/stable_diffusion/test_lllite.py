"""ControlNet-LLLite, compared with a plain computation of its description on a tiny SDXL U-Net."""

from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from modules.errors import CheckpointError
from stable_diffusion.contract import SD1, SDXL, UnetCall
from stable_diffusion.lllites import check_lllites, load_lllites
from stable_diffusion.network_options import ControlOptions
from tests.stable_diffusion.controlling import call_of, model_of, picture, pixels, unet_of, write_guide
from tests.tiny.control_nets import lllite_state, write_control_net, write_lllite

PLACES = {
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_1": "down_blocks.1.attentions.1",
    "middle_block_1": "mid_block.attentions.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_2_1": "up_blocks.0.attentions.2",
}
CONVOLUTION = {"lllite_unet_input_blocks_4_0_out_layers_3": 128}


def options_of(*paths: Path, **values: tuple[float, ...]) -> ControlOptions:
    return ControlOptions.usual(control_net_lllite_models=paths, **values)


def run(unet: UNet2DConditionModel, call: UnetCall) -> Tensor:
    with torch.no_grad():
        return unet(
            call.sample, call.timestep, encoder_hidden_states=call.context, added_cond_kwargs=dict(call.added)
        ).sample


def layer_of(unet: UNet2DConditionModel, name: str) -> torch.nn.Module:
    """The layer of a name such as lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q."""
    block, _, rest = name.removeprefix("lllite_unet_").partition("_transformer_blocks_")
    number, attention, kind = rest.split("_", 2)
    return unet.get_submodule(f"{PLACES[block]}.transformer_blocks.{number}.{attention}.{kind}")


def wrap(unet: UNet2DConditionModel, state: dict[str, Tensor], guides: Tensor, multiplier: float) -> None:
    """Change a U-Net for good, by the formula. guides: R 3 H W in -1..1."""
    for name in {name.partition(".")[0] for name in state}:
        weights = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if name + "." in key}
        layer = layer_of(unet, name)
        told = functional.conv2d(
            guides, weights["conditioning1.0.weight"], weights["conditioning1.0.bias"], stride=4
        )
        told = functional.conv2d(
            told.relu(), weights["conditioning1.2.weight"], weights["conditioning1.2.bias"], stride=4
        )
        layer.forward = changed(layer.forward, weights, told.flatten(2).transpose(1, 2), multiplier)


def changed(forward, weights: dict[str, Tensor], told: Tensor, multiplier: float):  # type: ignore[no-untyped-def]
    def linear(part: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[f"{part}.0.weight"], weights[f"{part}.0.bias"])

    def new(x: Tensor) -> Tensor:
        joined = torch.cat([told, linear("down", x).relu()], dim=2)
        return forward(x + multiplier * linear("up", linear("mid", joined).relu()))

    return new


def test_the_u_net_with_two_is_as_described(tmp_path: Path) -> None:
    guides = [write_guide(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    paths = [write_lllite(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (60, 61)]
    model, call = model_of("sdxl"), call_of("sdxl")
    lllites = load_lllites(options_of(*paths, control_net_multipliers=(0.8, 0.5)), model)
    assert lllites is not None
    before = run(model.unet, call)

    with torch.no_grad(), lllites.for_batch([picture(*guides)], 64, 64) as idea:
        assert idea is not None
        found = run(model.unet, idea(call))

    plain = unet_of("sdxl")
    for seed, guide, multiplier in zip((60, 61), guides, (0.8, 0.5), strict=True):
        wrap(plain, lllite_state(seed=seed), pixels(guide).repeat(2, 1, 1, 1) * 2 - 1, multiplier)
    torch.testing.assert_close(found, run(plain, call), atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-2
    assert torch.equal(run(model.unet, call), before)  # nothing is left in it


def test_a_layer_that_convolves_is_changed_at_its_places(tmp_path: Path) -> None:
    guide, path = write_guide(tmp_path / "guide.png"), tmp_path / "net.safetensors"
    write_lllite(path, layers=CONVOLUTION, convolution=True)
    model, call = model_of("sdxl"), call_of("sdxl")
    lllites = load_lllites(options_of(path), model)
    layer = model.unet.get_submodule("down_blocks.1.resnets.0.conv2")
    seen: list[Tensor] = []
    assert lllites is not None

    with torch.no_grad(), lllites.for_batch([picture(guide)], 64, 48) as idea:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        assert idea is not None
        run(model.unet, idea(call))
    run(model.unet, call)

    state = {
        name.partition(".")[2]: tensor for name, tensor in lllite_state(CONVOLUTION, convolution=True).items()
    }
    told = pixels(guide).repeat(2, 1, 1, 1) * 2 - 1
    for place in (0, 2):
        weight, bias = state[f"conditioning1.{place}.weight"], state[f"conditioning1.{place}.bias"]
        told = functional.conv2d(told if place == 0 else told.relu(), weight, bias, stride=4)
    x = seen[1]
    for part in ("down", "mid", "up"):
        x = functional.conv2d(x, state[f"{part}.0.weight"], state[f"{part}.0.bias"])
        x = torch.cat([told, x.relu()], dim=1) if part == "down" else x.relu() if part == "mid" else x
    torch.testing.assert_close(seen[0], seen[1] + x, atol=1e-5, rtol=1e-5)


def made_with(folder: Path, width: int, height: int, *calls: UnetCall) -> list[Tensor]:
    """What the U-Net makes of calls in a batch of that size, with a net and a guide."""
    path, guide = write_lllite(folder / "net.safetensors"), write_guide(folder / "guide.png")
    model = model_of("sdxl")
    lllites = load_lllites(options_of(path), model)
    assert lllites is not None
    with torch.no_grad(), lllites.for_batch([picture(guide)], width, height) as idea:
        assert idea is not None
        return [run(model.unet, idea(call)) for call in calls]


def test_guides_follow_latents_that_grow(tmp_path: Path) -> None:
    small, large = (call_of("sdxl", size=size) for size in ((32, 24), (64, 48)))

    assert torch.equal(made_with(tmp_path, 64, 48, small, large)[1], made_with(tmp_path, 64, 48, large)[0])


@pytest.mark.parametrize(("width", "height"), [(72, 40), (8, 24)])
def test_sizes_that_levels_round_up_fit(tmp_path: Path, width: int, height: int) -> None:
    call = call_of("sdxl", size=(width, height))

    assert made_with(tmp_path, width, height, call)[0].shape == call.sample.shape


# Wrong files


def test_sd1_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is for Stable Diffusion XL, but --ckpt is .* 1\.x"):
        check_lllites(options_of(write_lllite(tmp_path / "net.safetensors")), SD1)


def test_other_files_are_named(tmp_path: Path) -> None:
    paths = {
        "looks like": write_control_net(tmp_path / "control.safetensors", "sdxl"),
        "another model": write_lllite(tmp_path / "dit.safetensors", layers={"lllite_dit_blocks_0_q": 16}),
        "does not have": write_lllite(
            tmp_path / "far.safetensors", layers={"lllite_unet_input_blocks_99_1_x": 16}
        ),
        "no such file": tmp_path / "missing.safetensors",
    }

    for words, path in paths.items():
        with pytest.raises(CheckpointError, match=words):
            check_lllites(options_of(path), SDXL)


def test_other_widths_are_refused(tmp_path: Path) -> None:
    layers = {"lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q": 640}

    with pytest.raises(CheckpointError, match="640 channels, and the model has 128 x 128 there"):
        load_lllites(options_of(write_lllite(tmp_path / "net.safetensors", layers=layers)), model_of("sdxl"))
