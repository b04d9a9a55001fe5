"""LoRA on HunyuanVideo: fidelity, files of other tools, conversion both ways, parts put together."""

import itertools
import logging
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders import HunyuanVideoLoraLoaderMixin, lora_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hunyuan_model.checkpoints import load_dit
from hunyuan_model.names import HUNYUAN_VIDEO
from modules.errors import CheckpointError
from networks import convert_z_image_lora_to_comfy
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.fused_loras import join_parts
from networks.loading import WeightedLora, read_lora
from networks.merging import merge_into_file
from networks.module_names import module_path, related_modules
from protocols.loading import Placement
from tests.golden_cases import read_case
from tests.hunyuan_model.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.manifests import tensor_list
from tests.networks import making
from tests.tiny.hunyuan_dit import CONFIGS, comfy_state, diffusers_parts, tiny_state, write_dit
from tests.tiny.loras import make_lora, unused

CPU = torch.device("cpu")


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("hv_lora")
    settings = description["lora"]
    dit, inputs, _ = golden_model("hv_dit_guidance")
    network = make_lora("lora_hunyuan", settings["rank"], settings["alpha"], dit)
    found = [
        [name, layer.lora_down.in_features, layer.lora_up.out_features]
        for name, layer in network.named_children()
    ]
    assert found == settings["modules_name_in_out"]
    making.golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.attach()
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
    making.assert_near(out.detach(), tensors["out"])
    making.assert_recorded(making.own_gradients(network), dit, loss, description, tensors)


