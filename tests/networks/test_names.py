"""Names of modules in diffusers' layout, compared with published tensor lists and with diffusers' classes."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from flux.names import FLUX
from flux_2.names import FLUX_2
from frame_pack.names import FRAMEPACK
from hunyuan_image.names import HUNYUAN_IMAGE
from hunyuan_model.names import HUNYUAN_VIDEO
from krea2.names import KREA_2
from lumina.names import LUMINA
from networks.apply import LIKELY_MODEL
from networks.key_formats import find_lora_families, split_tensor_name, to_native
from networks.module_factors import group_by_module
from networks.module_names import diffusers_path, from_alias, module_path, select_family, sizes_fit, to_alias
from networks.names.layouts import FamilyNames, tensor_patterns
from qwen_image.names import QWEN_IMAGE
from stable_diffusion.names import SD1, SD2, SDXL
from tests.manifests import tensor_list
from tests.tiny.stable_diffusion import RELEASED_UNETS
from wan.names import WAN
from z_image.names import Z_IMAGE

UNUSED = {"norm_final.weight"}  # of Lumina's published file: no code reads it
Shapes = dict[str, tuple[int, ...]]


def renamed(shapes: Mapping[str, tuple[int, ...]], names: FamilyNames) -> Shapes:
    """The tensors under our names; parts stacked by rows."""
    full: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        found = [ours for p, ours in tensor_patterns(names) if re.fullmatch(p, name)]
        assert len(found) == 1, name
        pattern = next(p for p, _ in tensor_patterns(names) if re.fullmatch(p, name))
        ours, _, place = re.fullmatch(pattern, name).expand(found[0]).partition("#")  # type: ignore[union-attr]
        full.setdefault(ours, []).append((int(place or 0), shape))
    stacked = {}
    for ours, parts in full.items():
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
        ("flux2-dev-dit", FLUX_2),
        ("qwen-image-dit", QWEN_IMAGE),
        ("z-image-dit", Z_IMAGE),
        ("hunyuanvideo-t2v-dit", HUNYUAN_VIDEO),
        ("hunyuanvideo-t2v-dit-diffusers", HUNYUAN_VIDEO),
        ("framepack-dit", FRAMEPACK),
        ("wan2.1-t2v-1.3b", WAN),
    ],
)
def test_a_model_is_told_by_its_modules(manifest: str, names: FamilyNames) -> None:
    modules = {split_tensor_name(name)[0] for name in tensor_list(manifest)}

    assert select_family(modules, LIKELY_MODEL) is names


FULL = pytest.mark.parametrize(
    ("family", "settings"),
    [(family, RELEASED_UNETS[family.name]) for family in (SD1, SD2, SDXL)],
    ids=lambda value: value.name if isinstance(value, FamilyNames) else "",
)


def modules_of(settings: dict[str, Any]) -> dict[str, nn.Module]:
    with torch.device("meta"):
        network = UNet2DConditionModel(**settings)
    named = network.named_modules()
    return {path: module for path, module in named if any(True for _ in module.parameters(recurse=False))}


@FULL
def test_every_module_of_a_released_network_has_a_name_and_one_in_ldm(
    family: FamilyNames, settings: dict[str, Any]
) -> None:
    modules = modules_of(settings)

    for path in modules:
        name = path.replace(".", "_")
        assert module_path(name, family) == path
        assert diffusers_path(name, family) == path
        other = to_alias(name, family)
        assert other != name
        assert from_alias(other, family) == name


@FULL
def test_names_in_ldm_are_those_that_diffusers_converts(
    family: FamilyNames, settings: dict[str, Any]
) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel(**settings)
    ldm = {}
    for name in network.state_dict():
        path, _, leaf = name.rpartition(".")
        theirs = ldm_path(path, family)
        assert module_path(from_alias(theirs.replace(".", "_"), family), family) == path
        ldm[f"model.diffusion_model.{theirs}.{leaf}"] = torch.tensor(list(name.encode()))

    converted = convert_ldm_unet_checkpoint(ldm, dict(network.config))

    assert {bytes(value.tolist()).decode(): name for name, value in converted.items()} == {
        name: name for name in network.state_dict()
    }


def ldm_path(path: str, family: FamilyNames) -> str:
    """The name in a released file, block numbers filled in."""
    number = path.partition("transformer_blocks.")[2].partition(".")[0]
    template = re.sub(r"(transformer_blocks)\.\d+", r"\1.{n}", path) if family is SDXL else path
    theirs = next(theirs for theirs, ours in family.aliases if ours == template)
    return theirs.replace("{n}", number)


def test_the_upsamplers_of_released_files_follow_the_attention_if_there_is_one() -> None:
    places = {
        family.name: [to_alias(f"up_blocks_{n}_upsamplers_0_conv", family) for n in (0, 1)]
        for family in (SD1, SDXL)
    }

    assert places == {
        "sd1": ["output_blocks_2_1_conv", "output_blocks_5_2_conv"],
        "sdxl": ["output_blocks_2_2_conv", "output_blocks_5_2_conv"],
    }
    assert from_alias("output_blocks_2_2_conv", SD1) == from_alias("output_blocks_2_1_conv", SD1)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
@FULL
def test_a_network_is_told_by_its_modules(family: FamilyNames, settings: dict[str, Any], layout: str) -> None:
    names = [path.replace(".", "_") for path in modules_of(settings)]
    if layout == "ldm":
        names = [to_alias(name, family) for name in names]

    found = select_family(names)

    assert found is (SDXL if family is SDXL else SD1)  # SD 2 has the same names
    assert select_family(names, family.name) is family


@pytest.mark.parametrize(
    ("width", "names"), [(768, ["sd1"]), (1024, ["sd2"]), (2048, ["sdxl"]), (64, ["sd1", "sdxl", "sd2"])]
)
def test_kinds_of_equal_names_are_told_by_the_width_of_their_texts(width: int, names: list[str]) -> None:
    factors = {"lora_down.weight": torch.zeros(2, width), "lora_up.weight": torch.zeros(320, 2)}
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"

    found = find_lora_families({module: factors, "lora_unet_conv_in": {"diff": torch.zeros(320, 4, 3, 3)}})

    assert [family.name for family in found] == names


_LAYER = "encoder.layers.3.self_attn.q_proj"
_IN_UNET = {
    "sd1": "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "sdxl": "lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.lora_down.weight",
    "flux": "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
}
_Q = f"text_model.{_LAYER}"
_T5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("sd1", f"text_encoder.{_Q}.lora_A.weight", f"lora_te_{_Q}"),
        ("sd1", f"text_encoder.{_LAYER}.lora_linear_layer.down.weight", f"lora_te_{_Q}"),
        ("sd1", f"text_encoder.{_Q[:-7]}.to_q_lora.down.weight", f"lora_te_{_Q}"),
        ("sdxl", f"text_encoder.{_Q}.lora_A.weight", f"lora_te1_{_Q}"),
        ("sdxl", f"text_encoder_2.{_Q}.lora.down.weight", f"lora_te2_{_Q}"),
        ("sdxl", f"clip_g.transformer.{_Q}.lora_down.weight", f"lora_te2_{_Q}"),
        ("sdxl", f"text_encoders.clip_l.transformer.{_Q}.lora_A.weight", f"lora_te1_{_Q}"),
        ("flux", f"text_encoder.{_Q}.lora_A.weight", f"lora_te1_{_Q}"),
        ("flux", _T5, "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
    ],
)
def test_text_encoders_have_the_names_of_the_family(family: str, theirs: str, ours: str) -> None:
    found = to_native({theirs: torch.zeros(1, 1), _IN_UNET[family]: torch.zeros(1, 1)})

    assert set(found.text_tensors) == {f"{ours.replace('.', '_')}.lora_down.weight"}
    assert len(found.tensors) == 1
    assert not found.unknown_keys


@pytest.mark.parametrize(
    "shapes", [{"down": (2, 8)}, {"down": (2, 8), "up": (2, 3)}, {"down": (2, 8), "up": (0, 2)}]
)
def test_damaged_factors_tell_no_family_by_their_sizes(shapes: dict[str, tuple[int, int]]) -> None:
    factors = {f"lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}

    for module, known in (
        ("single_blocks_0_linear2", {HUNYUAN_VIDEO, FLUX, FLUX_2, HUNYUAN_IMAGE}),
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", {SD1, SD2, SDXL}),
    ):
        assert set(find_lora_families({f"lora_unet_{module}": factors})) == known


def test_all_layers_of_krea_2_have_the_released_sizes() -> None:
    """The text's blocks have their own heads and widths; keys as wide as queries are another model's."""
    sizes = {
        name.removesuffix(".weight").replace(".", "_"): shape
        for name, (_, shape) in tensor_list("krea2-dit").items()
        if name.endswith(".weight") and len(shape) == 2
    }
    wrong = {**sizes, "blocks_3_attn_wk": sizes["blocks_3_attn_wq"]}

    assert len(sizes) == 264
    assert sizes_fit(KREA_2, sizes, sizes.get)
    assert not sizes_fit(KREA_2, wrong, wrong.get)


RELEASED = {
    "flux": "flux1-dev-dit flux1-dev-dit-diffusers chroma1-dit",
    "flux_2": "flux2-dev-dit flux2-klein-4b-dit flux2-klein-4b-dit-diffusers flux2-klein-9b-dit",
    "flux_3": "flux3-klein-base-dit flux3-klein-dit flux3-klein-base-dit-diffusers flux3-klein-dit-diffusers",
    "hunyuan_video": "hunyuanvideo-t2v-dit hunyuanvideo-t2v-dit-comfy skyreels-v1-i2v",
    "hunyuan_image": "hunyuanimage2.1-dit",
    "framepack": "framepack-dit",
    "lumina": "lumina2-dit",
    "qwen_image": "qwen-image-dit",
    "krea2": "krea2-dit krea2-dit-diffusers",
    "qwen_image_21": "qwen-image-2.1-dit qwen-image-2.1-dit-diffusers",
    "moss_image": "moss-image-dit moss-image-dit-comfy",
    "fibo_2": "fibo-2-dit",
    "ernie_image": "ernie-image-dit",
    "hidream_o1": "hidream-o1-comfy",
    "hunyuan_video_1_5": "hunyuanvideo1.5-dit hunyuanvideo1.5-dit-diffusers hunyuanvideo1.5-dit-comfy",
    "ideogram4": "ideogram4-dit",
    "kandinsky": "kandinsky5-lite-dit kandinsky5-pro-dit kandinsky5-lite-t2i-dit",
    "kandinsky_6": "kandinsky6-lite-dit kandinsky6-pro-dit kandinsky6-lite-dit-diffusers",
    "z_image": "z-image-dit z-image-dit-comfy",
    "wan": "wan2.1-t2v-14b-diffusers wan2.2-ti2v-5b",
    "ltx_2": "ltx2.3-dit-diffusers",
}
SOME = {
    "all": ".*",
    "blocks 7 and 20": r".*\.(7|20)\..*",
    "blocks 17 to 23": r".*\.(17|18|19|20|21|22|23)\..*",
    "the first five": r".*s\.[0-4]\..*",
    "attention": r".*att.*",
    "attention of 3": r".*s\.3\..*att.*",
    "feed-forward": r".*(mlp|ff|ffn|feed_forward).*",
}
MANY = 100
# models of other families with the same names and sizes in such a file
ALIKE = {
    ("flux", "flux1-dev-dit"): {"hunyuan_video", "flux_2"},
    ("flux", "flux1-dev-dit-diffusers"): {"hunyuan_video", "framepack"},
    ("flux", "chroma1-dit"): {"hunyuan_video", "flux_2"},
    ("framepack", "framepack-dit"): {"hunyuan_video", "flux"},
    ("hunyuan_video", "hunyuanvideo-t2v-dit-comfy"): {"flux", "flux_2"},
    # of attention alone
    ("qwen_image_21", "qwen-image-2.1-dit"): {"flux_2"},
    ("qwen_image_21", "qwen-image-2.1-dit-diffusers"): {"flux_2"},
    ("flux_2", "flux2-klein-4b-dit"): {"hunyuan_video", "flux"},
    ("hunyuan_video", "hunyuanvideo-t2v-dit"): {"flux", "flux_2"},
    ("hunyuan_video", "skyreels-v1-i2v"): {"flux", "flux_2"},
    ("qwen_image", "qwen-image-dit"): {"hunyuan_video", "framepack", "flux", "flux_2"},
}


def rank_one(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    def hollow(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    if kind == "LoHa":
        return {
            f"hada_w{n}_{x}": hollow(rows, 1) if x == "a" else hollow(1, columns) for n in "12" for x in "ab"
        }
    if kind == "LoKr" and not rows % 4 and not columns % 4:
        return {"lokr_w1": hollow(4, 4), "lokr_w2": hollow(rows // 4, columns // 4)}
    return {"lora_A.weight": hollow(1, columns), "lora_B.weight": hollow(rows, 1)}


@pytest.mark.parametrize("some", SOME)
@pytest.mark.parametrize(
    ("family", "manifest"), [(name, one) for name, manifests in RELEASED.items() for one in manifests.split()]
)
def test_a_file_without_metadata_is_told_by_names_sizes_and_numbers_of_blocks(
    family: str, manifest: str, some: str
) -> None:
    shapes = {
        re.sub(r"^model\.(model|diffusion_model)\.", "", name).removesuffix(".weight"): shape
        for name, (_, shape) in tensor_list(manifest).items()
        if name.endswith(".weight") and len(shape) == 2 and re.fullmatch(SOME[some], name)
    }
    found = []
    for kind in ("LoRA", "LoHa", "LoKr")[: len(shapes) and (1 if len(shapes) > MANY else 3)]:
        tensors = {
            f"diffusion_model.{path}.{part}": one
            for path, (rows, columns) in shapes.items()
            for part, one in rank_one(kind, rows, columns).items()
        }
        native = to_native(tensors).tensors
        assert len(native) == len(tensors)
        found.append({one.name for one in find_lora_families(group_by_module(native))})

    for names in found:
        assert names == found[0]
        assert family in names
        assert names <= {family} | ALIKE.get((family, manifest), set())
    is_for_sure = (some == "all" and family != "framepack") or (family, manifest) not in ALIKE
    assert not (is_for_sure and found) or found[0] == {family}
