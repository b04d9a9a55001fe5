"""Tensor names of LoRA files in every dialect; files saved here act in diffusers as here, and back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor

from networks.convert import convert_file
from networks.key_formats import read_own_names, split_names, to_native
from networks.loading import read_lora
from networks.module_factors import add_missing_alphas
from networks.module_names import FAMILIES, diffusers_path, from_alias, module_path, select_family
from networks.names.layouts import FamilyNames
from networks.writing import TranslatedModules, in_dialect
from tests.golden_cases import read_case
from tests.hunyuan_model import making as hunyuan
from tests.manifests import manifest_names, tensor_list
from tests.networks.making import (
    add_lora,
    golden_dit,
    golden_lora,
    inputs,
    saved_by_diffusers,
    tiny_dit,
)
from tests.tiny.loras import make_lora
from tests.tiny.wan_dit import diffusers_name
from tests.wan.making import in_diffusers
from wan.model import WanModel
from wan.names import WAN


def factors(name: str, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.lora_down.weight": torch.ones(rank, 3),
        f"{name}.lora_up.weight": torch.ones(3, rank),
    }


def to_other(tensors: dict[str, Tensor], target: str = "other") -> TranslatedModules:
    family = select_family(name.removeprefix("lora_unet_").partition(".")[0] for name in tensors)
    return in_dialect(tensors, family, target)


def golden_tensors() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    description, expected = read_case("lora_merge_convert")
    network = make_lora("lora_wan", description["rank"], description["alpha"], golden_dit(description))
    key, scale = description["lora_weights_model_key"], description["lora_up_extra_scale"]
    return description, golden_lora(network, key, scale), expected


def test_conversion_to_the_other_dialect_equals_the_recorded_one() -> None:
    description, tensors, expected = golden_tensors()

    other, left_out = to_other(tensors)

    assert left_out == {}
    assert {name: list(tensor.shape) for name, tensor in other.items()} == dict(
        map(tuple, description["other_keys"])
    )
    for name in (name for name in expected if name.startswith("other.")):
        torch.testing.assert_close(other[name[6:]], expected[name], atol=0, rtol=1e-6)


def test_conversion_back_equals_the_recorded_one() -> None:
    _, tensors, expected = golden_tensors()

    back = add_missing_alphas(to_native(to_other(tensors)[0]).tensors)

    assert back.keys() == tensors.keys()
    for name in (name for name in expected if name.startswith("back.")):
        torch.testing.assert_close(back[name[5:]], expected[name], atol=0, rtol=1e-6)
    assert back["lora_unet_blocks_1_ffn_0.alpha"].dtype == torch.int64


@pytest.mark.parametrize("family", ["hunyuan", "wan"])
def test_module_paths_are_the_recorded_ones(family: str) -> None:
    description, _ = read_case("lora_merge_convert")
    for name, expected in description["name_maps"][f"{family}_default_to_other"]:
        assert list(to_other(factors(name))[0]) == expected


def wan_manifests() -> list[str]:
    names = [*manifest_names("wan2.1"), *manifest_names("wan2.2")]
    return [name for name in names if not name.endswith(("vae", "diffusers"))]


@pytest.mark.parametrize("manifest", wan_manifests())
def test_every_parameter_of_a_published_wan_model_is_named(manifest: str) -> None:
    """Matrices, norms, and what is not a module's weight or bias: the modulation, positions of images."""
    paths = {
        name.removesuffix(".weight")
        for name in tensor_list(manifest)
        if not name.endswith(".bias") and "control_adapter" not in name
    }

    assert "blocks.0.modulation" in paths
    for path in paths:
        assert module_path(path.replace(".", "_"), WAN) == path


@pytest.mark.parametrize("manifest", wan_manifests())
def test_names_of_the_diffusers_layout_are_brought_into_ours_and_back(manifest: str) -> None:
    for name in tensor_list(manifest):
        if not name.endswith(".bias") and "control_adapter" not in name and "ref_conv" not in name:
            foreign, own = diffusers_name(name).removesuffix(".weight"), name.removesuffix(".weight")
            assert from_alias(foreign.replace(".", "_"), WAN) == own.replace(".", "_")
            assert diffusers_path(own.replace(".", "_"), WAN) == foreign


