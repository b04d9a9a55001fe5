"""Files of FLUX.2 transformers: every layout, full size, fp8, and what is refused by name."""

from pathlib import Path

import pytest
import torch

from flux.checkpoints import load_dit as load_flux
from flux_2.checkpoints import load_dit, read_dit_header
from modules import families
from modules.checkpoints.model_files import read_once
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.offload.swap_plan import most_blocks
from modules.speed_options import Quantisation
from tests.manifests import tensor_list, write_hollow
from tests.tiny import flux
from tests.tiny.flux_2 import CONFIGS, tiny_state, write_dit

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))


@pytest.mark.parametrize("kind", ["klein", "dev"])
@pytest.mark.parametrize("layout", ["safetensors", "sharded", "prefixed", "diffusers", "diffusers_sharded"])
def test_every_layout_gives_the_same_weights_and_dimensions(tmp_path: Path, layout: str, kind: str) -> None:
    state = tiny_state(kind)
    path = write_dit(tmp_path, state, layout)

    loaded = load_dit(path, CPU).state_dict()

    assert read_once(path, read_dit_header).config == CONFIGS[kind]
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert families.identify(path) == f"it is a FLUX.2 {kind} transformer (--dit)"


@pytest.mark.parametrize("layout", ["fp8", "fp8_scaled", "fp8_weight_scale"])
def test_files_in_8_bits_load(tmp_path: Path, layout: str) -> None:
    state = tiny_state("dev")

    dit = load_dit(write_dit(tmp_path, state, layout), CPU)

    assert dit.compute_dtype == torch.bfloat16
    for name, tensor in state.items():
        found = dit.state_dict()[name]
        assert found.dtype.itemsize > 1
        assert (found.float() - tensor).abs().max() < 0.1 * tensor.abs().max(), name


def test_blocks_alone_are_kept_in_8_bits(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16))
    dit = load_dit(path, Placement(torch.device("cpu"), fp8=Quantisation("scaled")))

    in_8_bits = {name for name, weight in dit.state_dict().items() if weight.dtype.itemsize == 1}

    assert {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"} <= in_8_bits
    assert all(name.startswith(("double_blocks.", "single_blocks.")) for name in in_8_bits)
    assert {dit.get_parameter(f"time_in.{name}.weight").dtype for name in ("in_layer", "out_layer")} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("name", "weights", "blocks", "dim"),
    [
        ("klein-4b", 3875544576, (5, 20), 3072),
        ("klein-9b", 9078581248, (8, 24), 4096),
        ("dev", 32223281152, (8, 48), 6144),
    ],
)
@pytest.mark.parametrize("layout", ["dit", "dit-diffusers"])
def test_released_files_load_without_leftovers(
    tmp_path: Path, name: str, weights: int, blocks: tuple[int, int], dim: int, layout: str
) -> None:
    tensors = tensor_list(f"flux2-{name}-{layout}")
    dit = load_dit(write_hollow(tmp_path / "dit.safetensors", tensors), META)

    assert sum(weight.numel() for weight in dit.parameters()) == weights
    config = dit.config
    most = {"klein-4b": 13, "klein-9b": 18, "dev": 30}[name]
    assert most_blocks(blocks, dit.spec.swap_counts) == most
    assert (config.double_blocks, config.single_blocks, config.dim) == (*blocks, dim)
    assert config.text_dim == {"klein-4b": 7680, "klein-9b": 12288, "dev": 15360}[name]


@pytest.mark.parametrize("name", ["txt_in.weight", "single_blocks.0.linear1.weight"])
def test_an_incomplete_file_is_refused(name: str, tmp_path: Path) -> None:
    state = tiny_state()
    del state[name]
    with pytest.raises(CheckpointError, match=rf"incomplete|lacks|missing.*{name}"):
        load_dit(write_dit(tmp_path, state), CPU)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (24,)),
        ("double_blocks.0.img_mlp.2.weight", (64, 100)),
        ("img_in.weight", (0, 128)),
        ("img_in.weight", ()),
    ],
)
def test_sizes_without_sense_are_one_message(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = write_dit(tmp_path, {**tiny_state(), name: torch.zeros(shape)})
    families.identify(path)  # every family looks at it
    with pytest.raises(CheckpointError):
        load_dit(path, CPU)


def test_flux_1_and_flux_2_are_told_apart(tmp_path: Path) -> None:
    for layout in ("safetensors", "diffusers"):
        first = flux.write_dit(tmp_path / layout, flux.tiny_state("dev"), layout)
        second = write_dit(tmp_path / layout, tiny_state(), layout)
        with pytest.raises(CheckpointError, match=r"is not a FLUX.2 transformer; it looks like"):
            load_dit(first, CPU)
        with pytest.raises(CheckpointError, match=r"it looks like a FLUX.2 transformer"):
            load_flux(second, CPU)
