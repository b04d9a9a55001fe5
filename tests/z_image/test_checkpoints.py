"""Files of Z-Image transformers: both layouts, full size, fp8, and what is refused by name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor

from modules import families
from modules.checkpoints.model_files import read_once
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.speed_options import Quantisation
from tests.manifests import tensor_list, write_hollow
from tests.tiny.z_image import CONFIG, comfy_state, tiny_state, write_dit
from z_image.checkpoints import load_dit, read_dit_header

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))
LAYOUTS = {"released": dict, "comfy": comfy_state}
Layout = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
BOTH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@BOTH
@pytest.mark.parametrize("form", ["safetensors", "sharded", "prefixed", "diffusers_sharded"])
def test_every_layout_gives_the_same_weights_and_dimensions(
    tmp_path: Path, layout: Layout, form: str
) -> None:
    state = tiny_state()
    path = write_dit(tmp_path, layout(state), form)

    loaded = load_dit(path, CPU).state_dict()

    assert read_once(path, read_dit_header).config == CONFIG
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert families.identify(path) == "it is a Z-Image transformer (--dit)"


@BOTH
@pytest.mark.parametrize("form", ["fp8", "fp8_scaled", "fp8_row_scale", "fp8_weight_scale"])
def test_files_in_8_bits_load(tmp_path: Path, layout: Layout, form: str) -> None:
    state = tiny_state()

    loaded = load_dit(write_dit(tmp_path, layout(state), form), CPU).state_dict()

    for name, tensor in state.items():
        assert loaded[name].dtype.itemsize > 1
        assert (loaded[name].float() - tensor).abs().max() < 0.1 * tensor.abs().max(), name


@pytest.mark.parametrize("form", ["fp8", "fp8_scaled", "fp8_row_scale"])
def test_a_joined_weight_in_8_bits_is_cut_in_8_bits(tmp_path: Path, form: str) -> None:
    """Each part with its rows of the scale: it computes what the weight in 16 bits does."""
    path = write_dit(tmp_path, comfy_state(tiny_state()), form)
    kept = load_dit(path, Placement(torch.device("cpu"), fp8=Quantisation("cast")))
    wide = load_dit(path, CPU)
    x = torch.randn(3, CONFIG.dim, generator=torch.Generator().manual_seed(0)).bfloat16()

    for letter in "qkv":
        name = f"layers.1.attention.to_{letter}"
        assert kept.get_parameter(f"{name}.weight").dtype == torch.float8_e4m3fn
        found, expected = kept.get_submodule(name)(x), wide.get_submodule(name)(x)
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_modulation_stays_in_16_bits(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16))
    dit = load_dit(path, Placement(torch.device("cpu"), fp8=Quantisation("scaled")))

    in_8_bits = {name for name, weight in dit.state_dict().items() if weight.dtype.itemsize == 1}

    inside = {name.split(".", 2)[2] for name in in_8_bits}
    assert {"attention.to_q.weight", "attention.to_out.0.weight", "feed_forward.w2.weight"} <= inside
    assert all(name.startswith("layers.") and "modulation" not in name for name in in_8_bits)


@pytest.mark.parametrize("manifest", ["z-image-dit", "z-image-dit-comfy"])
def test_the_released_file_loads_without_leftovers(tmp_path: Path, manifest: str) -> None:
    tensors = tensor_list(manifest)
    if manifest == "z-image-dit-comfy":
        tensors = {**tensors, "norm_final.weight": ("BF16", [3840])}  # in some files
    dit = load_dit(write_hollow(tmp_path / "dit.safetensors", tensors), META)

    assert sum(weight.numel() for weight in dit.parameters()) == 6154908736
    assert (dit.config.num_layers, dit.config.dim, dit.config.num_heads) == (30, 3840, 30)
    assert dit.config.rotary_widths == (32, 48, 48)
    assert dit.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("network", "settings", "words"),
    [
        (ZImageTransformer2DModel, {"siglip_feat_dim": 16, "n_layers": 1}, "Z-Image-Omni"),
        (
            ZImageControlNetModel,
            {"n_refiner_layers": 1, "control_layers_places": [0], "control_in_dim": 16},
            "a ControlNet of Z-Image",
        ),
    ],
)
def test_relatives_are_refused_by_name(
    network: type, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        names = network(**settings).state_dict()
    path = write_hollow(
        tmp_path / "dit.safetensors", {name: ("BF16", list(one.shape)) for name, one in names.items()}
    )
    with pytest.raises(CheckpointError, match=rf"{words}.*not supported yet(.|\n)*--dit"):
        load_dit(path, META)


def test_a_relative_of_pixels_is_refused(tmp_path: Path) -> None:
    state = {**tiny_state(), "all_x_embedder.2-1.weight": torch.zeros(CONFIG.dim, 12)}
    with pytest.raises(CheckpointError, match="takes 3 channels.*such as Zeta-Chroma or L2P"):
        load_dit(write_dit(tmp_path, state), CPU)


@pytest.mark.parametrize("name", ["all_x_embedder.2-1.weight", "layers.0.feed_forward.w1.weight"])
def test_an_incomplete_file_is_refused(name: str, tmp_path: Path) -> None:
    state = tiny_state()
    del state[name]
    with pytest.raises(CheckpointError, match=f"incomplete Z-Image transformer: {name} is missing"):
        load_dit(write_dit(tmp_path, state), CPU)


@BOTH
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.to_k.weight", ()),
        ("layers.0.attention.norm_q.weight", (0,)),
        ("layers.0.attention.norm_q.weight", (40,)),
        ("all_x_embedder.2-1.weight", (0, 64)),
        ("layers.0.attention.to_q.weight", (95, 96)),
    ],
)
def test_sizes_without_sense_are_one_message(
    layout: Layout, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = {**layout(tiny_state()), name: torch.zeros(shape)}
    if layout is comfy_state:
        state["layers.0.attention.qkv.weight"] = torch.zeros(shape)
    path = write_dit(tmp_path, state)
    families.identify(path)  # every family looks at it
    with pytest.raises(CheckpointError):
        load_dit(path, CPU)