def test_names_that_several_families_have_are_those_of_like_blocks() -> None:
    like = (
        {"hunyuan_video", "hunyuan_video_1_5", "hunyuan_image", "flux", "flux_2", "flux_3"},
        {"sd1", "sd2", "sdxl"},
        {"framepack", "qwen_image", "qwen_image_21", "ltx_2"},  # all in diffusers' layout
        {"lumina", "z_image", "fibo_2", "ideogram4"},
        {"kandinsky", "kandinsky_6"},
    )
    of_several = {"x_embedder", "img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    of_several |= {"time_embedding.0", "time_embedding.2", "x_embedder.proj"}
    of_several |= {"time_embedding.linear_1", "time_embedding.linear_2"}
    for family in FAMILIES:
        for module in family.modules:
            name = module.replace("{n}", "7").replace(".", "_")
            owners = {other.name for other in FAMILIES if module_path(name, other)}
            is_like = any({family.name} < owners <= names for names in like)
            assert owners == {family.name} or is_like or module in of_several


Q = "blocks_0_self_attn_q"


@pytest.mark.parametrize(
    ("key", "native"),
    [
        ("lycoris_blocks_0_self_attn_q.hada_w1_a", f"{Q}.hada_w1_a"),
        ("transformer.blocks.0.attn1.to_q.lora_B", f"{Q}.lora_up.weight"),
        ("blocks.0._fsdp_wrapped_module.self_attn.q.magnitude", f"{Q}.dora_scale"),
        ("lycoris_blocks_0_norm3.w_norm", "blocks_0_norm3.diff"),
        ("lycoris_blocks_0_norm3.b_norm", "blocks_0_norm3.diff_b"),
        ("lora_unet__blocks_0_cross_attn_k.lora_up.weight", "blocks_0_cross_attn_k.lora_up.weight"),
        ("diffusion_model.blocks.0.ffn.2.lora_up.weight", "blocks_0_ffn_2.lora_up.weight"),
        ("diffusion_model.blocks.0.norm3.diff_b", "blocks_0_norm3.diff_b"),
        ("diffusion_model.txt_in.c_embedder.in_layer.diff", "txt_in_c_embedder_linear_1.diff"),
        ("diffusion_model.transformer_blocks.0.attn.to_q.diff", "transformer_blocks_0_attn_to_q.diff"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", f"{Q}.lora_down.weight"),
        ("transformer.blocks.0.attn1.to_q.lora_B.other.bias", f"{Q}.lora_up.bias"),
        ("transformer.blocks.0.attn1.to_q.lora_magnitude_vector", f"{Q}.dora_scale"),
        ("transformer.blocks.0.attn2.to_out.0.lora.up.weight", "blocks_0_cross_attn_o.lora_up.weight"),
        ("transformer.condition_embedder.time_proj.lora_B.weight", "time_projection_1.lora_up.weight"),
        ("blocks.0.attn1.to_q.lora_magnitude_vector.default.weight", f"{Q}.dora_scale"),
        ("blocks.0.attn1.to_q.lora_A.my-style_1.weight", f"{Q}.lora_down.weight"),
        ("base_model.model.blocks.11.ffn.net.0.proj.lora_B.default.weight", "blocks_11_ffn_0.lora_up.weight"),
        ("pipe.dit.blocks.0.ffn.2.lora_B.default.weight", "blocks_0_ffn_2.lora_up.weight"),
        ("lora_transformer_transformer_blocks_0_attn_to_k.diff", "transformer_blocks_0_attn_to_k.diff"),
        ("mid_block.resnets.0.conv1.lora_A.weight", "mid_block_resnets_0_conv1.lora_down.weight"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        ),
    ],
)
def test_every_dialect_is_brought_into_ours(key: str, native: str) -> None:
    found = to_native({key: torch.ones(2, 2)})

    assert list(found.tensors) == [f"lora_unet_{native}"]
    assert found.unknown_keys == ()


def test_keys_of_text_encoders_and_unknown_ones_are_told_apart() -> None:
    keys = (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.text_model.encoder.layers.0.x.lora_A.weight",
        "blocks.0.modulation",
    )

    found = to_native({key: torch.ones(2, 2) for key in keys})

    assert found.tensors == {}
    assert list(found.text_tensors) == [keys[0], "lora_te1_text_model_encoder_layers_0_x.lora_down.weight"]
    assert found.unknown_keys == keys[2:]


CLIP, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("start", "path", "family", "prefix"),
    [
        ("lora_te2_", T5, "flux", "lora_te3"),  # OneTrainer
        ("lora_te_", CLIP, "flux", "lora_te1"),
        ("lora_clip_", CLIP, "flux", "lora_te1"),  # InvokeAI
        ("lora_t5_", T5, "flux", "lora_te3"),
        ("text_encoders.t5xxl.transformer.", T5, "flux", "lora_te3"),
        ("base_model.model.text_encoder_2.", T5, None, "lora_te3"),
        ("base_model.model.", T5, None, "lora_te3"),
        ("te1.", CLIP, "sd1", "lora_te"),
        ("lora_te1_", CLIP, "sd2", "lora_te"),
        ("text_encoder_2.", CLIP, "sdxl", "lora_te2"),
        ("text_encoders.clip_g.transformer.", CLIP, "sdxl", "lora_te2"),
        ("lora_te2_", CLIP, "hunyuan_video", "lora_te1"),  # its first is a language model there
        ("lora_te1_", "layers.0.mlp.up_proj", "hunyuan_video", None),
        ("text_encoder.model.", "layers.0.mlp.up_proj", "lumina", "lora_te"),
    ],
)
def test_layers_say_which_text_encoder_it_is(
    start: str, path: str, family: str | None, prefix: str | None
) -> None:
    name = path.replace(".", "_")
    key = f"{start}{name if start.startswith('lora') else path}.lora_A.weight"
    found = to_native({key: torch.ones(2, 2)}, family)
    if prefix is None:
        assert found.unnamed_text_keys == (key,)
    else:
        assert list(found.text_tensors) == [f"{prefix}_{name}.lora_down.weight"]
    assert not found.tensors


def test_an_alpha_of_all_is_that_of_every_encoder_and_expert() -> None:
    key = f"text_encoder.{CLIP}.lora_A.weight"
    tensors = {"alpha": torch.tensor(2.0), key: torch.ones(2, 2)}
    assert float(to_native(tensors).text_tensors[f"lora_te1_{CLIP.replace('.', '_')}.alpha"]) == 2
    assert to_native(tensors, with_texts=False).unnamed_text_keys == (key,)
    parts = split_names(
        ["alpha", *(f"{one}.blocks.0.self_attn.q.diff" for one in ("transformer", "transformer_2"))]
    )
    assert len(parts) == 2
    assert all("alpha" in names for names in parts.values())


@pytest.mark.parametrize(
    ("module", "size", "families", "family"),
    [
        ("double_blocks.0.img_attn.proj", 3072, ["hunyuan_video", "flux"], None),
        ("down_blocks.3.resnets.0.time_emb_proj", 1280, ["sd1", "sd2"], "sd1"),  # of the same names
        ("single_blocks.0.linear2", 3072, ["hunyuan_video", "flux"], None),
    ],
)
def test_no_family_is_taken_where_several_are_possible(
    module: str, size: int, families: list[str], family: str | None
) -> None:
    down, up = torch.zeros(4, size), torch.zeros(size, 4)
    if module.endswith("linear2"):
        down = torch.zeros(4, 5 * size)
    native = to_native({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    names = [possible.name for possible in native.families]
    assert [name for name in families if name in names] == families
    assert (native.family and native.family.name) == family


def test_what_has_no_form_in_the_other_dialect_is_named_with_its_reason() -> None:
    tensors = factors("lora_unet_blocks_0_ffn_0") | factors("lora_unet_blocks_0_unheard_of")
    lokr = {"lokr_w1": torch.ones(1, 1), "lokr_w2": torch.ones(3, 3)}
    tensors |= {f"lora_unet_blocks_0_ffn_2.{part}": tensor for part, tensor in lokr.items()}

    other, left_out = to_other(tensors)

    assert len(other) == 4
    assert left_out.keys() == {"lora_unet_blocks_0_unheard_of"}
    assert "no known model" in left_out["lora_unet_blocks_0_unheard_of"]
    assert "lokr_w1, lokr_w2" in to_other(tensors, "diffusers")[1]["lora_unet_blocks_0_ffn_2"]


TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def run_there(other: WanTransformer3DModel, dit: WanModel) -> Tensor:
    given = inputs(dit)
    texts = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text))) for text in given["text"]])
    return other(given["noisy"], given["timesteps"], texts, given.get("image_embeds"), return_dict=False)[0]


