"""What diffusers' own loaders make of LoRA files that a training saves with --lora_format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

import tests.flux_2.making as flux_2
import tests.flux_3.making as flux_3
import tests.frame_pack.making as framepack
import tests.hunyuan_model.making as hunyuan
import tests.krea2.making as krea2
import tests.ltx_2.test_model as ltx_2
import tests.qwen_image.making as qwen_image
import tests.qwen_image_21.making as qwen_image_21
import tests.wan.making as wan
import tests.z_image.making as z_image
from networks.lora_format import LoraFormat
from networks.module_names import FAMILIES
from networks.names.layouts import COMFYUI, DIFFUSERS
from tests.ltx_2.tiny_dit import dit_in_diffusers, dit_inputs, dit_state, tiny_dit
from tests.networks import test_key_formats
from tests.networks.making import inputs
from tests.networks.making import tiny_dit as tiny_wan
from tests.networks.test_lora_image_families import models
from tests.tiny.loras import make_lora


@dataclass(frozen=True)
class Pair:
    """Our tiny transformer, diffusers' with the same weights, and what either predicts."""

    ours: nn.Module
    theirs: Any
    run_ours: Callable[[], Tensor]
    run_theirs: Callable[[], Tensor]


def _wan(folder: Path) -> Pair:
    dit = tiny_wan(folder)
    theirs: Any = wan.in_diffusers(dit.config, dit.state_dict())
    return Pair(dit, theirs, lambda: dit(**inputs(dit)), lambda: test_key_formats.run_there(theirs, dit))


def _hunyuan_video(_: Path) -> Pair:
    ours, theirs, given = hunyuan.tiny_model("t2v"), hunyuan.in_diffusers("t2v"), hunyuan.tiny_inputs("t2v")
    return Pair(ours, theirs, lambda: ours(**given), lambda: hunyuan.run_there(theirs, given))


def _framepack(_: Path) -> Pair:
    ours, theirs, given = framepack.tiny_model(), framepack.in_diffusers(), framepack.tiny_inputs()
    return Pair(ours, theirs, lambda: ours(**given), lambda: framepack.run_there(theirs, given))


def _ltx_2(_: Path) -> Pair:
    ours, given = tiny_dit("2.3"), dit_inputs("2.3")
    theirs = dit_in_diffusers("2.3", dit_state("2.3"))
    return Pair(ours, theirs, lambda: ours(**given)[0], lambda: ltx_2.in_diffusers(theirs, given)[0])


def _of_pictures(made: Any, packs: bool) -> Callable[[Path], Pair]:
    def pair(_: Path) -> Pair:
        ours, given = made.tiny_model(), made.tiny_inputs()
        theirs = made.in_diffusers(ours.state_dict())

        def run_ours() -> Tensor:
            velocity: Tensor = ours(**given)
            return qwen_image.pack(velocity) if packs else velocity

        return Pair(ours, theirs, run_ours, lambda: made.predict_with(theirs, given))

    return pair


def _of_images(family: str) -> Callable[[Path], Pair]:
    def pair(_: Path) -> Pair:
        ours, theirs, both = models(family)
        return Pair(ours, theirs, lambda: both(ours, theirs)[0], lambda: both(ours, theirs)[1])

    return pair


# family -> the module of its LoRAs, the class that loads files in its pipeline, both networks
MODELS: dict[str, tuple[str, str, Callable[[Path], Pair]]] = {
    "wan": ("lora_wan", "WanLoraLoaderMixin", _wan),
    "hunyuan_video": ("lora_hunyuan", "HunyuanVideoLoraLoaderMixin", _hunyuan_video),
    "framepack": ("lora_framepack", "HunyuanVideoLoraLoaderMixin", _framepack),
    "ltx_2": ("lora_ltx2", "LTX2LoraLoaderMixin", _ltx_2),
    "flux": ("lora_flux", "FluxLoraLoaderMixin", _of_images("flux")),
    "chroma": ("lora_flux", "FluxLoraLoaderMixin", _of_images("chroma")),
    "flux_2": ("lora_flux_2", "Flux2LoraLoaderMixin", _of_pictures(flux_2, packs=False)),
    "flux_3": ("lora_flux_3", "Flux3LoraLoaderMixin", _of_pictures(flux_3, packs=False)),
    "lumina": ("lora_lumina", "Lumina2LoraLoaderMixin", _of_images("lumina")),
    "hunyuan_image": ("lora_hunyuan_image", "", _of_images("hunyuan_image")),
    "qwen_image": ("lora_qwen_image", "QwenImageLoraLoaderMixin", _of_pictures(qwen_image, packs=True)),
    "qwen_image_21": (
        "lora_qwen_image_21",
        "QwenImageLoraLoaderMixin",
        _of_pictures(qwen_image_21, packs=False),
    ),
    "z_image": ("lora_zimage", "ZImageLoraLoaderMixin", _of_pictures(z_image, packs=False)),
    "krea2": ("lora_krea2", "Krea2LoraLoaderMixin", _of_pictures(krea2, packs=True)),
}
DORA = {"dora_wd": "True"}
SPLIT = {"split_qkv": "True"}


@pytest.mark.parametrize(
    ("family", "name", "arguments"),
    [
        *((family, DIFFUSERS, {}) for family in MODELS),
        *((family, DIFFUSERS, DORA) for family in ("wan", "flux", "qwen_image", "krea2")),
        *((family, DIFFUSERS, SPLIT) for family in ("flux", "lumina")),
        # the other names that diffusers reads: docs/generation.md, "What other tools read"
        *(
            (family, COMFYUI, {})
            for family in ("wan", "ltx_2", "z_image", "krea2", "flux_2", "flux_3", "flux", "qwen_image_21")
        ),
    ],
    ids=lambda one: "+".join(one) if isinstance(one, dict) else one,
)
@torch.no_grad()
def test_every_key_of_a_saved_file_lands_in_diffusers_and_has_its_effect(
    tmp_path: Path, family: str, name: str, arguments: dict[str, str], recwarn: pytest.WarningsRecorder
) -> None:
    module, loader, make = MODELS[family]
    pair = make(tmp_path)
    network = make_lora(module, 4, 2.0, pair.ours, **arguments)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim != 2 or parameter.shape[1] != 1:  # magnitudes stay near those of the weights
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    known = next(one for one in FAMILIES if one.network_module == f"networks.{module}")
    path = tmp_path / "lora.safetensors"
    LoraFormat(name, known).save(network, path, None, {"ss_base_model_version": known.name})
    plain = pair.run_ours()
    network.attach()
    expected = pair.run_ours()

    tensors = load_file(path)
    state = getattr(lora_pipeline, loader).lora_state_dict(dict(tensors)) if loader else tensors
    pair.theirs.load_lora_adapter(state, prefix="transformer")

    there = {key.replace(".default.", ".") for key in pair.theirs.state_dict() if ".lora_" in key}
    layers = {key.partition(".lora_")[0] for key in there}
    assert layers == {key.removeprefix("transformer.").partition(".lora_")[0] for key in state}
    assert not [one for one in recwarn if "key" in str(one.message).lower()]
    found = pair.run_theirs()
    assert float((expected - plain).abs().max()) > 0.01 * float(plain.abs().max())
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
