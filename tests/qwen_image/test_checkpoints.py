"""Files of Qwen-Image transformers: every layout, full size, fp8, and what is refused by name."""

from pathlib import Path

import pytest
import torch

from modules import families
from modules.checkpoints.model_files import read_once
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.speed_options import Quantisation
from qwen_image.checkpoints import load_dit, read_dit_header
from tests.manifests import tensor_list, write_hollow
from tests.tiny.qwen_image import CONFIG, tiny_state, write_dit

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "prefixed", "diffusers_sharded"])
def test_every_layout_gives_the_same_weights_and_dimensions(tmp_path: Path, layout: str) -> None:
    state = tiny_state()
    path = write_dit(tmp_path, state, layout)

    loaded = load_dit(path, CPU).state_dict()

    assert read_once(path, read_dit_header).config == CONFIG
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert families.identify(path) == "it is a Qwen-Image transformer (--dit)"


@pytest.mark.parametrize("layout", ["fp8", "fp8_scaled"])
def test_files_in_8_bits_load(tmp_path: Path, layout: str) -> None:
    state = tiny_state()

    loaded = load_dit(write_dit(tmp_path, state, layout), CPU).state_dict()

    for name, tensor in state.items():
        assert loaded[name].dtype.itemsize > 1
        assert (loaded[name].float() - tensor).abs().max() < 0.1 * tensor.abs().max(), name


def test_modulation_stays_in_16_bits(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16))
    dit = load_dit(path, Placement(torch.device("cpu"), fp8=Quantisation("scaled")))

    in_8_bits = {name for name, weight in dit.state_dict().items() if weight.dtype.itemsize == 1}

    inside = {name.split(".", 2)[2] for name in in_8_bits}
    assert {"attn.to_q.weight", "img_mlp.net.0.proj.weight", "attn.to_add_out.weight"} <= inside
    assert all(name.startswith("transformer_blocks.") and "_mod" not in name for name in in_8_bits)


def test_the_released_file_loads_without_leftovers(tmp_path: Path) -> None:
    dit = load_dit(write_hollow(tmp_path / "dit.safetensors", tensor_list("qwen-image-dit")), META)

    assert sum(weight.numel() for weight in dit.parameters()) == 20430401088
    assert (dit.config.num_layers, dit.config.dim, dit.config.num_heads) == (60, 3072, 24)
    assert dit.compute_dtype == torch.bfloat16


def test_the_layered_model_is_refused_by_name(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list("qwen-image-layered-dit"))
    with pytest.raises(CheckpointError, match=r"Qwen-Image-Layered, which makes transparent(.|\n)*--dit"):
        load_dit(path, META)


@pytest.mark.parametrize("name", ["txt_in.weight", "transformer_blocks.0.attn.to_q.weight"])
def test_an_incomplete_file_is_refused(name: str, tmp_path: Path) -> None:
    state = tiny_state()
    del state[name]
    with pytest.raises(CheckpointError, match=f"incomplete Qwen-Image transformer: {name} is missing"):
        load_dit(write_dit(tmp_path, state), CPU)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer_blocks.0.attn.to_k.bias", ()),
        ("transformer_blocks.0.attn.norm_q.weight", (0,)),
        ("img_in.weight", (0, 64)),
    ],
)
def test_sizes_without_sense_are_one_message(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_dit(tmp_path, {**tiny_state(), name: torch.zeros(shape)})
    families.identify(path)  # every family looks at it
    with pytest.raises(CheckpointError):
        load_dit(path, CPU)
