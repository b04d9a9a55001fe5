"""Files of the HunyuanVideo VAE: dialects, containers, prefixes, dimensions; and files that are none."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from torch import Tensor

from hunyuan_model.vae import HunyuanVae, load_vae
from hunyuan_model.vae_blocks import HunyuanVaeConfig
from hunyuan_model.vae_checkpoints import read_vae
from modules.checkpoints.filling import load_module
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from tests.manifests import manifest_names, tensor_list, write_hollow
from tests.tiny.hunyuan_vae import vae_comfy_tensors, vae_config, vae_tensors
from tests.tiny.wan_encoders import vae_tensors as wan_vae_tensors

CPU = torch.device("cpu")


def loaded(path: Path) -> HunyuanVae:
    return load_vae(path, CPU, torch.float32)


def assert_same(vae: HunyuanVae, tensors: dict[str, Tensor]) -> None:
    state = vae.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("manifest", manifest_names("hunyuanvideo-vae"))
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_published_files_fit_tensor_for_tensor(tmp_path: Path, manifest: str, prefix: str) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list(manifest), prefix)
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        with torch.device("meta"):
            vae = HunyuanVae(plan.config)
        load_module(
            vae, plan.checkpoint, plan.sources, device=torch.device("meta"), dtype=lambda *_: torch.float16
        )
    assert plan.config == HunyuanVaeConfig(16, 32, (128, 256, 512, 512), 2, (512, 512, 256, 128), 3)
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float16}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_official_pickled_file_loads(tmp_path: Path, wrapped: bool, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in vae_tensors().items()}
    torch.save({"state_dict": tensors} if wrapped else tensors, tmp_path / "pytorch_model.pt")
    assert_same(loaded(tmp_path / "pytorch_model.pt"), vae_tensors())


def test_the_comfyui_file_gives_the_same_weights(tmp_path: Path) -> None:
    save_file(vae_comfy_tensors(vae_tensors()), tmp_path / "vae.safetensors")
    assert_same(loaded(tmp_path / "vae.safetensors"), vae_tensors())


def test_an_all_in_one_file_gives_its_vae(tmp_path: Path) -> None:
    others = {"model.model.img_in.proj.bias": torch.zeros(4), "text_encoders.llama.weight": torch.zeros(4)}
    tensors = {f"vae.{name}": tensor for name, tensor in vae_tensors().items()}
    save_file({**tensors, **others}, tmp_path / "all.safetensors")
    assert_same(loaded(tmp_path / "all.safetensors"), vae_tensors())


def test_a_folder_of_diffusers_loads_with_the_groups_it_states(tmp_path: Path) -> None:
    config = vae_config()
    theirs = AutoencoderKLHunyuanVideo(block_out_channels=config.encoder, norm_num_groups=8).eval()
    theirs.load_state_dict(vae_tensors())
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)).clamp_(-1, 1)

    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        vae = loaded(path)
        assert_same(vae, vae_tensors())
        with torch.no_grad():
            torch.testing.assert_close(
                vae.encode(pixels), theirs.encode(pixels).latent_dist.mean, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("width", [8, 16, 128])
def test_without_a_config_two_channels_form_a_group_and_at_most_32_are(tmp_path: Path, width: int) -> None:
    path = write_hollow(
        tmp_path / "vae.safetensors",
        {name: ("F32", tuple(t.shape)) for name, t in meta_tensors(width).items()},
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "Another", "norm_num_groups": 1}), encoding="utf-8"
    )
    with open_checkpoint(path) as checkpoint:
        assert read_vae(checkpoint).config == vae_config(width)


def meta_tensors(width: int = 8, z: int = 16) -> dict[str, Tensor]:
    with torch.device("meta"):
        return HunyuanVae(vae_config(width, z)).state_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"_class_name": "AutoencoderKLCausal3D", "norm_num_groups": 3}',
            "8 channels cannot be divided into 3 norm groups",
        ),
        ('{"_class_name": "AutoencoderKLCausal3D", "norm_num_groups": 0}', "is 0, it must be 1 or more"),
        ('{"_class_name": ', "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    save_file(vae_tensors(), tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "vae.safetensors")


def test_another_vae_is_named(tmp_path: Path) -> None:
    save_file(wan_vae_tensors(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a HunyuanVideo VAE; it looks like a Wan2.1 VAE"):
        loaded(tmp_path / "vae.safetensors")


def test_missing_levels_and_tensors_are_named(tmp_path: Path) -> None:
    tensors = {
        name: tensor for name, tensor in vae_tensors().items() if not name.startswith("decoder.up_blocks.3.")
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.up_blocks has 3 levels, HunyuanVideo's has 4"):
        loaded(tmp_path / "vae.safetensors")
    tensors = vae_tensors()
    del tensors["encoder.mid_block.attentions.0.to_q.weight"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: encoder\.mid_block\.attentions\.0\.to_q\.weight"):
        loaded(tmp_path / "vae.safetensors")


def test_another_number_of_latent_channels_is_refused(tmp_path: Path) -> None:
    save_file(
        {name: torch.zeros(tensor.shape) for name, tensor in meta_tensors(z=8).items()},
        tmp_path / "vae.safetensors",
    )
    with pytest.raises(CheckpointError, match="8 latent channels"):
        loaded(tmp_path / "vae.safetensors")
