"""LoRA on HunyuanVideo: fidelity, diffusers both ways, files of other tools, conversion, merging."""

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders import HunyuanVideoLoraLoaderMixin, lora_pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hunyuan_model.checkpoints import load_dit
from hunyuan_model.model import HunyuanVideoModel
from modules.errors import CheckpointError
from modules.records import Placement
from networks import lora_hunyuan
from networks.convert import convert_file
from networks.loading import import_network_module, read_lora
from networks.lora import LoraNetwork
from networks.merge import LoraPatch, LoraUse, merge_into_file
from networks.module_names import HUNYUAN_VIDEO, alias, choose_family, module_path, relatives, underscored
from networks.parts import fuse
from tests.golden_cases import read_case
from tests.hunyuan_model.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.manifests import tensor_list
from tests.networks.making import golden_lora, randomize
from tests.tiny.hunyuan_dit import CONFIGS, comfy_state, diffusers_parts, diffusers_state, tiny_state, write_dit

CPU = torch.device("cpu")
NEAR = 5e-6  # of the largest value; float32, summed in another order
PUBLISHED_WIDTH = 3072
IN_DIFFUSERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],  # what diffusers' own training scripts take
    "some": ["to_v", "add_q_proj", "proj_mlp", "net.0.proj"],
    "all": r".*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out|linear_1|linear)",
    "last": r"norm_out\.linear|proj_out|time_text_embed.timestep_embedder.linear_2",
}


def network_of(dit: nn.Module, rank: int = 4, alpha: float = 3.0, **arguments: Any) -> LoraNetwork:
    """A LoRA with random up factors, not attached yet."""
    network = lora_hunyuan.create_arch_network(1.0, rank, alpha, None, None, dit, **arguments)
    randomize(network)
    return network


def saved(path: Path, kind: str = "t2v", dtype: torch.dtype = torch.float32, **arguments: Any) -> LoraNetwork:
    network = network_of(tiny_model(kind), **arguments)
    network.save_weights(path, dtype, {"ss_base_model_version": "hunyuan_video"})
    return network


@torch.no_grad()
def run_here(kind: str, path: Path, multiplier: float = 1.0) -> Tensor:
    """What the model with a LoRA file added gives."""
    dit = tiny_model(kind)
    patch = LoraPatch([LoraUse(read_lora(path), multiplier)])
    dit.load_state_dict({name: patch(name, weight) for name, weight in dit.state_dict().items()})
    patch.check()
    assert patch.unused() == []
    return dit(**tiny_inputs(kind))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("hv_lora")
    settings = description["lora"]
    dit, inputs, _ = golden_model("hv_dit_guidance")
    network = lora_hunyuan.create_arch_network(1.0, settings["rank"], settings["alpha"], None, None, dit)
    found = [[name, layer.lora_down.in_features, layer.lora_up.out_features] for name, layer in network.named_children()]
    assert found == settings["modules_name_in_out"]
    golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.apply_to(None, dit)
    sigmas = torch.tensor(description["t_in_0_1"]).view(-1, 1, 1, 1, 1)
    inputs |= {
        "noisy": (1 - sigmas) * tensors["latents"] + sigmas * tensors["noise"],
        "timesteps": tensors["timesteps"],
        "llama": tensors["text_states"],
        "llama_mask": tensors["text_mask"],
        "clip_l": tensors["text_states_2"],
        "guidance": torch.ones(2),
    }

    out = dit(**inputs)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    torch.testing.assert_close(out, tensors["out"], rtol=0, **description["tolerance"]["out"])
    assert_near(out.detach(), tensors["out"])
    torch.testing.assert_close(loss.detach().view(1), tensors["loss"], atol=0, **description["tolerance"]["loss"])
    rtol = description["tolerance"]["grads"]["rtol"]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        total, norm = description["grad_sum_and_l2norm"][name]
        assert float(parameter.grad.norm()) == pytest.approx(norm, rel=rtol)
        assert float(parameter.grad.sum()) == pytest.approx(total, rel=rtol, abs=rtol * norm)
    assert all(parameter.grad is None for parameter in dit.parameters())


