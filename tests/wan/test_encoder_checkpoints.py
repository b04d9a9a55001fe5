"""Every published file layout of the three encoders loads; everything else is refused with a clear
message.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan
from checkpoints.opening import Checkpoint
from encoders.t5_network import T5Network, load_t5, read_t5
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.manifests import fit, manifest_names, tensor_list, write_hollow
from tests.tiny.wan_encoders import (
    clip_hf_tensors,
    clip_official_tensors,
    clip_tensors,
    t5_comfy_fp8_tensors,
    t5_hf_tensors,
    t5_tensors,
    vae22_tensors,
    vae_diffusers_tensors,
    vae_tensors,
)
from wan.clip import ClipConfig, WanClipVision, load_clip, read_clip
from wan.t5 import UMT5
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import read_vae

CPU = torch.device("cpu")
Read = Callable[[Checkpoint], LoadPlan[Any]]
READERS: tuple[tuple[str, Read, Callable[[Any], nn.Module]], ...] = (
    ("wan2.1-vae", read_vae, WanVae),
    ("wan2.2-vae", read_vae, WanVae),
    ("umt5", partial(read_t5, kind=UMT5), T5Network),
    ("clip-vision", read_clip, WanClipVision),
    ("clip-xlm", read_clip, WanClipVision),
)
PUBLISHED = [
    pytest.param(name, read, build, id=name)
    for start, read, build in READERS
    for name in manifest_names(start)
]


@pytest.mark.parametrize(("manifest", "read", "build"), PUBLISHED)
def test_published_files_fit_at_full_size(
    tmp_path: Path, manifest: str, read: Read, build: Callable[[Any], nn.Module]
) -> None:
    tensors = tensor_list(manifest)
    network = fit(write_hollow(tmp_path / "model.safetensors", tensors), read, build)
    if build is not WanClipVision:  # of CLIP the last block and the text tower are left out
        loaded = sum(tensor.numel() for tensor in network.state_dict().values())
        assert loaded == sum(math.prod(shape) for _, shape in tensors.values())


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
    return path


def prefixed(tensors: Mapping[str, Tensor], prefix: str, **others: Tensor) -> dict[str, Tensor]:
    return {**{prefix + name: tensor for name, tensor in tensors.items()}, **others}


@pytest.mark.parametrize(
    ("made", "name", "layout"),
    [
        *((vae_tensors, "vae.pth", layout) for layout in ("official", "wrapped")),
        *((vae_tensors, "vae.safetensors", layout) for layout in ("official", "prefixed", "all-in-one")),
        *((made, "vae.safetensors", "diffusers") for made in (vae_tensors, vae22_tensors)),
        (vae22_tensors, "vae.pth", "official"),
    ],
)
def test_every_vae_layout_gives_the_same_weights(
    tmp_path: Path, made: Callable[[], dict[str, Tensor]], name: str, layout: str
) -> None:
    tensors = made()
    other = {
        "model.diffusion_model.head.weight": torch.ones(2),
        "text_encoders.umt5xxl.shared.weight": torch.ones(2),
    }
    layouts: dict[str, dict[str, Tensor]] = {
        "official": tensors,
        "diffusers": vae_diffusers_tensors(tensors),
        "prefixed": prefixed(tensors, "first_stage_model."),
        "all-in-one": prefixed(tensors, "vae.", **other),
        "wrapped": {"state_dict": tensors},  # type: ignore[dict-item]
    }
    saved(tmp_path / name, layouts[layout])
    assert_equal(load_vae(tmp_path / name, CPU, torch.float32), tensors)


@pytest.mark.parametrize(
    "layout", ["official", "encoder prefix", "hf", "hf tied", "comfy", "all-in-one", "bare hf"]
)
def test_every_t5_layout_gives_the_same_weights(tmp_path: Path, layout: str) -> None:
    tensors = t5_tensors()
    hf = t5_hf_tensors(tensors)
    blob = torch.arange(9, dtype=torch.uint8)
    layouts = {
        "official": tensors,
        "encoder prefix": prefixed(tensors, "encoder."),
        "hf": hf,
        "hf tied": {**hf, "encoder.embed_tokens.weight": hf["shared.weight"]},
        "comfy": {**hf, "spiece_model": blob},
        "all-in-one": {
            **prefixed(hf, "text_encoders.umt5xxl.transformer."),
            "text_encoders.umt5xxl.spiece_model": blob,
            "vae.conv1.weight": torch.ones(2),
        },
        "bare hf": {
            "encoder.embed_tokens.weight" if name == "shared.weight" else name: value
            for name, value in hf.items()
        },
    }
    path = saved(tmp_path / "t5.safetensors", layouts[layout])
    assert_equal(load_t5(path, CPU, UMT5), tensors)


def test_plain_and_scaled_fp8_t5_files_load(tmp_path: Path) -> None:
    tensors = t5_tensors()
    plain = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    loaded = load_t5(saved(tmp_path / "plain.safetensors", plain), CPU, UMT5)
    assert_equal(loaded, {name: tensor.float().bfloat16() for name, tensor in plain.items()})
    stored, meant = t5_comfy_fp8_tensors(tensors)
    loaded = load_t5(saved(tmp_path / "scaled.safetensors", stored), CPU, UMT5)
    weight = "blocks.1.attn.q.weight"
    assert torch.equal(loaded.state_dict()[weight], meant[weight].bfloat16())


@pytest.mark.parametrize("layout", ["official", "half", "prefixed half", "hf"])
def test_every_clip_layout_gives_the_same_weights(tmp_path: Path, layout: str) -> None:
    tensors = clip_tensors()
    layouts = {
        "official": clip_official_tensors(tensors),
        "half": tensors,
        "prefixed half": prefixed(tensors, "visual."),
        "hf": {**clip_hf_tensors(tensors), "vision_model.embeddings.position_ids": torch.arange(257)[None]},
    }
    assert_equal(load_clip(saved(tmp_path / "clip.safetensors", layouts[layout]), CPU), tensors)


def assert_equal(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


LOADERS: dict[str, Callable[[Path], object]] = {
    "vae": lambda path: load_vae(path, CPU, torch.float32),
    "t5": lambda path: load_t5(path, CPU, UMT5),
    "clip": lambda path: load_clip(path, CPU),
}


@pytest.mark.parametrize(("wanted", "given"), list(itertools.permutations(LOADERS, 2)))
def test_a_file_of_another_model_is_named(tmp_path: Path, wanted: str, given: str) -> None:
    layouts = {"vae": vae_tensors, "t5": t5_tensors, "clip": lambda: clip_official_tensors(clip_tensors())}
    path = saved(tmp_path / "model.safetensors", layouts[given]())
    with pytest.raises(CheckpointError, match=rf"looks like [^;]*\(--{given}\)(.|\n)*to --{wanted}\."):
        LOADERS[wanted](path)


def test_a_t5_whose_blocks_share_one_position_table_is_refused(tmp_path: Path) -> None:
    tensors = t5_tensors()
    del tensors["blocks.1.pos_embedding.embedding.weight"]
    with pytest.raises(CheckpointError, match="T5 encoder, not an umT5"):
        load_t5(saved(tmp_path / "t5.safetensors", tensors), CPU, UMT5)


@pytest.mark.parametrize("lost", ["decoder.upsamples.0.upsamples.3", "encoder.downsamples.2.downsamples.2"])
def test_a_wan22_vae_without_one_of_its_resamplers_is_refused(tmp_path: Path, lost: str) -> None:
    tensors = {name: tensor for name, tensor in vae22_tensors().items() if not name.startswith(lost)}
    with pytest.raises(CheckpointError, match=r"the one of Wan2.2 by 4 and 16.*tensors are missing"):
        load_vae(saved(tmp_path / "vae.safetensors", tensors), CPU, torch.float32)


def test_a_stage_that_can_have_no_shortcut_is_refused(tmp_path: Path) -> None:
    name = "encoder.downsamples.0.downsamples.2.resample.1"
    tensors = vae22_tensors() | {f"{name}.weight": torch.ones(7, 8, 3, 3), f"{name}.bias": torch.ones(7)}
    with pytest.raises(CheckpointError, match="a stage from 8 to 7 channels cannot have a shortcut"):
        load_vae(saved(tmp_path / "vae.safetensors", tensors), CPU, torch.float32)


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


def test_in_16_bits_norms_and_residual_stay_float32(tmp_path: Path) -> None:
    save_file(clip_tensors(), tmp_path / "clip.safetensors")
    half = load_clip(tmp_path / "clip.safetensors", CPU, torch.bfloat16)
    exact = load_clip(tmp_path / "clip.safetensors", CPU, torch.float32).encode(image())
    assert half.dtype == torch.bfloat16
    assert half.pre_norm.weight.dtype == torch.float32
    features = half.encode(image())
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).abs().max() < 0.02 * exact.abs().max()
