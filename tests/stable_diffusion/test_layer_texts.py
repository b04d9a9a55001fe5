"""Extended textual inversion: each cross-attention of the U-Net reads a text with vectors of its own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from stable_diffusion.assembling import list_cross_attentions
from stable_diffusion.contract import AskedPicture, PictureSettings
from stable_diffusion.making import Maker
from tests.parity.stable_diffusion import their_scheduler
from tests.stable_diffusion.asked import options
from tests.stable_diffusion.test_making import load, start_noise
from tests.tiny.stable_diffusion import TEXT_DIM, write_folder, write_sd1, write_sdxl

SIZE, STEPS, SCALE = 32, 3, 4.0
LAYERS = {
    "IN01": "down_blocks.0.attentions.0",
    "IN02": "down_blocks.0.attentions.1",
    "MID": "mid_block.attentions.0",
    "OUT03": "up_blocks.1.attentions.0",
    "OUT04": "up_blocks.1.attentions.1",
    "OUT05": "up_blocks.1.attentions.2",
}
PROMPT, AVOIDED = "a (blob:1.3) cat", "ugly blob1"
PICTURE = AskedPicture("line 1", PROMPT, AVOIDED, 5, PictureSettings(SIZE, SIZE, STEPS, SCALE), "")


def vectors(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, rows: Mapping[str, Tensor], name: str = "blob") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(rows), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def load_with(folder: Path, option: str, rows: Mapping[str, Tensor]) -> Maker:
    return load(folder, write_sd1, option, str(write(folder, rows)))


def all_of(rows: Tensor) -> dict[str, Tensor]:
    return {name: rows.clone() for name in LAYERS}


def make(maker: Maker, *pictures: AskedPicture) -> Tensor:
    return maker.make(pictures or [PICTURE], wants_images=False).latents


def test_released_models_have_sixteen_of_them() -> None:
    with torch.device("meta"):
        names = UNet2DConditionModel().state_dict()  # of the size of Stable Diffusion 1.x
    inner, outer = ("01", "02", "04", "05", "07", "08"), [f"{number:02d}" for number in range(3, 12)]
    wanted = [*(f"IN{number}" for number in inner), "MID", *(f"OUT{number}" for number in outer)]
    assert list(list_cross_attentions(names)) == wanted


def test_each_layer_reads_its_own_vectors(tmp_path: Path) -> None:
    """Against diffusers' U-Net, whose attentions are told what ordinary textual inversion makes of them."""
    rows = {name: vectors(number) for number, name in enumerate(LAYERS)}
    made = make(load_with(tmp_path / "all", "--XTI_embeddings", rows))

    alone = {
        name: load_with(tmp_path / name, "--textual_inversion_embeddings", {"emb_params": own})
        for name, own in rows.items()
    }
    contexts: dict[str, dict[str, Tensor]] = {
        text: {LAYERS[name]: maker.texts.encode(text).context[None] for name, maker in alone.items()}
        for text in (PROMPT, AVOIDED)
    }
    unet = UNet2DConditionModel.from_pretrained(write_folder("sd1", tmp_path / "theirs") / "unet")
    told: dict[str, Tensor] = {}
    for path in LAYERS.values():
        for name, module in unet.get_submodule(path).named_modules():
            if name.endswith("attn2"):

                def tell(_: Any, args: Any, kwargs: Any, path: str = path) -> Any:
                    return args, {**kwargs, "encoder_hidden_states": told[path]}

                module.register_forward_pre_hook(tell, with_kwargs=True)
    scheduler, latents = their_scheduler("ddim"), start_noise(5)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        said = {}
        for text, context in contexts.items():
            told |= context
            with torch.no_grad():
                said[text] = unet(latents, timestep, context[LAYERS["MID"]]).sample
        noise = said[AVOIDED] + SCALE * (said[PROMPT] - said[AVOIDED])
        latents = scheduler.step(noise, timestep, latents).prev_sample

    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))
    equal = make(load_with(tmp_path / "one", "--XTI_embeddings", all_of(rows["MID"])))
    assert (made - equal).abs().max() > 1e-3


def test_equal_vectors_are_ordinary_textual_inversion(tmp_path: Path) -> None:
    """With parts of a prompt too, and the U-Net is as before once a batch is made."""
    rows = vectors(1)
    extended = load_with(tmp_path / "a", "--XTI_embeddings", all_of(rows))
    usual = load_with(tmp_path / "b", "--textual_inversion_embeddings", {"emb_params": rows})
    parts = replace(PICTURE, prompt="a blob AND a dog", settings=replace(PICTURE.settings, parts=2))
    plain = replace(PICTURE, prompt="a dog", negative_prompt="")
    for picture in (PICTURE, parts, plain, PICTURE):
        assert torch.allclose(make(extended, picture), make(usual, picture), rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in extended.model.unet.modules())


def test_what_it_cannot_be_used_with_is_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path, all_of(vectors(1))))
    Image.new("RGB", (8, 8)).save(tmp_path / "guide.png")
    with pytest.raises(OptionError, match="--XTI_embeddings and --control_net_models do not work together"):
        options(
            *("--XTI_embeddings", path, "--control_net_models", "a", "--guide_image_path"),
            tmp_path / "guide.png",
        )
    with pytest.raises(OptionError, match="this is Stable Diffusion XL"):
        load(tmp_path / "xl", write_sdxl, "--XTI_embeddings", path)
    both = ["--XTI_embeddings", path, "--textual_inversion_embeddings"]
    with pytest.raises(CheckpointError, match="are both for the word blob"):
        load(tmp_path / "x", write_sd1, *both, str(write(tmp_path / "y", {"emb_params": vectors(1)})))
