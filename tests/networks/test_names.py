"""Names of modules in diffusers' layout, compared with published tensor lists and with diffusers' classes."""

import re
from collections.abc import Mapping

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
)

from networks.apply import LIKELY_MODEL
from networks.key_formats import module_of_tensor
from networks.module_names import choose_family
from networks.names.image import FLUX, HUNYUAN_IMAGE, LUMINA
from networks.names.layouts import FamilyNames, tensor_patterns
from networks.names.video import FRAMEPACK, HUNYUAN_VIDEO, WAN
from tests.manifests import tensor_list

UNUSED = {"norm_final.weight"}  # of Lumina's published file: no code reads it
Shapes = dict[str, tuple[int, ...]]


def renamed(shapes: Mapping[str, tuple[int, ...]], names: FamilyNames) -> Shapes:
    """The tensors under our names; parts stacked by rows."""
    whole: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        found = [ours for p, ours in tensor_patterns(names) if re.fullmatch(p, name)]
        assert len(found) == 1, name
        pattern = next(p for p, _ in tensor_patterns(names) if re.fullmatch(p, name))
        ours, _, place = re.fullmatch(pattern, name).expand(found[0]).partition("#")  # type: ignore[union-attr]
        whole.setdefault(ours, []).append((int(place or 0), shape))
    stacked = {}
    for ours, parts in whole.items():
        assert sorted(place for place, _ in parts) == list(range(len(parts))), ours
        stacked[ours] = (sum(shape[0] for _, shape in parts), *parts[0][1][1:])
    return stacked


def published(manifest: str) -> Shapes:
    return {name: shape for name, (_, shape) in tensor_list(manifest).items() if name not in UNUSED}


def test_fluxs_published_lists_are_the_same_in_both_layouts() -> None:
    theirs = {name: shape for name, (_, shape) in tensor_list("flux1-dev-dit-diffusers").items()}

    assert renamed(theirs, FLUX) == published("flux1-dev-dit")


@pytest.mark.parametrize(
    ("manifest", "names", "build", "settings"),
    [
        ("flux1-dev-dit", FLUX, FluxTransformer2DModel, {"guidance_embeds": True}),
        ("chroma1-dit", FLUX, ChromaTransformer2DModel, {}),
        ("hunyuanimage2.1-dit", HUNYUAN_IMAGE, HunyuanImageTransformer2DModel, {"text_embed_2_dim": 1472}),
        ("lumina2-dit", LUMINA, Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
    ],
)
def test_diffusers_class_has_the_tensors_of_the_published_file(
    manifest: str, names: FamilyNames, build: type, settings: dict[str, int]
) -> None:
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in build(**settings).state_dict().items()}

    assert renamed(theirs, names) == published(manifest)


@pytest.mark.parametrize(
    ("manifest", "names"),
    [
        ("flux1-dev-dit", FLUX),
        ("flux1-dev-dit-diffusers", FLUX),
        ("chroma1-dit", FLUX),
        ("hunyuanimage2.1-dit", HUNYUAN_IMAGE),
        ("lumina2-dit", LUMINA),
        ("hunyuanvideo-t2v-dit", HUNYUAN_VIDEO),
        ("hunyuanvideo-t2v-dit-diffusers", HUNYUAN_VIDEO),
        ("framepack-dit", FRAMEPACK),
        ("wan2.1-t2v-1.3b", WAN),
    ],
)
def test_a_model_is_told_by_its_modules(manifest: str, names: FamilyNames) -> None:
    modules = {module_of_tensor(name)[0] for name in tensor_list(manifest)}

    assert choose_family(modules, LIKELY_MODEL) is names


def test_the_distilled_hunyuanimage_has_names_for_its_guidance_and_second_time() -> None:
    with torch.device("meta"):
        network = HunyuanImageTransformer2DModel(guidance_embeds=True, use_meanflow=True, num_layers=1)
        theirs = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    more = renamed(theirs, HUNYUAN_IMAGE).keys() - published("hunyuanimage2.1-dit").keys()

    assert {name.partition(".")[0] for name in more} == {"guidance_in", "time_r_in"}
