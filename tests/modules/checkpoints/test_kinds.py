"""What a file is by the names of its tensors: every published file in tests/data/checkpoints."""

from pathlib import Path

import pytest

from modules.checkpoints.dialects import other_kind
from modules.checkpoints.kinds import kind_of
from modules.checkpoints.opening import open_checkpoint
from tests.manifests import manifest_names, tensor_list, write_hollow

# how the manifest's name begins -> a part of what its file is called
TOOLS = {
    "swinir": "SwinIR",
    "realesrgan": "Real-ESRGAN",
    "esrgan-x4-mid": "an ESRGAN or BSRGAN",
    "esrgan-x4-old": "old names",
    "gimmvfi-r": "GIMM-VFI R,",
    "gimmvfi-f": "GIMM-VFI F,",
    "raft": "RAFT,",
    "flowformer": "FlowFormer,",
    "gfpgan": "GFPGAN",
    "codeformer": "CodeFormer",
    "retinaface": "RetinaFace",
    "parsenet": "ParseNet",
    "taehv": "TAEHV",
    "taew": "TAEHV",
}
FAMILIES = {
    "wan2.1-vae": "Wan2.1 VAE",
    "wan2.2-vae": "VAE of Wan2.2",
    "wan": "Wan transformer",
    "umt5": "T5 encoder",
    "t5xxl": "T5 encoder",
    "clip-l-text": "CLIP text",
    "clip-vit-large": "CLIP text",
    "clip": "CLIP image",
    "sigclip": "SigLIP",
    "hunyuanvideo-vae": "VAE",
    "hunyuanvideo-t2v-dit-diffusers": "a transformer in diffusers",
    "hunyuanvideo": "HunyuanVideo transformer",
    "skyreels-v1-i2v-diffusers": "a transformer in diffusers",
    "skyreels-v1-t2v-diffusers": "a transformer in diffusers",
    "skyreels": "HunyuanVideo transformer",
    "framepack": "FramePack transformer",
    "chroma1": "Chroma",
    "flux1-ae": "a VAE for images",
    "flux1-dev-dit-diffusers": "a transformer in diffusers",
    "flux1": "FLUX",
    "lumina2": "Lumina-Image-2.0 transformer",
    "gemma2": "Gemma language model",
    "hunyuanimage": "HunyuanImage",
    "llava-llama3-vision": "CLIP image",
    "llava": "language model",
}


def expected(manifest: str) -> str:
    known = {**TOOLS, **FAMILIES}
    return next(text for start, text in known.items() if manifest.startswith(start))


@pytest.mark.parametrize("manifest", manifest_names(""))
def test_every_published_file_is_named_right(manifest: str) -> None:
    assert expected(manifest) in str(kind_of(tensor_list(manifest)))


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.input_blocks.0.0.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"]
)
def test_the_u_net_of_stable_diffusion_is_named(name: str) -> None:
    assert "Stable Diffusion" in str(kind_of([name, "first_stage_model.quant_conv.weight"]))


@pytest.mark.parametrize(
    "name",
    ["zero_convs.0.0.weight", "control_model.zero_convs.0.0.weight", "controlnet_down_blocks.0.weight"],
)
def test_a_control_net_is_not_called_a_checkpoint(name: str) -> None:
    prefix = name.partition("zero")[0]
    assert "a ControlNet (" in str(kind_of([f"{prefix}input_blocks.0.0.weight", name]))


def test_an_error_about_another_file_names_it(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "faces.safetensors", tensor_list("retinaface-mobile0.25"))
    with open_checkpoint(path) as checkpoint:
        error = other_kind(checkpoint, "an upscaler", "--model", "a SwinIR file")

    assert "it looks like a RetinaFace face detector" in str(error)
