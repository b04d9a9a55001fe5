"""Files of Lumina-Image-2.0 transformers and of Gemma 2: every layout, full size, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from encoders.autoencoder import read_autoencoder_header
from lumina.checkpoints import load_dit, read_dit_header
from lumina.gemma import load_gemma, read_gemma
from modules import families
from modules.checkpoints.model_files import read_once
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from tests.manifests import TensorList, tensor_list, write_hollow
from tests.tiny.lumina import ALL_IN_ONE, CONFIG, gemma_state, tiny_state, write_dit

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))
LAYOUTS = ("safetensors", "sharded", "prefixed", "diffusers", "diffusers_sharded")


def all_in_one() -> TensorList:
    """A file as Neta Lumina's: transformer, text encoder and autoencoder."""
    parts = {
        "model.diffusion_model.": tensor_list("lumina2-dit"),
        ALL_IN_ONE: tensor_list("gemma2-2b-comfy"),
        "vae.": tensor_list("flux1-ae"),
    }
    tensors = {start + name: entry for start, part in parts.items() for name, entry in part.items()}
    beside = {"logit_scale": ("F32", ()), "spiece_model": ("U8", (4096,))}
    return tensors | {f"text_encoders.gemma2_2b.{name}": entry for name, entry in beside.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights_and_dimensions(tmp_path: Path, layout: str) -> None:
    state = tiny_state()
    path = write_dit(
        tmp_path,
        state | {"norm_final.weight": torch.ones(CONFIG.dim)} if layout == "safetensors" else state,
        layout,
    )

    loaded = load_dit(path, CPU).state_dict()

    assert read_once(path, read_dit_header).config == CONFIG
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert families.identify(path) == "it is a Lumina-Image-2.0 transformer (--pretrained_model_name_or_path)"


@pytest.mark.parametrize("alone", [True, False])
def test_published_files_of_full_size_load_without_leftovers(tmp_path: Path, alone: bool) -> None:
    """Alone, and all three networks in one file."""
    tensors = tensor_list("lumina2-dit")
    path = write_hollow(tmp_path / "dit.safetensors", tensors if alone else all_in_one())

    dit = load_dit(path, META)

    unused = math.prod(tensors["norm_final.weight"][1])
    assert sum(weight.numel() for weight in dit.parameters()) == 2609771456 - unused
    assert (dit.config.dim, dit.config.num_heads, dit.config.num_kv_heads) == (2304, 24, 8)
    assert (dit.config.num_layers, dit.config.text_dim, dit.compute_dtype) == (26, 2304, torch.bfloat16)
    text = path if not alone else write_hollow(tmp_path / "g.safetensors", tensor_list("gemma2-2b-comfy"))
    gemma = load_gemma(text, torch.device("meta"), torch.bfloat16)
    assert len(gemma.get_submodule("layers")) == 25  # type: ignore[arg-type]
    last = ("model.layers.25.", "model.norm.")  # not needed for the state before it
    left = [shape for name, (_, shape) in tensor_list("gemma2-2b-comfy").items() if not name.startswith(last)]
    assert sum(weight.numel() for weight in gemma.parameters()) == sum(map(math.prod, left))
    if not alone:
        assert read_autoencoder_header(path).latent_channels == 16


@pytest.mark.parametrize("which", ["gemma", "cut"])
def test_other_files_are_refused_with_what_to_give(tmp_path: Path, which: str) -> None:
    state = gemma_state() if which == "gemma" else tiny_state()
    state.pop("t_embedder.mlp.0.weight", None)
    save_file(state, tmp_path / "file.safetensors")
    kind = "is not a Lumina-Image-2.0 transformer; it looks like a Gemma language model"
    words = "incomplete Lumina-Image-2.0" if which == "cut" else kind

    with pytest.raises(CheckpointError, match=words):
        load_dit(tmp_path / "file.safetensors", CPU)


def test_a_file_that_is_no_gemma_2_is_refused(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state())
    with pytest.raises(CheckpointError, match="is not a Gemma 2 language model"):
        read_once(path, _width)
    other = gemma_state() | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}
    save_file(other, tmp_path / "gemma3.safetensors")
    with pytest.raises(CheckpointError, match="is not a Gemma 2 language model"):
        read_once(tmp_path / "gemma3.safetensors", _width)


def _width(checkpoint: object) -> int:
    return read_gemma(checkpoint).config.dim  # type: ignore[arg-type]