def test_the_module_goes_by_the_name_that_tuners_know() -> None:
    assert import_network_module("networks.lora") is lora_hunyuan


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_model_loaded_with_a_lora_equals_one_with_the_network_attached(tmp_path: Path, kind: str) -> None:
    network = saved(tmp_path / "lora.safetensors", kind)
    dit = tiny_model(kind)
    attached = network_of(dit)
    attached.load_state_dict(network.state_dict())
    attached.apply_to(None, dit)

    with torch.no_grad():
        expected = dit(**tiny_inputs(kind))

    assert_near(run_here(kind, tmp_path / "lora.safetensors"), expected)
    assert float((expected - tiny_model(kind)(**tiny_inputs(kind))).abs().max()) > 0.01


# diffusers and PEFT


@pytest.fixture
def tiny_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter has the width of the published model written into it; here with that of the tiny one."""

    def narrowed(code: types.CodeType) -> types.CodeType:
        width = CONFIGS["t2v"].dim
        constants = (narrowed(c) if isinstance(c, types.CodeType) else width if c == PUBLISHED_WIDTH else c for c in code.co_consts)
        return code.replace(co_consts=tuple(constants))

    function = lora_pipeline._convert_hunyuan_video_lora_to_diffusers
    tiny = types.FunctionType(narrowed(function.__code__), function.__globals__)
    monkeypatch.setattr(lora_pipeline, function.__name__, tiny)


def load_there(theirs: HunyuanVideoTransformer3DModel, path: Path) -> None:
    theirs.load_lora_adapter(HunyuanVideoLoraLoaderMixin.lora_state_dict(str(path)), prefix="transformer")


@pytest.mark.usefixtures("tiny_converter")
@pytest.mark.parametrize("arguments", [{}, {"exclude_patterns": r"[r'.*mlp.*', r'single_blocks\.1\..*']"}])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_lora_made_here_acts_in_diffusers_as_here(tmp_path: Path, kind: str, arguments: dict[str, str]) -> None:
    saved(tmp_path / "lora.safetensors", kind, **arguments)
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    theirs = in_diffusers(kind)
    plain = run_there(theirs, tiny_inputs(kind))

    load_there(theirs, tmp_path / "other.safetensors")

    expected = run_there(theirs, tiny_inputs(kind))
    assert_near(run_here(kind, tmp_path / "lora.safetensors"), expected)
    assert float((expected - plain).abs().max()) > 0.01


def test_at_full_width_diffusers_cuts_our_factors_where_its_layout_does(tmp_path: Path) -> None:
    generator, factors = torch.Generator().manual_seed(0), {}
    for module, (rows, columns) in {
        "double_blocks.0.img_attn_qkv": (9216, 3072),
        "double_blocks.0.txt_mlp.fc1": (12288, 3072),
        "single_blocks.0.linear1": (21504, 3072),
        "single_blocks.0.linear2": (3072, 15360),
    }.items():
        name = f"lora_unet_{underscored(module)}"
        factors[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        factors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator)
        factors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(factors, tmp_path / "lora.safetensors")
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")

    there = HunyuanVideoLoraLoaderMixin.lora_state_dict(str(tmp_path / "other.safetensors"))

    wide = {name: factor for name, factor in factors.items() if name.endswith("lora_up.weight")}
    paths = {name: module_path(name.removeprefix("lora_unet_").partition(".")[0], HUNYUAN_VIDEO) for name in wide}
    state = {f"{paths[name]}.weight": factor for name, factor in wide.items()}
    expected = diffusers_state({"img_in.proj.weight": torch.empty(PUBLISHED_WIDTH, 0)} | state)
    del expected["x_embedder.proj.weight"]
    for name, factor in expected.items():
        assert torch.equal(there[f"transformer.{name.removesuffix('weight')}lora_B.weight"], factor)
    assert len(there) == 2 * len(expected)


def made_there(folder: Path, kind: str, targets: Any, alpha: int = 4, with_settings: bool = True) -> tuple[Path, Tensor]:
    """A LoRA that diffusers saves, and what its model gives with it."""
    theirs = in_diffusers(kind)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    path = folder / "theirs.safetensors"
    if with_settings:
        theirs.save_lora_adapter(folder, weight_name=path.name)
    else:
        names = {name.replace(".default", ""): tensor for name, tensor in theirs.state_dict().items() if "lora_" in name}
        save_file({f"transformer.{name}": tensor for name, tensor in names.items()}, path)
    return path, run_there(theirs, tiny_inputs(kind))


@pytest.mark.parametrize("with_settings", [True, False])
@pytest.mark.parametrize("targets", IN_DIFFUSERS)
def test_a_lora_that_diffusers_saves_acts_here_as_there(tmp_path: Path, targets: str, with_settings: bool) -> None:
    alpha = 3 if with_settings else 4  # without settings in the file alpha is the rank
    path, expected = made_there(tmp_path, "i2v", IN_DIFFUSERS[targets], alpha, with_settings)

    out = run_here("i2v", path)

    assert_near(out, expected)
    assert float((out - tiny_model("i2v")(**tiny_inputs("i2v"))).abs().max()) > 1e-3


@pytest.mark.parametrize("target", ["default", "other"])
@pytest.mark.parametrize("targets", ["some", "all"])
def test_a_lora_of_diffusers_acts_the_same_once_converted(tmp_path: Path, targets: str, target: str) -> None:
    path, expected = made_there(tmp_path, "t2v", IN_DIFFUSERS[targets], alpha=3)

    convert_file(path, tmp_path / "converted.safetensors", target)

    names = load_file(tmp_path / "converted.safetensors")
    assert not any("transformer_blocks" in name for name in names)
    assert_near(run_here("t2v", tmp_path / "converted.safetensors"), expected)


@pytest.mark.usefixtures("tiny_converter")
def test_there_and_back_through_diffusers_is_the_same_lora(tmp_path: Path) -> None:
    network = saved(tmp_path / "lora.safetensors", alpha=4)
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    cut = HunyuanVideoLoraLoaderMixin.lora_state_dict(str(tmp_path / "other.safetensors"))
    save_file({name: tensor.clone() for name, tensor in cut.items()}, tmp_path / "cut.safetensors")

    convert_file(tmp_path / "cut.safetensors", tmp_path / "back.safetensors", "default")

    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name].float(), tensor) for name, tensor in network.state_dict().items())


def test_a_part_that_no_file_has_is_as_high_as_in_the_published_models(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"lora_unet_single_transformer_blocks_{block}_attn_to_{letter}" for block in (0, 1) for letter in "qkv"]
    tensors = {
        f"{name}.lora_{part}.weight": torch.ones(2, 8) if part == "down" else torch.ones(8, 2)
        for name in names
        for part in ("down", "up")
    }

    with caplog.at_level(logging.INFO):
        fused = fuse(tensors)

    assert fused["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape == (7 * 8, 2)
    assert not fused["lora_unet_single_blocks_1_linear1.lora_up.weight"][24:].any()
    assert len([record for record in caplog.records if "4 times as high" in record.message]) == 1


def test_parts_of_another_kind_in_one_block_do_not_hinder_the_others(caplog: pytest.LogCaptureFixture) -> None:
    plain, lokr = "lora_unet_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_1_attn_to_q"
    tensors = {f"{plain}.lora_down.weight": torch.ones(2, 8), f"{plain}.lora_up.weight": torch.ones(8, 2)}
    tensors |= {f"{lokr}.lokr_w1": torch.ones(2, 2), f"{lokr}.lokr_w2": torch.ones(4, 4)}

    fused = fuse(tensors)

    assert fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (24, 2)
    assert f"{lokr}.lokr_w1" in fused
    assert "only plain LoRAs" in caplog.text


def test_a_last_layer_of_another_size_is_not_cut_to_fit(caplog: pytest.LogCaptureFixture) -> None:
    name = "lora_unet_norm_out_linear"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(32, 2)}

    assert fuse(tensors, lambda _: 16).keys() == tensors.keys()
    assert "do not fit into 16 rows" in caplog.text


def test_a_lora_of_onetrainer_is_hunyuan_videos(tmp_path: Path) -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "theirs.safetensors")

    convert_file(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "default")

    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in load_file(tmp_path / "ours.safetensors")


def test_parts_with_alphas_of_their_own_keep_their_strength() -> None:
    generator, expected, tensors = torch.Generator().manual_seed(0), [], {}
    for letter, rank, alpha in (("q", 2, 1.0), ("k", 3, 6.0), ("v", 1, 0.0)):
        down, up = torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator)
        name = f"lora_unet_transformer_blocks_7_attn_add_{letter}_proj"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        expected.append((alpha or rank) / rank * up @ down)

    fused = fuse(tensors)

    down, up, alpha = (
        fused[f"lora_unet_double_blocks_7_txt_attn_qkv.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    torch.testing.assert_close(alpha / len(down) * up @ down, torch.cat(expected))
    assert len(fused) == 3


def test_what_cannot_be_put_together_stays_and_still_acts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    tensors = {"lora_unet_transformer_blocks_0_attn_to_k.diff": weight}

    assert fuse(tensors).keys() == tensors.keys()

    assert "only plain LoRAs" in caplog.text
    save_file(tensors, tmp_path / "lora.safetensors")
    patch, name = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors"))]), "double_blocks.0.img_attn_qkv.weight"
    changed = patch(name, tiny_state()[name]) - tiny_state()[name]
    torch.testing.assert_close(changed, torch.cat([torch.zeros(128, 128), weight, torch.zeros(128, 128)]))


@pytest.mark.parametrize("large", [False, True])
def test_a_lokr_for_a_part_and_one_for_the_whole_change_the_right_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("networks.merge._BLOCK_ELEMENTS", 1000)
    generator = torch.Generator().manual_seed(0)
    part, whole = torch.randn(16, 16, generator=generator), torch.randn(16, 16, generator=generator)
    small, tall = torch.randn(8, 8, generator=generator), torch.randn(24, 8, generator=generator)
    save_file(
        {"transformer.transformer_blocks.0.attn.to_v.lokr_w1": part, "transformer.transformer_blocks.0.attn.to_v.lokr_w2": small},
        tmp_path / "part.safetensors",
    )
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": whole, "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": tall},
        tmp_path / "whole.safetensors",
    )
    patch = LoraPatch([LoraUse(read_lora(tmp_path / f"{name}.safetensors")) for name in ("part", "whole")])
    expected = torch.kron(whole, tall)
    expected[256:] += torch.kron(part, small)

    fused = patch("double_blocks.0.img_attn_qkv.weight", torch.zeros(384, 128))
    cut = [patch(f"transformer_blocks.0.attn.to_{letter}.weight", torch.zeros(128, 128)) for letter in "qkv"]

    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(torch.cat(cut), expected)


def test_a_part_of_another_size_is_refused(tmp_path: Path) -> None:
    factors = {"lora_A.weight": torch.ones(2, 128), "lora_B.weight": torch.ones(256, 2)}
    save_file({f"transformer.transformer_blocks.0.attn.to_v.{part}": t for part, t in factors.items()}, tmp_path / "x.safetensors")
    patch = LoraPatch([LoraUse(read_lora(tmp_path / "x.safetensors"))])

    with pytest.raises(
        CheckpointError, match=r"for double_blocks.0.img_attn_qkv.weight it has \[256, 128\], the model \[384, 128\]"
    ):
        patch("double_blocks.0.img_attn_qkv.weight", torch.zeros(384, 128))


# Starting from a file


def test_training_can_start_from_a_lora_of_diffusers(tmp_path: Path) -> None:
    path, expected = made_there(tmp_path, "t2v", r".*_blocks\.\d+\..*(to_q|to_v|add_k_proj|net\.2|proj_mlp)", alpha=3)
    dit = tiny_model("t2v")
    network = lora_hunyuan.create_arch_network_from_weights(1.0, read_lora(path).tensors, unet=dit)

    problems = network.load_weights(path)

    network.apply_to(None, dit)
    assert problems == []
    with torch.no_grad():
        assert_near(dit(**tiny_inputs("t2v")), expected)


# Other tools


@pytest.mark.parametrize("start", ["diffusion_model.", "transformer.", "base_model.model."])
@pytest.mark.parametrize("state", [comfy_state, dict], ids=["ComfyUI", "official"])
def test_files_of_diffusion_pipe_and_comfyui_act_as_ours(
    tmp_path: Path, state: Callable[[dict[str, Tensor]], dict[str, Tensor]], start: str
) -> None:
    network = saved(tmp_path / "ours.safetensors", alpha=4)
    theirs = {}
    for name, layer in network.named_children():
        path = module_path(name.removeprefix("lora_unet_"), HUNYUAN_VIDEO)
        (renamed,) = state({f"{path}.weight": layer.lora_up.weight})
        theirs[f"{start}{renamed.removesuffix('weight')}lora_A.weight"] = layer.lora_down.weight.detach()
        theirs[f"{start}{renamed.removesuffix('weight')}lora_B.weight"] = layer.lora_up.weight.detach()
    save_file(theirs, tmp_path / "theirs.safetensors")

    out = run_here("t2v", tmp_path / "theirs.safetensors")

    assert torch.equal(out, run_here("t2v", tmp_path / "ours.safetensors"))


def test_conversion_there_and_back_keeps_names_and_product(tmp_path: Path) -> None:
    network = saved(tmp_path / "ours.safetensors")
    convert_file(tmp_path / "ours.safetensors", tmp_path / "other.safetensors", "other")
    convert_file(tmp_path / "other.safetensors", tmp_path / "back.safetensors", "default")

    other, back = load_file(tmp_path / "other.safetensors"), load_file(tmp_path / "back.safetensors")

    assert all(name.startswith(("diffusion_model.double_blocks.", "diffusion_model.single_blocks.")) for name in other)
    assert back.keys() == network.state_dict().keys()
    for name, layer in network.named_children():
        product = back[f"{name}.lora_up.weight"] @ back[f"{name}.lora_down.weight"]
        torch.testing.assert_close(product, layer.scale * layer.lora_up.weight @ layer.lora_down.weight, rtol=1e-5, atol=1e-6)


# Merging from file to file


@pytest.mark.parametrize("dialect", ["pt_wrapped", "safetensors", "prefixed", "comfy", "comfy_all_in_one", "diffusers_sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_of_a_model_is_merged_to_the_same(tmp_path: Path, dialect: str, dtype: torch.dtype) -> None:
    saved(tmp_path / "ours.safetensors")
    uses = [LoraUse(read_lora(tmp_path / "ours.safetensors"), 0.5)]
    state = tiny_state(dtype=dtype)

    merge_into_file(write_dit(tmp_path, state, dialect), uses, tmp_path / "merged.safetensors", CPU)

    patch = LoraPatch(uses)
    merged = load_dit(tmp_path / "merged.safetensors", Placement(CPU)).state_dict()
    for name, tensor in state.items():
        assert torch.equal(merged[name].to(dtype), patch(name, tensor)), name
    assert patch.unused() == []


@pytest.mark.parametrize("dialect", ["safetensors", "comfy", "diffusers"])
def test_a_lora_of_diffusers_merges_into_every_layout(tmp_path: Path, dialect: str) -> None:
    path, expected = made_there(tmp_path, "i2v", IN_DIFFUSERS["all"], alpha=3)

    merge_into_file(
        write_dit(tmp_path, tiny_state("i2v"), dialect), [LoraUse(read_lora(path))], tmp_path / "out.safetensors", CPU, 32
    )

    assert_near(load_dit(tmp_path / "out.safetensors", Placement(CPU))(**tiny_inputs("i2v")), expected)


def test_two_loras_of_two_layouts_are_summed_before_rounding(tmp_path: Path) -> None:
    saved(tmp_path / "ours.safetensors")
    theirs, _ = made_there(tmp_path, "t2v", IN_DIFFUSERS["all"])
    uses = [LoraUse(read_lora(tmp_path / "ours.safetensors"), 0.7), LoraUse(read_lora(theirs), -0.3)]
    name = "single_blocks.2.linear1.weight"
    weight = tiny_state()[name]

    found = LoraPatch(uses)(name, weight.to(torch.bfloat16))

    deltas = sum(LoraPatch([use])(name, torch.zeros_like(weight)) for use in uses)
    expected = (weight.to(torch.bfloat16).float() + deltas).to(torch.bfloat16)
    assert (found == expected).float().mean() > 0.999  # but for sums that lie between two bfloat16 numbers
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-6)


# Names


def test_every_matrix_of_the_published_model_is_named() -> None:
    for name in tensor_list("hunyuanvideo-t2v-dit"):
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and not path.endswith((".norm1", ".norm2")):
            assert module_path(underscored(path), HUNYUAN_VIDEO) == path


def test_names_of_comfyui_are_brought_into_ours() -> None:
    for name in tensor_list("hunyuanvideo-t2v-dit"):
        (theirs,) = comfy_state({name: torch.empty(0)})
        if theirs.endswith(".weight"):
            assert alias(underscored(theirs.removesuffix(".weight")), HUNYUAN_VIDEO) == underscored(name.removesuffix(".weight"))


def test_every_module_of_the_diffusers_layout_finds_what_it_is_part_of() -> None:
    for name in tensor_list("hunyuanvideo-t2v-dit"):
        path = underscored(name.removesuffix(".weight"))
        if not name.endswith(".weight") or path.endswith(("_norm1", "_norm2")):
            continue
        parts = [underscored(part.removesuffix(".weight")) for part in diffusers_parts(name)]
        assert [relative.name for relative in relatives(path)] == parts
        for part in parts:
            assert [relative.name for relative in relatives(part)] == [path]


def test_names_that_two_families_have_go_to_the_one_that_is_named() -> None:
    names = ["transformer_blocks_0_attn_to_q", "single_transformer_blocks_3_proj_mlp"]

    assert choose_family(names, "hunyuan_video") is HUNYUAN_VIDEO
    assert choose_family(names, "framepack") is not HUNYUAN_VIDEO
    assert choose_family(names) is not HUNYUAN_VIDEO


def test_a_framepack_lora_keeps_its_names(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(2, 4),
        "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "fp.safetensors", metadata={"ss_base_model_version": "framepack"})

    convert_file(tmp_path / "fp.safetensors", tmp_path / "other.safetensors", "other")

    assert "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight" in load_file(tmp_path / "other.safetensors")


def test_the_tiny_model_is_loaded_as_others_are(tmp_path: Path) -> None:
    """The tests above build it directly; a LoRA acts the same on one that comes from a file."""
    saved(tmp_path / "lora.safetensors", "i2v")
    patch = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors"))])

    dit = load_dit(write_dit(tmp_path, tiny_state("i2v"), "diffusers"), Placement(CPU, patch=patch))

    assert isinstance(dit, HunyuanVideoModel)
    assert_near(dit(**tiny_inputs("i2v")), run_here("i2v", tmp_path / "lora.safetensors"))
