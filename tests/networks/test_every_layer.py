"""Every layer of every model in every dialect: a LoRA of it is read under the name that the model knows."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from encoders.clip_layers import ClipText
from minimax_h3.dit_checkpoints import load_dit
from networks.key_formats import find_lora_families, to_native
from networks.loading import read_lora, warn_about_other_family
from networks.module_factors import group_by_module
from networks.module_names import family_named
from networks.names.layouts import OURS
from networks.names.texts import published_path
from protocols.loading import Placement
from tests.minimax_h3.tiny_dit import released, their_dit
from tests.stable_diffusion.loaded import make_towers
from tests.tiny.dits import DITS, TinyDit
from tests.tiny.stable_diffusion import RELEASED_UNETS

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Naming = Callable[[str], str]  # path of a module -> its name in a file, without the factor
KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
DIALECTS: dict[str, tuple[Naming, tuple[str, str]]] = {
    "sd-scripts": (lambda path: f"lora_unet_{path.replace('.', '_')}", KOHYA),
    "ComfyUI": (lambda path: f"diffusion_model.{path}", PEFT),
    "PEFT": (lambda path: f"base_model.model.{path}", PEFT),
    "without prefix": (lambda path: path, PEFT),
}


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if isinstance(module, LAYERS)}


def write_lora(layers: dict[str, nn.Module], dialect: tuple[Naming, tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors of a file with a LoRA of rank 1 on each layer."""
    name_of, (down, up) = dialect
    tensors = {}
    for path, layer in layers.items():
        rows, *columns = layer.weight.shape  # type: ignore[union-attr, misc]
        tensors[name_of(path) + down] = torch.zeros(1, *columns)  # type: ignore[arg-type]
        tensors[name_of(path) + up] = torch.zeros(rows, 1, *[1] * (len(columns) - 1))  # type: ignore[arg-type]
    return tensors


def modules_of(tensors: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in tensors}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tiny", DITS, ids=lambda tiny: tiny.name)
def test_every_layer_of_a_transformer_is_read(tiny: TinyDit, dialect: str) -> None:
    layers = layers_of(tiny.make(2))

    native = to_native(write_lora(layers, DIALECTS[dialect]))

    assert not native.unknown_keys
    assert not native.unnamed_text_keys
    assert modules_of({**native.tensors, **native.text_tensors}) == {
        OURS + path.replace(".", "_") for path in layers
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_layer_of_minimax_h3_is_read(tmp_path: Path, dialect: str) -> None:
    save_file(released(their_dit().state_dict()), tmp_path / "h3.safetensors")
    layers = layers_of(load_dit(tmp_path / "h3.safetensors", Placement(torch.device("cpu"))))

    native = to_native(write_lora(layers, DIALECTS[dialect]), "minimax_h3")

    assert not native.unknown_keys
    assert modules_of(native.tensors) == {OURS + path.replace(".", "_") for path in layers}


UNET_DIALECTS = {
    "sd-scripts": DIALECTS["sd-scripts"],
    "diffusers": (lambda path: f"unet.{path}", PEFT),
    "ComfyUI": (lambda path: f"diffusion_model.{path}", PEFT),
}


@pytest.mark.parametrize("dialect", UNET_DIALECTS)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_layer_of_a_unet_is_read(kind: str, dialect: str) -> None:
    with torch.device("meta"):
        layers = layers_of(UNet2DConditionModel(**RELEASED_UNETS[kind]))

    native = to_native(write_lora(layers, UNET_DIALECTS[dialect]))

    assert not native.unknown_keys
    assert modules_of(native.tensors) == {OURS + path.replace(".", "_") for path in layers}


def test_names_of_released_files_and_a_second_encoder_say_sdxl() -> None:
    """Sizes of convolutions alone fit Stable Diffusion 1 too."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**RELEASED_UNETS["sdxl"])
    aliases = {ours: theirs for theirs, ours in family_named("sdxl").aliases}
    layers = {path: layer for path, layer in layers_of(unet).items() if ".conv1" in path and path in aliases}
    assert layers
    named = write_lora(layers, (lambda path: f"lora_unet_{aliases[path].replace('.', '_')}", KOHYA))
    plain = write_lora(layers, DIALECTS["sd-scripts"])
    second = {f"lora_te2_text_model_encoder_layers_0_mlp_fc1{factor}": torch.zeros(1, 1) for factor in KOHYA}

    assert len(find_lora_families(group_by_module(to_native(plain).tensors))) > 1
    assert to_native(plain).family_name is None
    assert to_native(named).family_name == "sdxl"
    assert to_native({**plain, **second}).family_name == "sdxl"
    assert modules_of(to_native(named).tensors) == modules_of(plain)


ENCODERS = {"sd1": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")}
TEXT_DIALECTS: dict[str, tuple[Callable[[int, str], str], tuple[str, str]]] = {
    "sd-scripts": (lambda number, path: f"{{prefix}}_{path.replace('.', '_')}", KOHYA),
    "with dots": (lambda number, path: f"{{prefix}}.{path}", KOHYA),
    "diffusers": (lambda number, path: f"text_encoder{'_2' * (number > 1)}.{path}", PEFT),
    "PEFT": (lambda number, path: f"text_encoder{'_2' * (number > 1)}.base_model.model.{path}", PEFT),
    "ComfyUI": (lambda number, path: f"text_encoders.clip_{'lg'[number - 1]}.transformer.{path}", PEFT),
}


@pytest.mark.parametrize("is_deep", [True, False], ids=["text_model.", "as transformers 5"])
@pytest.mark.parametrize("dialect", TEXT_DIALECTS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_layer_of_a_text_encoder_is_read(kind: str, dialect: str, is_deep: bool) -> None:
    """With the projection of SDXL's second one, which is not a layer of `text_model`."""
    towers, _ = make_towers(kind)
    name_of, factors = TEXT_DIALECTS[dialect]
    tensors: dict[str, Tensor] = {}
    expected: set[str] = set()
    for number, (prefix, tower) in enumerate(zip(ENCODERS[kind], towers, strict=True), 1):
        assert isinstance(tower.network, ClipText)
        layers = {published_path(path): layer for path, layer in layers_of(tower.network).items()}
        expected |= {f"{prefix}_{path.replace('.', '_')}" for path in layers}

        def name(path: str, number: int = number, prefix: str = prefix) -> str:
            written = path if is_deep else path.removeprefix("text_model.")
            return name_of(number, written).format(prefix=prefix)

        tensors |= write_lora(layers, (name, factors))
    assert ("lora_te2_text_projection" in expected) == (kind == "sdxl")

    native = to_native(tensors, kind)

    assert not native.unknown_keys
    assert not native.unnamed_text_keys
    assert modules_of(native.text_tensors) == expected


def test_a_family_by_names_is_not_said_to_be_in_the_metadata(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    aliased = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {aliased + KOHYA[0]: torch.ones(1, 640), aliased + KOHYA[1]: torch.ones(640, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")

    warn_about_other_family(read_lora(tmp_path / "lora.safetensors"), family_named("sd1"))

    assert "was trained for sdxl according to its names, and is used on a sd1 model" in caplog.text


@pytest.mark.parametrize("start", ["lora_unet.", "lora_transformer."])
def test_dotted_names_of_onetrainer_are_read(start: str) -> None:
    layers = layers_of(DITS[0].make(2))

    native = to_native(write_lora(layers, (lambda path: start + path, KOHYA)))

    assert modules_of(native.tensors) == {OURS + path.replace(".", "_") for path in layers}
    assert native.dialect == "OneTrainer"