@pytest.mark.parametrize(
    ("start", "state"),
    [("diffusion_model.", comfy_state), ("transformer.", dict), ("base_model.model.", dict)],
    ids=["ComfyUI", "official", "PEFT"],
)
def test_files_of_diffusion_pipe_and_comfyui_act_as_ours(
    tmp_path: Path, start: str, state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    network = making.saved(tmp_path / "ours.safetensors", alpha=4)
    theirs = {}  # as diffusion-pipe, PEFT and ComfyUI name them
    for name, layer in network.named_children():
        path = module_path(name.removeprefix("lora_unet_"), HUNYUAN_VIDEO)
        (renamed,) = state({f"{path}.weight": layer.lora_up.weight})
        theirs[f"{start}{renamed.removesuffix('weight')}lora_A.weight"] = layer.lora_down.weight.detach()
        theirs[f"{start}{renamed.removesuffix('weight')}lora_B.weight"] = layer.lora_up.weight.detach()
    save_file(theirs, tmp_path / "theirs.safetensors")

    out = making.run_here("t2v", tmp_path / "theirs.safetensors")

    assert torch.equal(out, making.run_here("t2v", tmp_path / "ours.safetensors"))


@pytest.mark.parametrize("dialect", ["pt_wrapped", "comfy", "comfy_all_in_one", "diffusers_sharded"])
def test_every_layout_of_a_model_is_merged_to_the_same(tmp_path: Path, dialect: str) -> None:
    making.saved(tmp_path / "ours.safetensors")
    uses = [WeightedLora(read_lora(tmp_path / "ours.safetensors"), 0.5)]
    state = tiny_state(dtype=torch.bfloat16)

    merge_into_file(write_dit(tmp_path, state, dialect), uses, tmp_path / "merged.safetensors", CPU)

    patch = LoraPatch(uses)
    merged = load_dit(tmp_path / "merged.safetensors", Placement(CPU)).state_dict()
    for name, tensor in state.items():
        assert torch.equal(merged[name].bfloat16(), patch(name, tensor)), name
    assert unused(patch) == []


def test_every_module_of_the_diffusers_layout_finds_what_it_is_part_of() -> None:
    for name in tensor_list("hunyuanvideo-t2v-dit"):
        path = name.removesuffix(".weight").replace(".", "_")
        if not name.endswith(".weight") or path.endswith(("_norm1", "_norm2")):
            continue
        parts = [part.removesuffix(".weight").replace(".", "_") for part in diffusers_parts(name)]
        assert [relative.name for relative in related_modules(path, HUNYUAN_VIDEO)][: len(parts)] == parts
        for part in parts:
            assert [relative.name for relative in related_modules(part, HUNYUAN_VIDEO)] == [path]


PUBLISHED_WIDTH = 3072


@pytest.fixture
def tiny_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter has the width of the published model written into it; here with that of the tiny
    one.
    """

    def narrowed(code: types.CodeType) -> types.CodeType:
        width = CONFIGS["t2v"].dim
        constants = (
            narrowed(c) if isinstance(c, types.CodeType) else width if c == PUBLISHED_WIDTH else c
            for c in code.co_consts
        )
        return code.replace(co_consts=tuple(constants))

    function = lora_pipeline._convert_hunyuan_video_lora_to_diffusers
    tiny = types.FunctionType(narrowed(function.__code__), function.__globals__)
    monkeypatch.setattr(lora_pipeline, function.__name__, tiny)


def load_there(theirs: HunyuanVideoTransformer3DModel, path: Path) -> None:
    theirs.load_lora_adapter(HunyuanVideoLoraLoaderMixin.lora_state_dict(str(path)), prefix="transformer")


@pytest.mark.usefixtures("tiny_converter")
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("t2v", {}), ("i2v", {"exclude_patterns": r"[r'.*mlp.*', r'single_blocks\.1\..*']"})],
)
def test_a_lora_made_here_acts_in_diffusers_as_here(
    tmp_path: Path, kind: str, arguments: dict[str, str]
) -> None:
    making.saved(tmp_path / "lora.safetensors", kind, **arguments)
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    theirs = in_diffusers(kind)
    plain = run_there(theirs, tiny_inputs(kind))

    load_there(theirs, tmp_path / "other.safetensors")

    expected = run_there(theirs, tiny_inputs(kind))
    making.assert_near(making.run_here(kind, tmp_path / "lora.safetensors"), expected)
    assert float((expected - plain).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("targets", "with_settings"), [("attention", False), ("some", True), ("all", True), ("last", False)]
)
def test_a_lora_that_diffusers_saves_acts_here_as_there(
    tmp_path: Path, targets: str, with_settings: bool
) -> None:
    alpha = 3 if with_settings else 4  # without settings in the file alpha is the rank
    theirs, modules = in_diffusers("i2v"), making.IN_DIFFUSERS[targets]
    path = making.saved_by_diffusers(theirs, tmp_path / "theirs.safetensors", modules, alpha, with_settings)
    expected = run_there(theirs, tiny_inputs("i2v"))

    out = making.run_here("i2v", path)

    making.assert_near(out, expected)
    assert float((out - tiny_model("i2v")(**tiny_inputs("i2v"))).abs().max()) > 1e-3


@pytest.mark.usefixtures("tiny_converter")
def test_there_and_back_through_diffusers_is_the_same_lora(tmp_path: Path) -> None:
    network = making.saved(tmp_path / "lora.safetensors", alpha=4)
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    cut = HunyuanVideoLoraLoaderMixin.lora_state_dict(str(tmp_path / "other.safetensors"))
    save_file({name: tensor.clone() for name, tensor in cut.items()}, tmp_path / "cut.safetensors")

    convert_file(tmp_path / "cut.safetensors", tmp_path / "back.safetensors", "default", "hunyuan_video")

    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name].float(), tensor) for name, tensor in network.state_dict().items())


def test_a_part_that_no_file_has_is_as_high_as_in_the_published_models(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors = {}
    for block, character in itertools.product("01", "qkv"):
        name = f"lora_unet_single_transformer_blocks_{block}_attn_to_{character}"
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, 8)
        tensors[f"{name}.lora_up.weight"] = torch.ones(8, 2)

    with caplog.at_level(logging.INFO):
        fused = join_parts(tensors)

    assert fused["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape == (7 * 8, 2)
    assert not fused["lora_unet_single_blocks_1_linear1.lora_up.weight"][24:].any()
    assert caplog.text.count("4 times as many rows") == 1


@pytest.mark.parametrize("large", [False, True])
def test_a_lokr_for_a_part_and_one_for_the_whole_change_the_right_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("networks.apply._BLOCK_ELEMENTS", 1000)
    generator = torch.Generator().manual_seed(0)
    expected, loras = torch.zeros(384, 128), []
    for module, height in (("double_blocks_0_img_attn_qkv", 24), ("transformer_blocks_0_attn_to_v", 8)):
        first, second = (torch.randn(size, generator=generator) for size in ((16, 16), (height, 8)))
        expected[384 - 16 * height :] += torch.kron(first, second)
        path = tmp_path / f"{height}.safetensors"
        save_file({f"lora_unet_{module}.lokr_w1": first, f"lora_unet_{module}.lokr_w2": second}, path)
        loras.append(WeightedLora(read_lora(path)))
    patch = LoraPatch(loras)

    fused = patch("double_blocks.0.img_attn_qkv.weight", torch.zeros(384, 128))
    cut = [
        patch(f"transformer_blocks.0.attn.to_{character}.weight", torch.zeros(128, 128))
        for character in "qkv"
    ]

    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(torch.cat(cut), expected)


Q, V = "transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_v"
FULL = "double_blocks_0_img_attn_qkv"
TALL = r"{weight}.*{module} has 24 rows, .* 24, al"


@pytest.mark.parametrize(
    ("module", "weight", "rows", "message"),
    [
        (FULL, "transformer_blocks.0.attn.to_k", 24, TALL),
        (Q, "double_blocks.0.img_attn_qkv", 24, TALL),
        (V, "double_blocks.0.img_attn_qkv", 16, r"{weight}.weight it has \[16, 8\], the model \[24, 8\]"),
    ],
)
def test_a_whole_and_a_part_of_other_heights_are_refused(
    tmp_path: Path, module: str, weight: str, rows: int, message: str
) -> None:
    factors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(rows, 2)}
    tensors = {f"lora_unet_{module}.{part}": tensor for part, tensor in factors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "hunyuan_video"})
    patch = LoraPatch([WeightedLora(read_lora(tmp_path / "x.safetensors"))])

    with pytest.raises(CheckpointError, match=message.format(weight=weight, module=module)):
        patch(f"{weight}.weight", torch.zeros(24, 8))


@pytest.mark.parametrize(
    ("family", "part", "targets"),
    [
        ("flux_2", "transformer_blocks.0.attn.to_k", ("default", "diffusers")),
        ("z_image", "layers.0.attention.to_k", ("joined", "default", "diffusers")),
    ],
)
def test_parts_that_a_file_never_had_do_not_come_out_of_the_whole(
    tmp_path: Path, family: str, part: str, targets: tuple[str, ...]
) -> None:
    factors = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
    tensors = {f"transformer.{part}.{factor}": tensor for factor, tensor in factors.items()}
    source = tmp_path / "x.safetensors"
    save_file(tensors, source, {"ss_base_model_version": family})

    for target in targets:
        if target == "joined":
            convert_z_image_lora_to_comfy.main([str(source), str(tmp_path / "joined.safetensors")])
        else:
            convert_file(source, tmp_path / f"{target}.safetensors", target)
        source = tmp_path / f"{target}.safetensors"

    full = load_file(tmp_path / f"{targets[0]}.safetensors")
    assert any(tensor.shape == (24, 2) for tensor in full.values())
    back = load_file(source)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
