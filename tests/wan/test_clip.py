"""The CLIP image tower against recorded numbers and transformers."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.golden_cases import make_weights, read_case
from tests.tiny.wan_encoders import (
    CLIP_DIM,
    clip_config,
    clip_hf_tensors,
    clip_tensors,
)
from wan.clip import WanClipVision, load_clip
from wan.encoder_checkpoints import ClipConfig

CPU = torch.device("cpu")


def image(height: int = 37, width: int = 51, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_recorded_preprocessing_and_features_are_met() -> None:
    description, tensors = read_case("wan_clip_vision")
    sizes = description["config"]
    clip = WanClipVision(
        ClipConfig(
            dim=sizes["dim"],
            ffn_dim=sizes["dim"] * sizes["mlp_ratio"],
            num_heads=sizes["num_heads"],  # narrower heads than any file has
            num_layers=sizes["num_layers"] - 1,
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
        )
    )
    weights = make_weights(description["weights_model_key"], description["weights"])
    clip.load_state_dict({name: weights[name] for name in clip.state_dict()})

    prepared = clip.prepare(tensors["image_minus1_to_1"])
    features = clip.encode(tensors["image_minus1_to_1"])

    assert (prepared - tensors["preprocessed"]).abs().max() <= description["tolerance"]["preprocessed"][
        "atol"
    ]
    assert (features - tensors["features"]).abs().max() <= description["tolerance"]["features"]["atol"]


def test_features_equal_those_of_transformers(tmp_path: Path) -> None:
    tensors, config = clip_tensors(), clip_config()
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers + 1,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    ).eval()
    hf = {
        name: tensor
        for name, tensor in clip_hf_tensors(tensors).items()
        if name != "visual_projection.weight"
    }
    if not any(name.startswith("vision_model.") for name in theirs.state_dict()):
        hf = {name.removeprefix("vision_model."): tensor for name, tensor in hf.items()}
    missing, unexpected = theirs.load_state_dict(hf, strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    assert not unexpected
    save_file(tensors, tmp_path / "clip.safetensors")
    clip = load_clip(tmp_path / "clip.safetensors", CPU)
    pixels = image(batch=2)

    with torch.no_grad():
        expected = theirs(clip.prepare(pixels), output_hidden_states=True).hidden_states[-2]
    features = clip.encode(pixels)

    assert features.shape == (2, 257, CLIP_DIM)
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_in_16_bits_norms_and_residual_stay_float32(tmp_path: Path) -> None:
    save_file(clip_tensors(), tmp_path / "clip.safetensors")
    half = load_clip(tmp_path / "clip.safetensors", CPU, torch.bfloat16)
    exact = load_clip(tmp_path / "clip.safetensors", CPU, torch.float32).encode(image())
    assert half.dtype == torch.bfloat16
    assert half.pre_norm.weight.dtype == torch.float32
    features = half.encode(image())
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).abs().max() < 0.02 * exact.abs().max()