def load_there(other: WanTransformer3DModel, path: Path) -> None:
    state = WanLoraLoaderMixin.lora_state_dict(str(path))
    other.load_lora_adapter(state, prefix="transformer")


PATTERNS: dict[str, dict[str, dict[str, int]]] = {
    "none": {},
    "alphas": {"alpha_pattern": {"to_q": 9, "attn2.to_out.0": 1, "ffn.net.0.proj": 6}},
    "ranks too": {
        "alpha_pattern": {"attn1.to_q": 9, "to_q": 1, "proj": 5},
        "rank_pattern": {"to_q": 2, "attn1.to_out.0": 8},
    },
    "expressions": {
        "alpha_pattern": {r"blocks\.[1-9]\d*\.attn\d\.to_.*": 9, "^proj_out$": 1, r"blocks\.0\..*": 2}
    },
}


@pytest.mark.parametrize("settings", ["absent", *PATTERNS])
def test_a_lora_saved_by_diffusers_acts_here_as_there(tmp_path: Path, settings: str) -> None:
    dit = tiny_dit(tmp_path)
    other = in_diffusers(dit.config, dit.state_dict())
    is_said = settings != "absent"
    alpha = 3 if is_said else 4  # without settings in the file alpha is the rank
    targets = ["to_q", "to_out.0", "net.0.proj", "time_proj", "proj_out"]
    file, patterns = tmp_path / "lora.safetensors", PATTERNS.get(settings, {})
    path = saved_by_diffusers(other, file, targets, alpha, is_said, **patterns)

    torch.testing.assert_close(add_lora(dit, path)(**inputs(dit)), run_there(other, dit), **TOLERANCE)


