"""Files of FramePack transformers: every dialect, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

import hunyuan_model.checkpoints
import wan.checkpoints
from frame_pack.checkpoints import identify, load_dit, read_dit_header
from modules import families
from modules.checkpoints.model_files import read_once
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from tests.manifests import tensor_list, write_hollow
from tests.tiny.framepack_dit import CONFIG, DIALECTS, tiny_state, write_dit

CPU = Placement(torch.device("cpu"))
META = Placement(torch.device("meta"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_weights(tmp_path: Path, dialect: str) -> None:
    state = tiny_state()
    path = write_dit(tmp_path, state, dialect)

    loaded = load_dit(path, CPU).state_dict()

    assert read_once(path, read_dit_header).config == CONFIG
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def test_the_published_file_of_full_size_loads_without_leftovers(tmp_path: Path) -> None:
    tensors = tensor_list("framepack-dit")

    dit = load_dit(write_hollow(tmp_path / "dit.safetensors", tensors), META)

    parameters = sum(weight.numel() for weight in dit.parameters())
    assert parameters == sum(math.prod(shape) for _, shape in tensors.values()) == 12874314816
    assert dit.compute_dtype == torch.bfloat16
    config = dit.config
    assert (config.dim, config.num_heads, config.double_blocks, config.single_blocks) == (3072, 24, 20, 40)
    assert (config.text_dim, config.pooled_dim, config.image_dim, config.refiner_blocks) == (
        4096,
        768,
        1152,
        2,
    )
    assert (config.patch_size, config.in_dim, config.out_dim) == ((1, 2, 2), 16, 16)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_says_what_it_is_and_no_other_family_takes_it(tmp_path: Path, dialect: str) -> None:
    path = write_dit(tmp_path, tiny_state(), dialect)

    assert identify(path) == families.identify(path) == "it is a FramePack transformer (--dit)"
    with pytest.raises(CheckpointError, match="is a FramePack transformer"):
        read_once(path, hunyuan_model.checkpoints.read_dit_header)
    with pytest.raises(CheckpointError, match="is not a Wan transformer"):
        read_once(path, wan.checkpoints.read_dit_header)
