"""LoRAs of every dialect that is around change the same weights in the same way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import KandinskyLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from kandinsky.names import KANDINSKY
from modules.errors import CheckpointError
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.kandinsky.making import network_of, tiny_model
from tests.tiny import ernie_image, fibo_2
from tests.tiny.hunyuan_encoders import save
from tests.tiny.kandinsky import CONFIG, tiny_state
from tests.tiny.loras import make_lora

State = dict[str, Tensor]
OF_ATTENTION = ("to_query", "to_key", "to_value", "out_layer")
FEED = ("feed_forward.in_layer", "feed_forward.out_layer")
LAYERS = {
    "text": (*(f"self_attention.{name}" for name in OF_ATTENTION), *FEED),
    "visual": (
        *(f"{kind}_attention.{name}" for kind in ("self", "cross") for name in OF_ATTENTION),
        *FEED,
    ),
}
PATHS = [
    f"{kind}_transformer_blocks.{block}.{layer}"
    for kind, layers in LAYERS.items()
    for block in range(2)
    for layer in layers
]
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
    "ComfyUI": ("other", dict),
    "diffusers": ("diffusers", dict),
    "musubi-tuner": ("default", dict),
    "PEFT": ("other", rename(("diffusion_model.", "base_model.model."))),
    "the maker's trainer": (
        "other",
        rename(
            ("diffusion_model.", "base_model.model."),
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
        ),
    ),
    "no prefix": ("other", rename(("diffusion_model.", ""))),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    network = make_lora("lora_kandinsky", RANK, ALPHA, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, KANDINSKY).save(network, path, None, {"ss_base_model_version": KANDINSKY.name})
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
    assert sum(not torch.equal(before[key], weight) for key, weight in expected.items()) == len(PATHS)
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    state = change(load_file(convert(known, target)))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    for key, weight in merge(dit, path).items():
        torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)


@pytest.mark.parametrize(("target", "prefix"), [("other", "diffusion_model."), ("diffusers", "transformer.")])
def test_other_tools_read_every_layer_without_alpha(known: Path, target: str, prefix: str) -> None:
    assert set(load_file(convert(known, target))) == {
        f"{prefix}{path}.lora_{letter}.weight" for path in PATHS for letter in "AB"
    }


def test_our_own_names_are_those_of_musubi_tuner(known: Path) -> None:
    assert {
        f"lora_unet_{path.replace('.', '_')}.{part}"
        for path in PATHS
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    } == set(load_file(known))


@torch.no_grad()
def test_diffusers_loads_every_module(known: Path) -> None:
    """The network changes as by our merge."""
    there = network_of(tiny_state())
    state = KandinskyLoraLoaderMixin.lora_state_dict(convert(known, "diffusers"))
    KandinskyLoraLoaderMixin.load_lora_into_transformer(state, there)
    there.fuse_lora()
    there.unload_lora()
    merged = merge(save(known.with_name("dit.safetensors"), tiny_state()), known)
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)


def test_a_released_lite_has_332_modules() -> None:
    """The numbers of the page: of Lite, Pro and the image model."""
    counts = [6 * text + 10 * visual for text, visual in ((2, 32), (4, 60), (2, 50))]
    assert counts == [332, 624, 512]
    assert len(PATHS) == 6 * CONFIG.text_layers + 10 * CONFIG.num_layers


@pytest.mark.parametrize("family", [ernie_image, fibo_2], ids=["ERNIE-Image", "Fibo"])
def test_a_lora_does_not_fit_another_model(known: Path, tmp_path: Path, family: object) -> None:
    other = save(tmp_path / "other.safetensors", family.tiny_state())  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError):
        merge(other, known)


def test_metadata_names_the_model(known: Path) -> None:
    with safe_open(convert(known, "other"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "kandinsky"
