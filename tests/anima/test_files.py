"""Files of Anima in all layouts, and those that are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anima.files import ADAPTER_OPTION, FORMAT, AnimaFiles, load_dit
from anima.model import AnimaModel
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from protocols.families import identify
from protocols.loading import Placement
from tests.anima.making import tiny_inputs, tiny_model
from tests.manifests import tensor_list, write_hollow
from tests.tiny.anima import CONFIG, adapter_of, in_diffusers_names, tiny_state, write_dit

CPU = Placement(torch.device("cpu"))
BUFFERS = {
    "pos_embedder.seq": torch.arange(4.0),
    "pos_embedder.dim_spatial_range": torch.ones(2),
    "accum_image_sample_counter": torch.ones(1),
    "blocks.0.self_attn._extra_state": torch.ones(1),
}


@torch.no_grad()
def velocity(model: AnimaModel) -> Tensor:
    found: Tensor = model(**tiny_inputs(1))
    return found


@pytest.mark.parametrize("start", ["", "net.", "model.diffusion_model.", "diffusion_model."])
def test_names_with_every_prefix_and_buffers_of_training_code(tmp_path: Path, start: str) -> None:
    path = tmp_path / "dit.safetensors"
    tensors = {start + name: tensor for name, tensor in (tiny_state() | BUFFERS).items()}
    if start.startswith("model."):  # all in one
        tensors["cond_stage_model.qwen3_06b.transformer.model.norm.weight"] = torch.ones(4)
        tensors["first_stage_model.conv1.weight"] = torch.ones(4)
    save_file(tensors, path)

    assert velocity(load_dit(path, CPU)).equal(velocity(tiny_model()))
    assert "an Anima transformer" in str(identify(path))


@pytest.mark.parametrize("start", ["", "llm_adapter.", "net.llm_adapter."])
def test_a_diffusers_release_is_read_with_its_conditioner(tmp_path: Path, start: str) -> None:
    state = tiny_state()
    dit = write_dit(tmp_path, state, "diffusers_sharded")
    adapter = tmp_path / "text_conditioner"
    adapter.mkdir()
    renamed = {start + name: tensor for name, tensor in adapter_of(state).items()}
    save_file(renamed, adapter / "diffusion_pytorch_model.safetensors")

    files = AnimaFiles(dit=dit, adapter=adapter)

    assert files.dit_header().config == CONFIG
    loaded = FORMAT.load(dit, CPU, second_file=files.adapter_path)
    assert velocity(loaded).equal(velocity(tiny_model()))


def test_an_adapter_of_its_own_takes_the_place_of_that_in_the_file(tmp_path: Path) -> None:
    dit = write_dit(tmp_path, tiny_state())
    other = tiny_state(seed=5)
    save_file(adapter_of(other), tmp_path / "adapter.safetensors")

    loaded = FORMAT.load(dit, CPU, second_file=tmp_path / "adapter.safetensors")

    weights = loaded.state_dict()
    assert weights["llm_adapter.out_proj.weight"].equal(other["llm_adapter.out_proj.weight"])
    assert weights["blocks.0.mlp.layer1.weight"].equal(tiny_state()["blocks.0.mlp.layer1.weight"])


@pytest.mark.parametrize("name", ["anima-dit", "anima-dit-diffusers"])
def test_sizes_of_the_released_files(tmp_path: Path, name: str) -> None:
    path = write_hollow(tmp_path / f"{name}.safetensors", tensor_list(name))
    adapter = None
    if name.endswith("diffusers"):
        conditioner = tensor_list("anima-text-conditioner-diffusers")
        adapter = write_hollow(tmp_path / "conditioner.safetensors", conditioner)

    config = AnimaFiles(dit=path, adapter=adapter).dit_header().config

    assert (config.dim, config.num_heads, config.num_layers, config.ffn_dim) == (2048, 16, 28, 8192)
    assert (config.context_dim, config.modulation_dim, config.rotary_widths) == (1024, 256, (44, 42, 42))
    assert config.adapter is not None
    assert (config.adapter.num_heads, config.adapter.num_layers) == (16, 6)
    assert (config.adapter.dim, config.adapter.text_dim, config.adapter.vocabulary) == (1024, 1024, 32128)
    model = load_dit(path, Placement(torch.device("meta"))) if adapter is None else None
    if model is not None:
        assert sum(weight.numel() for weight in model.parameters()) == 1_956_405_248 + 134_663_680


def video(state: dict[str, Tensor]) -> None:
    state["x_embedder.proj.1.weight"] = torch.zeros(64, 72)


def connector(state: dict[str, Tensor]) -> None:
    state["anima_v2_connector.proj.weight"] = torch.zeros(4, 4)


def without_adapter(state: dict[str, Tensor]) -> None:
    for name in [*state]:
        if name.startswith("llm_adapter."):
            del state[name]


def odd_heads(state: dict[str, Tensor]) -> None:
    state["blocks.0.self_attn.q_norm.weight"] = torch.ones(48)


def wide_adapter(state: dict[str, Tensor]) -> None:
    state["llm_adapter.embed.weight"] = torch.ones(520, 60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (video, "Cosmos-Predict2 for videos, which is not supported"),
        (connector, "another text encoder, which is not supported"),
        (without_adapter, f"has no adapter .* to {ADAPTER_OPTION} too"),
        (odd_heads, "does not have the sizes of an Anima transformer"),
        (wide_adapter, f"does not fit a transformer that takes texts of width 48.* to {ADAPTER_OPTION}"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: object, words: str) -> None:
    state = tiny_state()
    change(state)  # type: ignore[operator]
    dit = write_dit(tmp_path, state)

    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        AnimaFiles(dit=dit).dit_header()


def test_the_large_cosmos_is_refused(tmp_path: Path) -> None:
    shapes = {name: ("BF16", tuple(one.shape)) for name, one in tiny_state().items()}
    shapes["x_embedder.proj.1.weight"] = ("BF16", (5120, 68))
    with pytest.raises(CheckpointError, match="has width 5120: it is Cosmos-Predict2 14B"):
        AnimaFiles(dit=write_hollow(tmp_path / "dit.safetensors", shapes)).dit_header()


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    dit = write_dit(tmp_path, tiny_state())
    other = tmp_path / "other.safetensors"
    save_file(in_diffusers_names(tiny_state()), other)
    with pytest.raises(CheckpointError, match=f"(?s)is not Anima's adapter.* to {ADAPTER_OPTION}"):
        AnimaFiles(dit=dit, adapter=other).dit_header()
    save_file(adapter_of(tiny_state()), other)
    assert "Anima's adapter" in str(identify(other))
    with open_checkpoint(other) as checkpoint, pytest.raises(CheckpointError, match="Anima's adapter"):
        FORMAT.read_header(checkpoint)
