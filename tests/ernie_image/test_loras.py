"""LoRAs of every dialect that is around change the same weights in the same way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import ErnieImageLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from ernie_image.names import ERNIE_IMAGE
from modules.errors import CheckpointError
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.ernie_image.making import CONFIG, in_diffusers, tiny_model
from tests.tiny import fibo_2, z_image
from tests.tiny.ernie_image import tiny_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.loras import make_lora

State = dict[str, Tensor]
LAYERS = (
    *(f"self_attention.to_{name}" for name in ("q", "k", "v", "out.0")),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
)
RANK, ALPHA = 4, 2.0


def rename(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def renamed(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new, 1)
            found[name] = tensor
        return found

    return renamed


def with_alphas(state: State) -> State:
    """As OneTrainer's first files: `transformer.`, down and up, an alpha that is not folded in."""
    found = rename(("diffusion_model.", "transformer."), ("lora_A", "lora_down"), ("lora_B", "lora_up"))(
        state
    )
    for name in [name for name in found if name.endswith(".lora_up.weight")]:
        found[name] = found[name] * (RANK / ALPHA)
        found[name.replace("lora_up.weight", "alpha")] = torch.tensor(ALPHA)
    return found


# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "ComfyUI, ai-toolkit": ("other", dict),
    "diffusers": ("diffusers", dict),
    "musubi-tuner": ("default", dict),
    "OneTrainer of June": ("other", with_alphas),
    "PEFT": ("other", rename(("diffusion_model.", "base_model.model."))),
    "PEFT with default": (
        "other",
        rename(
            ("diffusion_model.", "base_model.model."),
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
        ),
    ),
    "DiffSynth": (
        "other",
        rename(("diffusion_model.", ""), ("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default.")),
    ),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    network = make_lora("lora_ernie_image", RANK, ALPHA, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, ERNIE_IMAGE).save(network, path, None, {"ss_base_model_version": ERNIE_IMAGE.name})
    return path


def convert(lora: Path, target: str) -> Path:
    path = lora.with_name(f"{lora.stem} {target}.safetensors")
    path.unlink(missing_ok=True)
    convert_lora.main(["--input", str(lora), "--output", str(path), "--target", target])
    return path


def merge(dit: Path, lora: Path) -> State:
    path = lora.with_name("merged.safetensors")
    path.unlink(missing_ok=True)
    words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", path]
    merge_lora.main([str(word) for word in words])
    return load_file(path)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_same_weights(known: Path, tmp_path: Path, name: str) -> None:
    """And a file without metadata is told by its names and sizes alone."""
    before = tiny_state()
    dit = save(tmp_path / "dit.safetensors", before)
    expected = merge(dit, known)
    assert (
        sum(not torch.equal(before[key], weight) for key, weight in expected.items()) == 7 * CONFIG.num_layers
    )
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    state = change(load_file(convert(known, target)))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    for key, weight in merge(dit, path).items():
        torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)


@pytest.mark.parametrize(("target", "prefix"), [("other", "diffusion_model."), ("diffusers", "transformer.")])
def test_what_other_tools_read_has_seven_layers_a_block_and_no_alpha(
    known: Path, target: str, prefix: str
) -> None:
    """diffusers stops at an alpha; queries, keys and values are never fused."""
    assert set(load_file(convert(known, target))) == {
        f"{prefix}layers.{block}.{layer}.lora_{letter}.weight"
        for block in range(CONFIG.num_layers)
        for layer in LAYERS
        for letter in "AB"
    }


def test_our_own_names_are_those_of_musubi_tuner_s_branch(known: Path) -> None:
    assert {
        f"lora_unet_layers_0_{layer.replace('.', '_')}.{part}"
        for layer in LAYERS
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    } <= set(load_file(known))


@pytest.mark.parametrize("target", ["other", "diffusers"])
@torch.no_grad()
def test_diffusers_loads_every_module(known: Path, target: str) -> None:
    """The network changes as by our merge."""
    there = in_diffusers(tiny_state())
    path = convert(known, target)
    state = ErnieImageLoraLoaderMixin.lora_state_dict(path)
    ErnieImageLoraLoaderMixin.load_lora_into_transformer(state, there)
    there.fuse_lora()
    there.unload_lora()
    merged = merge(save(known.with_name("dit.safetensors"), tiny_state()), known)
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)


def test_a_lokr_of_lycoris_is_read(known: Path, tmp_path: Path) -> None:
    dit = save(tmp_path / "dit.safetensors", tiny_state())
    generator = torch.Generator().manual_seed(1)
    small, large = (torch.randn(8, 8, generator=generator), torch.randn(12, 12, generator=generator))
    start = "lycoris_layers_0_self_attention_to_q"
    path = save(
        tmp_path / "lokr.safetensors",
        {f"{start}.lokr_w1": small, f"{start}.lokr_w2": large, f"{start}.alpha": torch.tensor(1e9)},
    )
    key = "layers.0.self_attention.to_q.weight"
    torch.testing.assert_close(merge(dit, path)[key], tiny_state()[key] + torch.kron(small, large))


@pytest.mark.parametrize("family", [z_image, fibo_2], ids=["Z-Image", "Fibo"])
def test_a_lora_does_not_fit_another_model_with_blocks_of_that_name(
    known: Path, tmp_path: Path, family: object
) -> None:
    other = save(tmp_path / "other.safetensors", family.tiny_state())  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError):
        merge(other, known)


def test_metadata_name_the_model_and_its_license(known: Path) -> None:
    with safe_open(convert(known, "other"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "ernie_image"
