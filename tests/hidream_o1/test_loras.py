"""LoRAs of every dialect that is around change the same weights in the same way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from hidream_o1.model import HiDreamO1Model
from hidream_o1.names import HIDREAM_O1
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.faults.messages import succeed_here
from tests.tiny.dit_files import frozen
from tests.tiny.hidream_o1 import (
    CONFIG,
    VISION,
    tiny_state,
    tower_state,
    write_dit,
    write_tiny_hidream_o1,
)
from tests.tiny.loras import make_lora

State = dict[str, Tensor]
LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
OUTSIDE = ("x_embedder.proj1", "x_embedder.proj2", "final_layer2.linear")
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


# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "ai-toolkit": ("other", dict),
    "ai-toolkit, older": ("other", rename(("diffusion_model.", "diffusion_model.model."))),
    "PEFT, ModelScope": ("other", rename(("diffusion_model.", "model."))),
    "PEFT with default": (
        "other",
        rename(
            ("diffusion_model.", "model."), ("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default.")
        ),
    ),
    "PEFT of the class": ("other", rename(("diffusion_model.", "base_model.model.model."))),
    "without a prefix": ("other", rename(("diffusion_model.", ""))),
    "musubi-tuner": ("default", dict),
    "musubi-tuner without the class": ("default", rename(("lora_unet_model_", "lora_unet_"))),
    "diffusers": ("diffusers", dict),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with our own names."""
    network = make_lora("lora_hidream_o1", RANK, ALPHA, frozen(HiDreamO1Model(CONFIG), tiny_state()))
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, HIDREAM_O1).save(network, path, None, {"ss_base_model_version": HIDREAM_O1.name})
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
    """And a file without metadata is told by its names alone."""
    before, dit = tiny_state(), write_dit(tmp_path / "model", tiny_state())
    expected = merge(dit, known)
    num_changed = sum(not torch.equal(before[key], weight) for key, weight in expected.items())
    assert num_changed == 7 * CONFIG.num_layers + len(OUTSIDE)
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    state = change(load_file(convert(known, target)))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    for key, weight in merge(dit, path).items():
        torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)


def test_a_lora_is_merged_into_the_released_folder_too(known: Path, tmp_path: Path) -> None:
    """Its names begin with `model.`; what the network does not use stays."""
    single = merge(write_dit(tmp_path / "single", tiny_state()), known)
    released = merge(write_dit(tmp_path / "released", tiny_state(), "released"), known)
    for key, weight in single.items():
        assert torch.equal(released[f"model.{key}"], weight)


def test_what_other_tools_read_has_all_layers_and_no_alpha(known: Path) -> None:
    paths = [f"language_model.layers.{n}.{layer}" for n in range(CONFIG.num_layers) for layer in LAYERS]
    assert set(load_file(convert(known, "other"))) == {
        f"diffusion_model.{path}.lora_{letter}.weight" for path in (*paths, *OUTSIDE) for letter in "AB"
    }


def test_names_with_underscores_are_those_of_musubi_tuner(known: Path) -> None:
    names = {f"model_language_model_layers_0_{layer.replace('.', '_')}" for layer in LAYERS}
    names |= {f"model_{path.replace('.', '_')}" for path in OUTSIDE}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert {f"lora_unet_{name}.{part}" for name in names for part in parts} <= set(load_file(known))
    assert load_file(convert(known, "default")).keys() == load_file(known).keys()


def test_metadata_name_the_model_and_its_license(known: Path) -> None:
    with safe_open(convert(known, "other"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "hidream_o1"


# with a vision tower, as --task i2i trains it

TOWER_LAYERS = (
    *(
        f"visual.blocks.{{n}}.{layer}"
        for layer in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ),
    *("visual.merger.linear_fc1", "visual.merger.linear_fc2"),
)


@pytest.fixture
def of_edits(tmp_path: Path) -> Path:
    """A LoRA of an edit training, with our own names."""
    dit = frozen(HiDreamO1Model(replace(CONFIG, vision=VISION)), {**tiny_state(), **tower_state()})
    network = make_lora("lora_hidream_o1", RANK, ALPHA, dit)
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "of edits.safetensors"
    LoraFormat(KNOWN, HIDREAM_O1).save(network, path, None, {"ss_base_model_version": HIDREAM_O1.name})
    return path


def write_editor(folder: Path) -> Path:
    return write_dit(folder, {**tiny_state(), **tower_state()})


@pytest.mark.parametrize(
    "name", ["ai-toolkit", "PEFT, ModelScope", "musubi-tuner", "musubi-tuner without the class"]
)
def test_the_tower_is_changed_alike_by_every_dialect(of_edits: Path, tmp_path: Path, name: str) -> None:
    before, dit = {**tiny_state(), **tower_state()}, write_editor(tmp_path / "model")
    expected = merge(dit, of_edits)
    changed = {key for key, weight in expected.items() if not torch.equal(before[key], weight)}
    paths = {layer.format(n=n) for layer in TOWER_LAYERS for n in range(VISION.num_layers)}
    assert {key for key in changed if key.startswith("visual.")} == {f"{path}.weight" for path in paths}
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    state = change(load_file(convert(of_edits, target)))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    for key, weight in merge(dit, path).items():
        torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)


def test_a_lora_on_the_convolution_of_patches_is_read(tmp_path: Path) -> None:
    """As musubi-tuner trains it for edits by default."""
    generator, name = torch.Generator().manual_seed(5), "lora_unet_model_visual_patch_embed_proj"
    down = torch.randn(RANK, 3, 2, 16, 16, generator=generator)
    up = torch.randn(VISION.dim, RANK, 1, 1, 1, generator=generator)
    path = tmp_path / "convolution.safetensors"
    save_file(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        },
        path,
    )
    change = ALPHA / RANK * torch.einsum("or,rcfpq->ocfpq", up.flatten(1), down)

    merged = merge(write_editor(tmp_path / "model"), path)

    key = "visual.patch_embed.proj.weight"
    torch.testing.assert_close(merged[key], tower_state()[key] + change, rtol=1e-5, atol=1e-5)


def test_a_lora_of_edits_makes_images_without_the_tower_too(of_edits: Path, tmp_path: Path) -> None:
    files = write_tiny_hidream_o1(tmp_path / "model", edits=True)
    size = ["--image_size", "32", "32", "--infer_steps", "1", "--device", "cpu", "--output_type", "latent"]
    words = ["--prompt", "a cat", "--save_path", "made", "--lora_weight", str(of_edits), *size]
    succeed_here("hidream_o1_generate_image.py", *files.models, *words, folder=tmp_path)