@pytest.mark.parametrize("target", [None, "default", "other"])
def test_a_lora_with_biases_acts_as_in_diffusers(tmp_path: Path, target: str | None) -> None:
    dit = tiny_dit(tmp_path)
    other = in_diffusers(dit.config, dit.state_dict())
    path = tmp_path / "lora.safetensors"
    saved_by_diffusers(other, path, ["to_q", "net.2"], 3, lora_bias=True)
    plain = in_diffusers(dit.config, dit.state_dict())
    expected = run_there(other, dit)
    if target is not None:
        convert_file(path, tmp_path / "converted.safetensors", target)
        path = tmp_path / "converted.safetensors"

    torch.testing.assert_close(add_lora(dit, path)(**inputs(dit)), expected, **TOLERANCE)
    assert float((expected - run_there(plain, dit)).abs().max()) > 0.01
    if target == "other":  # which diffusers reads again
        load_there(plain, path)
        torch.testing.assert_close(run_there(plain, dit), expected, **TOLERANCE)


@torch.no_grad()
def test_parts_of_fused_weights_are_put_together_with_their_ranks_alphas_and_biases(tmp_path: Path) -> None:
    theirs, dit, given = hunyuan.in_diffusers("t2v"), hunyuan.tiny_model("t2v"), hunyuan.tiny_inputs("t2v")
    patterns = {"alpha_pattern": {"to_q": 9}, "rank_pattern": {"to_v": 2}}
    targets = r".*\.(to_q|to_v|add_k_proj|proj_mlp)"
    file = tmp_path / "lora.safetensors"
    path = saved_by_diffusers(theirs, file, targets, 3, lora_bias=True, **patterns)
    convert_file(path, tmp_path / "fused.safetensors", "default", "hunyuan_video")

    add_lora(dit, tmp_path / "fused.safetensors")

    assert any("linear1.lora_up.bias" in name for name in read_lora(tmp_path / "fused.safetensors").tensors)
    torch.testing.assert_close(dit(**given), hunyuan.run_there(theirs, given), **TOLERANCE)


@pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.name)
def test_names_of_a_file_of_ours_are_read_without_looking_at_those_of_other_programs(
    family: FamilyNames,
) -> None:
    modules = [path.replace("{n}", "3").replace(".", "_") for path in [*family.modules][:40]]
    tensors = {name: tensor for module in modules for name, tensor in factors(f"lora_unet_{module}").items()}

    own = read_own_names(tensors, family)
    looked_up = to_native(tensors, family.name)

    assert own is not None
    assert own.tensors.keys() == looked_up.tensors.keys()
    assert all(own.tensors[name] is tensor for name, tensor in looked_up.tensors.items())
    unlike_tensors = [field.name for field in dataclasses.fields(own) if field.name != "tensors"]
    for name in unlike_tensors:
        assert getattr(own, name) == getattr(looked_up, name), name


@pytest.mark.parametrize(
    "name", ["lora_te_text_model.alpha", "lora_unet_blocks_0_ffn_9.alpha", "blocks_0_ffn_0.alpha"]
)
def test_one_other_name_has_the_names_of_all_programs_looked_at(name: str) -> None:
    tensors = {**factors("lora_unet_blocks_0_ffn_0"), name: torch.tensor(1.0)}

    assert read_own_names(tensors, WAN) is None
