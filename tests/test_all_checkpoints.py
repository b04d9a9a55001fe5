"""Files of the transformers of all families: every layout, full size, 8 bits, and what is refused.

What only the files of one family have is tested in its folder.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ernie_image.files
import fibo_2.files
import flux.files
import flux_2.files
import flux_3.files
import frame_pack.files
import hidream_o1.files
import hunyuan_image.files
import hunyuan_model.checkpoints
import hunyuan_video_15.files
import ideogram4.files
import kandinsky.files
import krea2.files
import lumina.files
import moss_image.files
import qwen_image.files
import qwen_image_21.files
import tests.tiny.ernie_image as tiny_ernie_image
import tests.tiny.fibo_2 as tiny_fibo_2
import tests.tiny.flux as tiny_flux
import tests.tiny.flux_2 as tiny_flux_2
import tests.tiny.flux_3 as tiny_flux_3
import tests.tiny.hidream_o1 as tiny_hidream_o1
import tests.tiny.hunyuan_image as tiny_hunyuan_image
import tests.tiny.hunyuan_video_15 as tiny_hunyuan_video_15
import tests.tiny.ideogram4 as tiny_ideogram4
import tests.tiny.kandinsky as tiny_kandinsky
import tests.tiny.kandinsky_6 as tiny_kandinsky_6
import tests.tiny.krea2 as tiny_krea2
import tests.tiny.lumina as tiny_lumina
import tests.tiny.moss_image as tiny_moss_image
import tests.tiny.qwen_image as tiny_qwen_image
import tests.tiny.qwen_image_21 as tiny_qwen_image_21
import tests.tiny.z_image as tiny_z_image
import wan.checkpoints
import z_image.files
from checkpoints.model_files import read_once
from flux_2.model import Flux2Model
from kandinsky.configs import KandinskyStream
from krea2.configs import Krea2StreamConfig
from modules.errors import CheckpointError
from modules.speed_options import Quantization
from protocols import families
from protocols.loading import Placement
from runtime.offload.swap_plan import max_blocks
from tests.manifests import manifest_names, tensor_list, write_hollow
from tests.tiny import framepack_dit, hunyuan_dit, wan_dit
from tests.tiny.dits import DITS

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))
SHARED = ("safetensors", "sharded", "prefixed", "diffusers_sharded")
NAMED_THERE = (*SHARED, "diffusers")  # where diffusers has other names
State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """How files of one kind of transformer are read and written here."""

    name: str
    checkpoints: ModuleType
    tiny: ModuleType
    said: str  # of such a file
    layouts: tuple[str, ...] = SHARED
    variant: str = ""  # of several in a family
    joins: bool = False  # queries, keys and values, as ComfyUI's files do

    @property
    def config(self) -> Any:
        return self.tiny.CONFIGS[self.variant] if self.variant else self.tiny.CONFIG

    def state(self, **settings: Any) -> State:
        found: State = self.tiny.tiny_state(*filter(None, [self.variant]), **settings)
        return found

    def write(self, folder: Path, state: State, layout: str = "safetensors") -> Path:
        path: Path = self.tiny.write_dit(
            folder, self.tiny.comfy_state(state) if self.joins else state, layout
        )
        return path


def dit(what: str, option: str = "--dit") -> str:
    return f"it is {what} transformer ({option})"


GIVEN, ALIKE = "--pretrained_model_name_or_path", "(their files have the same tensors)"
Z_IMAGE = (z_image.files, tiny_z_image, dit("a Z-Image"))
KINDS = {
    kind.name: kind
    for kind in (
        *(
            Kind(f"wan {name}", wan.checkpoints, wan_dit, dit("a Wan") + what, wan_dit.DIALECTS, name)
            for name, what in (
                ("t2v", f" for --task t2v-14B or t2v-1.3B or t2v-A14B {ALIKE}"),
                ("flf2v", " for --task flf2v-14B"),
            )
        ),
        *(
            Kind(
                f"hunyuan {name}",
                hunyuan_model.checkpoints,
                hunyuan_dit,
                dit(what),
                hunyuan_dit.DIALECTS,
                name,
            )
            for name, what in (("t2v", "a HunyuanVideo or SkyReels V1 T2V"), ("i2v", "the SkyReels V1 I2V"))
        ),
        Kind("framepack", frame_pack.files, framepack_dit, dit("a FramePack"), framepack_dit.DIALECTS),
        *(
            Kind(f"flux {name}", flux.files, tiny_flux, dit(what, f"--dit ({GIVEN})"), NAMED_THERE, name)
            for name, what in (
                ("dev", "a FLUX.1 dev"),
                ("schnell", "a FLUX.1 schnell"),
                ("chroma", "a Chroma"),
            )
        ),
        *(
            Kind(f"flux_2 {name}", flux_2.files, tiny_flux_2, dit(f"a FLUX.2 {name}"), NAMED_THERE, name)
            for name in ("klein", "dev")
        ),
        Kind("flux_3", flux_3.files, tiny_flux_3, dit("the base FLUX 3 Klein"), NAMED_THERE),
        Kind("lumina", lumina.files, tiny_lumina, dit("a Lumina-Image-2.0", GIVEN), NAMED_THERE),
        Kind("qwen_image", qwen_image.files, tiny_qwen_image, dit("a Qwen-Image")),
        Kind("krea2", krea2.files, tiny_krea2, dit("a Krea 2"), NAMED_THERE),
        Kind(
            *("qwen_image_21", qwen_image_21.files, tiny_qwen_image_21, dit("a Qwen-Image-2.1")),
            (*SHARED, "comfyui"),
        ),
        Kind(
            *("moss_image", moss_image.files, tiny_moss_image, dit("a MOSS-Image")),
            (*SHARED, "comfyui"),
        ),
        Kind("fibo_2", fibo_2.files, tiny_fibo_2, dit("a Fibo 2.0"), (*SHARED, "comfyui", "early")),
        Kind("ernie_image", ernie_image.files, tiny_ernie_image, dit("an ERNIE-Image")),
        Kind(
            *("hidream_o1", hidream_o1.files, tiny_hidream_o1, "it is a HiDream-O1-Image network (--dit)"),
            (*SHARED, "released", "released_sharded"),
        ),
        Kind("ideogram4", ideogram4.files, tiny_ideogram4, dit("an Ideogram 4")),
        *(
            Kind(f"kandinsky {name}", kandinsky.files, tiny_kandinsky, dit("a Kandinsky 5"), SHARED, name)
            for name in ("video", "image")
        ),
        Kind("kandinsky_6", kandinsky.files, tiny_kandinsky_6, dit("a Kandinsky 6"), NAMED_THERE),
        Kind(
            *("hunyuan_video_15", hunyuan_video_15.files, tiny_hunyuan_video_15),
            dit("a HunyuanVideo 1.5"),
            tiny_hunyuan_video_15.DIALECTS,
        ),
        Kind("z_image", *Z_IMAGE),
        Kind("z_image comfy", *Z_IMAGE, joins=True),
        Kind(
            *("hunyuan_image", hunyuan_image.files, tiny_hunyuan_image, dit("a HunyuanImage-2.1")),
            tiny_hunyuan_image.DIALECTS,
        ),
    )
}


@pytest.mark.slow_cases(
    "flux schnell-diffusers",
    "flux schnell-diffusers_sharded",
    "flux schnell-prefixed",
    "flux schnell-safetensors",
    "flux schnell-sharded",
    "hunyuan i2v-comfy",
    "hunyuan i2v-comfy_all_in_one",
    "hunyuan i2v-diffusers",
    "hunyuan i2v-diffusers_sharded",
    "hunyuan i2v-prefixed",
    "hunyuan i2v-pt",
    "hunyuan i2v-pt_wrapped",
    "hunyuan i2v-safetensors",
    "hunyuan i2v-sharded",
    "wan flf2v-all_in_one",
    "wan flf2v-compiled",
    "wan flf2v-diffusers",
    "wan flf2v-diffusers_sharded",
    "wan flf2v-prefixed",
    "wan flf2v-pth",
    "wan flf2v-pth_wrapped",
    "wan flf2v-safetensors",
    "wan flf2v-sharded",
)
@pytest.mark.parametrize(
    ("name", "layout"), [(kind.name, layout) for kind in KINDS.values() for layout in kind.layouts]
)
def test_every_layout_gives_the_same_weights_and_dimensions(tmp_path: Path, name: str, layout: str) -> None:
    kind = KINDS[name]
    state = kind.state()
    path = kind.write(tmp_path, state, layout)

    loaded = kind.checkpoints.load_dit(path, CPU).state_dict()

    assert read_once(path, kind.checkpoints.read_dit_header).config == kind.config
    torch.testing.assert_close(dict(loaded), state, rtol=0, atol=0)
    said, _, scripts = str(families.identify(path)).partition(". Its scripts are ")
    assert said == kind.said
    assert "_train" in scripts
    assert "_generate_" in scripts
    assert "--family" in scripts


FP8_FILES = {
    "wan t2v": wan_dit.FP8_DIALECTS,
    "hunyuan i2v": hunyuan_dit.FP8_DIALECTS,
    "framepack": framepack_dit.FP8_DIALECTS,
    **dict.fromkeys(("flux_2 dev", "qwen_image", "krea2", "z_image", "z_image comfy"), wan_dit.FP8_DIALECTS),
    **dict.fromkeys(
        (
            "qwen_image_21",
            "moss_image",
            "fibo_2",
            "ernie_image",
            "ideogram4",
            "hidream_o1",
            "kandinsky video",
            "hunyuan_video_15",
        ),
        wan_dit.FP8_DIALECTS,
    ),
}


@pytest.mark.slow_cases(
    "framepack-fp8",
    "framepack-fp8_row_scale",
    "framepack-fp8_weight_scale",
    "hunyuan i2v-diffusers_fp8_scaled",
    "hunyuan i2v-fp8_row_scale",
    "hunyuan i2v-fp8_scaled",
    "hunyuan i2v-fp8_weight_scale",
    "z_image-fp8",
    "z_image-fp8_row_scale",
    "z_image-fp8_scaled",
    "z_image-fp8_weight_scale",
)
@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, layouts in FP8_FILES.items() for layout in layouts]
)
def test_files_in_8_bits_compute_in_bfloat16_with_their_scales_applied(
    tmp_path: Path, name: str, layout: str
) -> None:
    kind = KINDS[name]
    state = kind.state()

    loaded = kind.checkpoints.load_dit(kind.write(tmp_path, state, layout), CPU)

    assert loaded.compute_dtype == torch.bfloat16
    for key, tensor in state.items():
        found = loaded.state_dict()[key]
        assert found.dtype.itemsize > 1
        # float8_e4m3fn has three digits of mantissa
        torch.testing.assert_close(found.float(), tensor, rtol=0.07, atol=0.01, msg=key)


def packed(state: State, form: str, marks: bool) -> State:
    """The weights of layers as files in 4 and 8 bits have them."""
    found = dict(state)
    for name, weight in state.items():
        if not name.endswith(".weight") or weight.ndim != 2 or weight.shape[1] % 16:
            continue
        (rows, columns), layer = weight.shape, name.removesuffix(".weight")
        scales = torch.ones(rows, columns // 16)
        if form == "nvfp4":
            found[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            found[f"{layer}.weight_scale"] = scales.to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale_2"] = torch.tensor(1.0)
        elif form == "mxfp8":
            found[name] = weight.to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale"] = scales.to(torch.uint8)
        elif form in ("int8", "int3"):
            found[name] = weight.to(torch.int8)
            found[f"{layer}.weight_scale"] = torch.ones(rows, 1)
        else:
            del found[name]
            found[f"{layer}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        if marks:
            found[f"{layer}.comfy_quant"] = torch.tensor([*f'{{"format": "{form}"}}'.encode()]).byte()
    return found


@pytest.mark.slow_cases(
    "flux chroma-GPTQ-False",
    "flux chroma-int3-True",
    "flux chroma-int8-False",
    "flux chroma-mxfp8-False",
    "flux chroma-nvfp4-False",
    "flux schnell-GPTQ-False",
    "flux schnell-int3-True",
    "flux schnell-int8-False",
    "flux schnell-mxfp8-False",
    "flux schnell-nvfp4-False",
    "flux_2 dev-GPTQ-False",
    "flux_2 dev-int3-True",
    "flux_2 dev-int8-False",
    "flux_2 dev-mxfp8-False",
    "flux_2 dev-nvfp4-False",
    "framepack-GPTQ-False",
    "framepack-int3-True",
    "framepack-int8-False",
    "framepack-mxfp8-False",
    "framepack-nvfp4-False",
    "hunyuan i2v-GPTQ-False",
    "hunyuan i2v-int3-True",
    "hunyuan i2v-int8-False",
    "hunyuan i2v-mxfp8-False",
    "hunyuan i2v-nvfp4-False",
    "hunyuan t2v-GPTQ-False",
    "hunyuan t2v-int3-True",
    "hunyuan t2v-int8-False",
    "hunyuan t2v-mxfp8-False",
    "hunyuan t2v-nvfp4-False",
    "hunyuan_image-GPTQ-False",
    "hunyuan_image-int3-True",
    "hunyuan_image-int8-False",
    "hunyuan_image-mxfp8-False",
    "hunyuan_image-nvfp4-False",
    "wan flf2v-GPTQ-False",
    "wan flf2v-int3-True",
    "wan flf2v-int8-False",
    "wan flf2v-mxfp8-False",
    "wan flf2v-nvfp4-False",
    "z_image comfy-GPTQ-False",
    "z_image comfy-int3-True",
    "z_image comfy-int8-False",
    "z_image comfy-mxfp8-False",
    "z_image comfy-nvfp4-False",
)
@pytest.mark.parametrize(
    ("form", "marks"), [*((form, False) for form in ("nvfp4", "mxfp8", "int8", "GPTQ")), ("int3", True)]
)
@pytest.mark.parametrize("name", KINDS)
def test_quantised_files_are_called_so_before_any_size_is_judged(
    tmp_path: Path, name: str, form: str, marks: bool
) -> None:
    kind = KINDS[name]
    state = packed(load_file(kind.write(tmp_path, kind.state())), form, marks)
    save_file(state, tmp_path / "packed.safetensors")

    message = (
        "has the unknown format 'int3'; known formats are .*nvfp4" if marks else rf"not supported \({form}"
    )
    with pytest.raises(CheckpointError, match=message):
        read_once(tmp_path / "packed.safetensors", kind.checkpoints.read_dit_header)


@dataclass(frozen=True)
class Layers:
    """Of a transformer, by name."""

    linear: str  # a layer of a block that files in 8 bits hold so
    norm: str  # of a block
    always_float32: tuple[str, ...]  # layers that compute so whatever the others do
    layout: str  # as far from the published names and files as there is


LAYERS = {
    "wan t2v": Layers("blocks.1.ffn.0", "blocks.0.norm3", ("time_projection.1", "head.head"), "diffusers"),
    "hunyuan t2v": Layers(
        *("double_blocks.1.txt_mlp.fc1", "single_blocks.0.q_norm", ("time_in.mlp.2",), "diffusers")
    ),
    "framepack": Layers(
        *("single_transformer_blocks.1.proj_mlp", "transformer_blocks.0.attn.norm_q"),
        (
            *("time_text_embed.guidance_embedder.linear_2", "proj_out"),
            "context_embedder.time_text_embed.text_embedder.linear_1",
        ),
        "folder",
    ),
}
of_each = pytest.mark.parametrize("name", LAYERS)


@of_each
def test_row_scales_are_exact_where_the_stored_numbers_are(tmp_path: Path, name: str) -> None:
    kind, linear = KINDS[name], LAYERS[name].linear
    path = kind.write(tmp_path, kind.state(), "fp8_row_scale")
    stored = load_file(path)

    loaded = kind.checkpoints.load_dit(path, replace(CPU, compute_dtype=torch.float32))

    expected = stored[f"{linear}.weight"].float() * stored[f"{linear}.scale_weight"]
    assert torch.equal(loaded.get_parameter(f"{linear}.weight"), expected)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.float32, None), (torch.float16, None), (torch.float32, torch.bfloat16)],
    ids=["float32", "float16", "asked for"],
)
@of_each
def test_weights_take_the_file_dtype_or_the_one_asked_for(
    tmp_path: Path, name: str, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    kind, layers = KINDS[name], LAYERS[name]
    path = kind.write(tmp_path, {key: tensor.to(stored) for key, tensor in kind.state().items()})

    loaded = kind.checkpoints.load_dit(path, replace(CPU, compute_dtype=asked))

    assert loaded.compute_dtype == (asked or stored)
    found = {key: loaded.get_parameter(f"{key}.weight").dtype for key in layers.always_float32}
    assert set(found.values()) == {torch.float32}
    assert {loaded.get_parameter(f"{key}.weight").dtype for key in (layers.norm, layers.linear)} == {
        asked or stored
    }
    (tiny,) = (each for each in DITS if each.name == name)
    assert loaded(**tiny.inputs((1, 4, 6, 9), 1)).isfinite().all()


@of_each
def test_missing_unexpected_and_misshaped_tensors_are_all_listed(tmp_path: Path, name: str) -> None:
    kind, layers = KINDS[name], LAYERS[name]
    state, (before, _, rest) = kind.state(), layers.linear.partition(".1.")
    for block in (0, 1):
        del state[f"{before}.{block}.{rest}.bias"]
    state[f"{before}.0.extra.weight"] = torch.zeros(2)
    needed, other = len(state[f"{layers.norm}.weight"]), layers.norm.replace(".0.", ".1.")
    state[f"{other}.weight"] = torch.zeros(7)

    with pytest.raises(CheckpointError) as caught:
        kind.checkpoints.load_dit(kind.write(tmp_path, state), CPU)

    lines = str(caught.value).splitlines()
    assert f"  missing: {before}.{{0..1}}.{rest}.bias" in lines
    assert f"  unexpected: {before}.0.extra.weight" in lines
    assert f"  {other}.weight: the file has 7, {needed} is needed" in lines


@of_each
def test_a_patch_sees_published_names_and_unrounded_whole_weights(tmp_path: Path, name: str) -> None:
    kind, layers = KINDS[name], LAYERS[name]
    state, seen, changed = kind.state(), {}, f"{layers.linear}.weight"

    def patch(key: str, weight: Tensor, _: torch.dtype) -> Tensor:
        seen[key] = weight.clone()
        return weight + 1 if key == changed else weight

    path = kind.write(tmp_path, state, layers.layout)
    loaded = kind.checkpoints.load_dit(path, replace(CPU, compute_dtype=torch.bfloat16, patch=patch))

    torch.testing.assert_close(seen, state, rtol=0, atol=0)
    assert torch.equal(loaded.get_parameter(changed), (state[changed] + 1).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "blocks", "kept"),
    [
        ("flux_2 klein", ("double_blocks.", "single_blocks."), {"img_attn.qkv.weight", "linear1.weight"}),
        (
            *("qwen_image", ("transformer_blocks.",)),
            {"attn.to_q.weight", "img_mlp.net.0.proj.weight", "attn.to_add_out.weight"},
        ),
        (
            *("flux_3", ("content_mode_blocks.", "txt_mode_blocks.", "single_blocks.")),
            {"q_proj.weight", "mlp_in.weight", "attn_out.weight"},
        ),
        ("moss_image", ("layers.",), {"proj.q.weight", "proj.ffn_up_gate.weight", "proj.ffn_down.weight"}),
        (
            *("fibo_2", ("layers.",)),
            {"attention.to_q.weight", "cross_attention.to_k.weight", "feed_forward.w2.weight"},
        ),
        (
            *("ernie_image", ("layers.",)),
            {"self_attention.to_q.weight", "mlp.gate_proj.weight", "mlp.linear_fc2.weight"},
        ),
        (
            *("hidream_o1", ("language_model.layers.",)),
            {"0.self_attn.q_proj.weight", "0.self_attn.o_proj.weight", "1.mlp.down_proj.weight"},
        ),
        (
            *("ideogram4", ("layers.",)),
            {"attention.qkv.weight", "attention.o.weight", "feed_forward.w2.weight"},
        ),
        (
            *("kandinsky video", ("text_transformer_blocks.", "visual_transformer_blocks.")),
            {
                "self_attention.to_query.weight",
                "self_attention.out_layer.weight",
                "feed_forward.in_layer.weight",
            },
        ),
        ("krea2", ("blocks.",), {"attn.wq.weight", "attn.gate.weight", "mlp.down.weight"}),
        (
            *("z_image", ("layers.",)),
            {"attention.to_q.weight", "attention.to_out.0.weight", "feed_forward.w2.weight"},
        ),
    ],
)
def test_blocks_without_their_modulation_are_kept_in_8_bits(
    tmp_path: Path, name: str, blocks: tuple[str, ...], kept: set[str]
) -> None:
    kind, place = KINDS[name], Placement(torch.device("cpu"), quantization=Quantization("rows"))

    loaded = kind.checkpoints.load_dit(kind.write(tmp_path, kind.state(dtype=torch.bfloat16)), place)

    in_8_bits = {key for key, weight in loaded.state_dict().items() if weight.dtype.itemsize == 1}
    assert kept <= {key.split(".", 2)[2] for key in in_8_bits}
    assert all(key.startswith(blocks) for key in in_8_bits)
    assert not any("_mod." in key or "modulation" in key for key in in_8_bits)
    if name == "flux_2 klein":
        names = ("time_in.in_layer.weight", "time_in.out_layer.weight")
        assert {loaded.get_parameter(key).dtype for key in names} == {torch.float32}


VIDEO = {"dim": 3072, "num_heads": 24, "double_blocks": 20, "single_blocks": 40, "text_dim": 4096}
FLUX = {
    **{"dim": 3072, "num_heads": 24, "double_blocks": 19, "single_blocks": 38, "ffn_dim": 12288},
    **{"text_dim": 4096, "channels": 16, "modulations": 344},
}
FLUX_2 = {
    "klein-4b": {"dim": 3072, "double_blocks": 5, "single_blocks": 20, "text_dim": 7680},
    "klein-9b": {"dim": 4096, "double_blocks": 8, "single_blocks": 24, "text_dim": 12288},
    "dev": {"dim": 6144, "double_blocks": 8, "single_blocks": 48, "text_dim": 15360},
}
MOSS = {
    **{"dim": 3072, "ffn_dim": 8192, "num_heads": 24, "num_layers": 42, "refiner_blocks": 2},
    **{"channels": 128, "text_dim": 4096, "freq_dim": 256},
}
FIBO = {
    **{"dim": 3584, "ffn_dim": 9536, "num_heads": 28, "num_layers": 44, "noise_refiner_layers": 2},
    **{"in_dim": 128, "text_dim": 7680, "max_gist": 512, "injections": (6, 14, 22, 30, 38)},
    "rotary_widths": (32, 48, 48),
}
ERNIE = {
    **{"dim": 4096, "ffn_dim": 12288, "num_heads": 32, "num_layers": 36, "channels": 128},
    **{"text_dim": 3072, "rotary_widths": (32, 48, 48)},
}
HIDREAM = {
    **{"dim": 4096, "ffn_dim": 12288, "num_heads": 32, "num_kv_heads": 8, "num_layers": 36},
    **{"head_width": 128, "vocabulary": 151936, "bottleneck": 1024, "patch_size": 32, "row_frequencies": 20},
}
IDEOGRAM = {
    **{"dim": 4608, "ffn_dim": 12288, "num_heads": 18, "num_layers": 34, "in_dim": 128},
    **{"text_dim": 53248, "time_dim": 512, "head_width": 256, "section": 20},
}
KANDINSKY = {
    **{"text_layers": 2, "text_dim": 3584, "pooled_dim": 768, "time_dim": 512, "out_channels": 16},
    "head_width": 64,
}
KANDINSKY_LITE = {**KANDINSKY, "dim": 1792, "ffn_dim": 7168, "num_layers": 32, "in_channels": 33}
KANDINSKY_PRO = {
    **{**KANDINSKY_LITE, "dim": 4096, "ffn_dim": 16384, "num_layers": 60, "head_width": 128},
    **{"text_layers": 4, "time_dim": 1024},
}
KANDINSKY_6 = {
    **{"text_layers": 2, "text_dim": 3584, "pooled_dim": 768, "num_layers": 32, "in_channels": 33},
    **{"out_channels": 16, "audio_channels": 40, "num_token_types": 2, "rotary_widths": (16, 24, 24)},
    "video": KandinskyStream(1792, 7168, 64, 512),
    "audio": KandinskyStream(896, 3584, 64, 512),
}
KANDINSKY_6_PRO = {
    **{**KANDINSKY_6, "text_layers": 4, "num_layers": 60, "rotary_widths": (32, 48, 48)},
    "video": KandinskyStream(4096, 16384, 128, 1024),
    "audio": KandinskyStream(2048, 7168, 128, 1024),
}
KANDINSKY_IMAGE = {
    **{**KANDINSKY, "dim": 2560, "ffn_dim": 10240, "num_layers": 50, "in_channels": 16, "head_width": 128},
    "rotary_widths": (32, 48, 48),
}
HUNYUAN_15 = {
    **{"dim": 2048, "ffn_dim": 8192, "num_heads": 16, "num_layers": 54, "refiner_blocks": 2, "in_dim": 65},
    **{"out_dim": 32, "text_dim": 3584, "glyph_dim": 1472, "glyph_hidden": (2048, 2048), "image_dim": 1152},
}
Z = {"num_layers": 30, "dim": 3840, "num_heads": 30, "rotary_widths": (32, 48, 48)}
KREA = {
    **{"dim": 6144, "ffn_dim": 16384, "num_heads": 48, "num_kv_heads": 12, "num_layers": 28, "states": 12},
    **{"rotary_widths": (32, 48, 48), "text": Krea2StreamConfig(2560, 6912, 20, 20)},
}
FLUX_3 = {
    **{"dim": 3072, "ffn_dim": 9216, "num_heads": 24, "mode_blocks": 5, "joint_blocks": 28},
    **{"channels": 128, "text_dim": 20480},
}
# manifest -> name of KINDS, dimensions of the released model
QWEN_21 = {
    **{"dim": 4096, "ffn_dim": 12288, "num_heads": 32, "num_layers": 32, "channels": 64, "text_dim": 4096},
    "axes": (16, 56, 56),
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        manifest: ("hunyuan t2v", {**VIDEO, "pooled_dim": 768, "kind": "i2v" if "i2v" in manifest else "t2v"})
        for manifest in (*manifest_names("hunyuanvideo-t2v-dit"), *manifest_names("skyreels-v1"))
    },
    "framepack-dit": (
        "framepack",
        {**VIDEO, "pooled_dim": 768, "image_dim": 1152, "refiner_blocks": 2, "in_dim": 16, "out_dim": 16},
    ),
    "flux1-dev-dit": ("flux dev", {**FLUX, "kind": "dev"}),
    "flux1-dev-dit-diffusers": ("flux dev", {**FLUX, "kind": "dev"}),
    "chroma1-dit": ("flux chroma", {**FLUX, "kind": "chroma"}),
    **{
        f"flux2-{size}-{layout}": ("flux_2 dev", dimensions)
        for size, dimensions in FLUX_2.items()
        for layout in ("dit", "dit-diffusers")
    },
    **{
        f"flux3-klein{release}-{layout}": ("flux_3", {**FLUX_3, "is_flow_map": not release})
        for release in ("", "-base")
        for layout in ("dit", "dit-diffusers")
    },
    "qwen-image-dit": ("qwen_image", {"num_layers": 60, "dim": 3072, "num_heads": 24}),
    **dict.fromkeys(("krea2-dit", "krea2-dit-diffusers"), ("krea2", KREA)),
    **dict.fromkeys(("qwen-image-2.1-dit", "qwen-image-2.1-dit-diffusers"), ("qwen_image_21", QWEN_21)),
    **dict.fromkeys(("moss-image-dit", "moss-image-dit-comfy"), ("moss_image", MOSS)),
    "fibo-2-dit": ("fibo_2", FIBO),
    "ernie-image-dit": ("ernie_image", ERNIE),
    **dict.fromkeys(("hidream-o1", "hidream-o1-comfy"), ("hidream_o1", HIDREAM)),
    **dict.fromkeys(("ideogram4-dit", "ideogram4-dit-diffusers"), ("ideogram4", IDEOGRAM)),
    "kandinsky5-lite-dit": ("kandinsky video", KANDINSKY_LITE),
    "kandinsky5-pro-dit": ("kandinsky video", KANDINSKY_PRO),
    "kandinsky5-lite-t2i-dit": ("kandinsky image", KANDINSKY_IMAGE),
    **dict.fromkeys(manifest_names("kandinsky6-lite-dit"), ("kandinsky_6", KANDINSKY_6)),
    **dict.fromkeys(manifest_names("kandinsky6-pro-dit"), ("kandinsky_6", KANDINSKY_6_PRO)),
    **dict.fromkeys(manifest_names("hunyuanvideo1.5-dit"), ("hunyuan_video_15", HUNYUAN_15)),
    "z-image-dit": ("z_image", Z),
    "z-image-dit-comfy": ("z_image", Z),
    "hunyuanimage2.1-dit": (
        "hunyuan_image",
        {
            **{"dim": 3584, "num_heads": 28, "double_blocks": 20, "single_blocks": 40},
            **{"in_dim": 64, "text_dim": 3584, "glyph_dim": 1472},
        },
    ),
}


COMPUTED = {"rope.bands"}  # in files, and never read from them
# dtype of a file, if it is another than usual
PUBLISHED_DTYPES = {"hunyuanvideo1.5-dit": torch.float32, "hunyuanvideo1.5-dit-comfy": torch.float16}


@pytest.mark.parametrize("manifest", PUBLISHED)
def test_published_files_of_full_size_load_without_leftovers(tmp_path: Path, manifest: str) -> None:
    name, dimensions = PUBLISHED[manifest]
    tensors = tensor_list(manifest)

    loaded = KINDS[name].checkpoints.load_dit(write_hollow(tmp_path / "dit.safetensors", tensors), META)

    beside = ("lm_head.",) if name == "hidream_o1" else ()  # a head for words
    numbers = sum(
        math.prod(shape)
        for tensor, (_, shape) in tensors.items()
        if tensor not in COMPUTED and not tensor.startswith(beside)
    )
    assert sum(weight.numel() for weight in loaded.parameters()) == numbers
    assert {field: getattr(loaded.config, field) for field in dimensions} == dimensions
    assert loaded.compute_dtype == PUBLISHED_DTYPES.get(manifest, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *(("hunyuan t2v", name) for name in ("img_in.proj", "vector_in.in_layer", "final_layer.linear")),
        *(("flux_2 klein", name) for name in ("txt_in", "single_blocks.0.linear1")),
        *(("flux_3", name) for name in ("txt_in", "single_blocks.0.q_proj", "txt_mode_blocks.1.mlp_in")),
        *(("qwen_image", name) for name in ("txt_in", "transformer_blocks.0.attn.to_q")),
        *(("krea2", name) for name in ("first", "txtfusion.refiner_blocks.0.attn.wq", "blocks.0.attn.gate")),
        *(("qwen_image_21", name) for name in ("img_in", "transformer_blocks.0.img_mlp.gate_layer")),
        *(("moss_image", name) for name in ("video_embedder", "layers.0.proj.k", "text_embedder.proj")),
        *(
            ("fibo_2", name)
            for name in ("x_embedder", "layers.0.attention.to_k", "perceiver.layers.0.ffn.w2")
        ),
        *(
            ("ernie_image", name)
            for name in ("x_embedder.proj", "text_proj", "layers.0.self_attention.to_k", "adaLN_modulation.1")
        ),
        *(
            ("hidream_o1", f"{name}_proj")
            for name in ("language_model.layers.0.self_attn.k", "language_model.layers.1.mlp.up")
        ),
        *(("hidream_o1", name) for name in ("x_embedder.proj2", "t_embedder1.mlp.0", "final_layer2.linear")),
        *(
            ("ideogram4", name)
            for name in ("input_proj", "llm_cond_proj", "layers.0.attention.o", "t_embedding.mlp_in")
        ),
        *(
            ("kandinsky video", name)
            for name in ("visual_embeddings.in_layer", "pooled_text_embeddings.norm", "out_layer.out_layer")
        ),
        *(
            ("kandinsky_6", name)
            for name in (
                "audio_embeddings.norm",
                "audio_outLayer.out_layer",
                "visual_blocks.1.audioT.cross_attention.to_key",
            )
        ),
        *(
            ("hunyuan_video_15", name)
            for name in ("img_in.proj", "byt5_in.fc2", "double_blocks.0.txt_attn_v", "vision_in.proj.3")
        ),
        *(("z_image", name) for name in ("all_x_embedder.2-1", "layers.0.feed_forward.w1")),
        ("lumina", "t_embedder.mlp.0"),
    ],
)
def test_an_incomplete_file_is_refused(name: str, missing: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = kind.state()
    del state[f"{missing}.weight"]

    with pytest.raises(CheckpointError, match=rf"{missing}.weight is missing|missing: {missing}.weight"):
        kind.checkpoints.load_dit(kind.write(tmp_path, state), CPU)


SENSELESS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "flux_2 klein": [
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (24,)),
        ("double_blocks.0.img_mlp.2.weight", (64, 100)),
        ("img_in.weight", (0, 128)),
        ("img_in.weight", ()),
    ],
    "flux_3": [
        ("single_blocks.0.norm.query_norm.scale", (0,)),
        ("single_blocks.0.norm.query_norm.scale", (24,)),
        ("single_blocks.0.mlp_out.weight", (64, 100)),
        ("emb_in.image.weight", (0, 128)),
        ("txt_in.weight", ()),
    ],
    "qwen_image": [
        ("transformer_blocks.0.attn.to_k.bias", ()),
        ("transformer_blocks.0.attn.norm_q.weight", (0,)),
        ("img_in.weight", (0, 64)),
    ],
    "qwen_image_21": [
        ("transformer_blocks.0.attn.norm_q.weight", (0,)),
        ("transformer_blocks.0.attn.norm_q.weight", (31,)),
        ("transformer_blocks.0.attn.to_q.weight", (63, 64)),
        ("transformer_blocks.0.attn.to_k.weight", ()),
        ("img_in.weight", (0, 64)),
    ],
    "moss_image": [
        ("layers.0.q_norm.weight", (0,)),
        ("layers.0.q_norm.weight", (24,)),
        ("layers.0.proj.k.weight", ()),
        ("layers.0.proj.ffn_up_gate.weight", (191, 64)),
        ("video_embedder.weight", (0, 128)),
    ],
    "fibo_2": [
        ("layers.0.attention.norm_q.weight", (0,)),
        ("layers.0.attention.norm_q.weight", (24,)),
        ("layers.0.attention.to_k.weight", ()),
        ("perceiver.latent_queries", (15, 64)),
        ("x_embedder.weight", (0, 128)),
    ],
    "ernie_image": [
        ("layers.0.self_attention.norm_q.weight", (0,)),
        ("layers.0.self_attention.norm_q.weight", (24,)),
        ("layers.0.self_attention.to_k.weight", ()),
        ("adaLN_modulation.1.weight", (575, 96)),
        ("x_embedder.proj.weight", (96, 127, 1, 1)),
    ],
    "hidream_o1": [
        ("language_model.layers.0.self_attn.q_norm.weight", (0,)),
        ("language_model.layers.0.self_attn.q_norm.weight", (24,)),
        ("language_model.layers.0.self_attn.k_proj.weight", ()),
        ("x_embedder.proj1.weight", (16, 3071)),
        ("final_layer2.linear.weight", (3072, 63)),
    ],
    "ideogram4": [
        ("layers.0.attention.norm_q.weight", (0,)),
        ("layers.0.attention.norm_q.weight", (31,)),
        ("layers.0.attention.qkv.weight", (95, 96)),
        ("layers.0.adaln_modulation.weight", ()),
        ("final_layer.linear.weight", (127, 96)),
        ("embed_image_indicator.weight", (3, 96)),
    ],
    "kandinsky video": [
        ("visual_transformer_blocks.0.self_attention.query_norm.weight", (0,)),
        ("visual_transformer_blocks.0.self_attention.query_norm.weight", (24,)),
        ("visual_transformer_blocks.0.cross_attention.to_query.weight", ()),
        ("visual_embeddings.in_layer.weight", (64, 128)),
        ("out_layer.modulation.out_layer.weight", (127, 48)),
    ],
    "kandinsky_6": [
        ("visual_blocks.0.audioT.self_attention.query_norm.weight", (24,)),
        ("visual_blocks.0.va_cross_attention.to_key.weight", ()),
        ("visual_embeddings.in_layer.weight", (64, 128)),
        ("visual_blocks.0.av_modulation.out_layer.weight", (96, 40)),
        ("audio_outLayer.out_layer.weight", (20, 32)),
    ],
    "hunyuan_video_15": [
        ("double_blocks.0.img_attn_q_norm.weight", (0,)),
        ("double_blocks.0.img_attn_q_norm.weight", (24,)),
        ("double_blocks.0.img_attn_k.weight", ()),
        ("img_in.proj.weight", (128, 64, 1, 1, 1)),
        ("byt5_in.fc1.weight", (48,)),
        ("final_layer.linear.weight", (16, 128)),
    ],
    "z_image": [
        ("layers.0.attention.to_k.weight", ()),
        ("layers.0.attention.norm_q.weight", (0,)),
        ("layers.0.attention.norm_q.weight", (40,)),
        ("all_x_embedder.2-1.weight", (0, 64)),
        ("layers.0.attention.to_q.weight", (95, 96)),
    ],
    "krea2": [
        ("blocks.0.attn.qknorm.qnorm.scale", (0,)),
        ("blocks.0.attn.qknorm.qnorm.scale", (24,)),
        ("blocks.0.attn.wk.weight", (33, 64)),
        ("txtfusion.projector.weight", (2, 6)),
        ("first.weight", (64, 63)),
    ],
    "z_image comfy": [("layers.0.attention.qkv.weight", ()), ("layers.0.attention.qkv.weight", (95, 96))],
}


@pytest.mark.parametrize(
    ("name", "tensor", "shape"), [(name, *case) for name, cases in SENSELESS.items() for case in cases]
)
def test_sizes_without_sense_are_one_message(
    name: str, tensor: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    kind = KINDS[name]
    path = kind.write(tmp_path, kind.state())
    state = load_file(path)
    save_file({**state, tensor: torch.zeros(shape)}, path)

    families.identify(path)  # every family looks at it
    with pytest.raises(CheckpointError):
        kind.checkpoints.load_dit(path, CPU)


@pytest.mark.parametrize(("size", "maximum"), [("klein-4b", 13), ("klein-9b", 18), ("dev", 30)])
def test_as_many_blocks_of_flux_2_are_swapped_as_the_known_tuner_allows(size: str, maximum: int) -> None:
    blocks = (FLUX_2[size]["double_blocks"], FLUX_2[size]["single_blocks"])
    assert max_blocks(blocks, Flux2Model.spec.swap_counts) == maximum


@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_flux_1_and_flux_2_are_told_apart(tmp_path: Path, layout: str) -> None:
    first, second = (
        kind.write(tmp_path, kind.state(), layout) for kind in (KINDS["flux dev"], KINDS["flux_2 klein"])
    )
    with pytest.raises(CheckpointError, match=r"is not a FLUX.2 transformer; it looks like"):
        flux_2.files.load_dit(first, CPU)
    with pytest.raises(CheckpointError, match=r"it looks like a FLUX.2 transformer"):
        flux.files.load_dit(second, CPU)


def test_krea_2_and_flux_2_of_equal_width_are_told_apart(tmp_path: Path) -> None:
    """Both are 6144 wide."""
    rows = (("krea2-dit", krea2, flux_2, "a Krea 2"), ("flux2-dev-dit", flux_2, krea2, "a FLUX.2"))
    for name, own, other, words in rows:
        path = write_hollow(tmp_path / f"{name}.safetensors", tensor_list(name))
        assert read_once(path, own.files.read_dit_header).config.dim == 6144
        with pytest.raises(CheckpointError, match=f"transformer; it looks like {words} transformer"):
            other.files.load_dit(path, META)


def test_the_layered_qwen_image_is_told_by_its_further_tensor(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list("qwen-image-layered-dit"))

    assert read_once(path, qwen_image.files.read_dit_header).config.has_layers
    with pytest.raises(
        CheckpointError, match="which splits images into layers; Qwen-Image needs a different one"
    ):
        qwen_image.files.QwenImageReleaseFiles(path).dit_header()
