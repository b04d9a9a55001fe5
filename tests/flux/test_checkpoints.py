"""Files of FLUX.1 and Chroma transformers: every layout, every kind, and what is none of them."""

from pathlib import Path

import pytest
import torch

from flux.checkpoints import identify, load_dit, read_dit_header
from modules.checkpoints.opening import open_checkpoint
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.speed_options import SDPA
from tests.manifests import tensor_list, write_hollow
from tests.tiny.flux import CONFIGS, tiny_state, write_dit

CPU = Placement(torch.device("cpu"), attention=SDPA)
META = Placement(torch.device("meta"))


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [("flux1-dev-dit", "dev"), ("flux1-dev-dit-diffusers", "dev"), ("chroma1-dit", "chroma")],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_published_models_load_at_full_size(tmp_path: Path, manifest: str, kind: str, prefix: str) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list(manifest), prefix)

    dit = load_dit(path, META)

    config = dit.config
    assert (config.kind, config.double_blocks, config.single_blocks, config.num_heads) == (kind, 19, 38, 24)
    assert (config.dim, config.ffn_dim, config.text_dim, config.channels) == (3072, 12288, 4096, 16)
    assert config.modulations == 344


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dialect", ["safetensors", "sharded", "prefixed", "diffusers", "diffusers_sharded"])
def test_every_layout_gives_the_same_weights(tmp_path: Path, kind: str, dialect: str) -> None:
    state = tiny_state(kind)

    dit = load_dit(write_dit(tmp_path, state, dialect), CPU)

    assert dit.config == CONFIGS[kind]
    loaded = dit.state_dict()
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_pruned_model_has_the_blocks_of_its_file(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state("dev", double_blocks=1, single_blocks=2))

    with open_checkpoint(path) as checkpoint:
        config = read_dit_header(checkpoint).config

    assert (config.double_blocks, config.single_blocks) == (1, 2)
    assert len(load_dit(path, CPU).single_blocks) == 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_says_what_it_is(tmp_path: Path, kind: str) -> None:
    found = identify(write_dit(tmp_path, tiny_state(kind)))

    assert found is not None
    assert kind in found.lower()


@pytest.mark.parametrize(
    "manifest", ["hunyuanvideo-t2v-dit-comfy", "hunyuanvideo-t2v-dit-diffusers", "clip-l-text"]
)
def test_other_models_are_refused_and_not_claimed(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "other.safetensors", tensor_list(manifest))

    assert identify(path) is None
    with pytest.raises(CheckpointError, match="is not a FLUX.1 or Chroma transformer; it looks like"):
        load_dit(path, META)
