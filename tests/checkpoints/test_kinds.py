"""Models that no script runs are recognized by the tensors of diffusers' networks, and refused by name."""

import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.kinds import UNSUPPORTED_MODELS, describe_file_kind
from checkpoints.opening import open_checkpoint, open_file
from flux.files import read_dit_header as read_flux_header
from minimax_h3.dit_checkpoints import load_dit as load_h3
from modules.errors import CheckpointError
from modules.installation import import_own
from protocols import families
from protocols.loading import Placement
from qwen_image.files import read_dit_header as read_qwen_header
from tests.faults.messages import assert_one_message, run_here
from tests.manifests import write_hollow
from tests.tiny.flux import tiny_state
from tests.tiny.minimax_h3 import write_tiny_h3
from tests.tiny.project import write_plain_images

META = Placement(torch.device("meta"))
HIDREAM = {
    **{"patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "text_emb_dim": 8},
    **{"attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [8, 8]},
    **{"num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4)},
    **{"max_resolution": (32, 32), "llama_layers": [0, 1]},
}
ONE = {"num_layers": 1}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("Cosmos3OmniTransformer", {"num_hidden_layers": 1}, "Cosmos 3"),
    ("GlmImageTransformer2DModel", ONE, "GLM-Image"),
    ("HiDreamImageTransformer2DModel", HIDREAM, "HiDream-I1"),
    ("Kandinsky6SRTransformer3DModel", {"num_visual_blocks": 1}, "upscaling transformer of Kandinsky 6"),
    ("LTXVideoTransformer3DModel", ONE, "LTX-Video 0.9, a different network"),
    ("AutoencoderKLLTXVideo", {}, "a VAE of LTX-Video"),
    ("AutoencoderKLLTX2Video", {}, "a VAE of LTX-Video or LTX-2"),
    ("AutoencoderKLLTX2Audio", {}, "a VAE of LTX-Video or LTX-2"),
    ("LongCatImageTransformer2DModel", {**ONE, "num_single_layers": 1}, "LongCat-Image"),
    ("NucleusMoEImageTransformer2DModel", ONE, "Nucleus-Image"),
    ("ZImageTransformer2DModel", {"siglip_feat_dim": 16, "n_layers": 1}, "Z-Image-Omni"),
]
# of layouts that no class here writes: diffusers' own marks, and released files
RELEASED = {
    "patch_embedding_pose.weight": "SCAIL-2",
    "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": "Boogu-Image",
    "blocks.0.pre_crs_attn_norm.weight": "LongCat-Video",
}
FORMATS = [entry.room for entry in families.with_scripts().values() if entry.own_files]


def state_of(network: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state: dict[str, Tensor] = getattr(diffusers, network)(**settings).state_dict()
    return state


def write_network(path: Path, network: str, settings: dict[str, Any]) -> Path:
    shapes = {name: ("BF16", tuple(one.shape)) for name, one in state_of(network, settings).items()}
    return write_hollow(path, shapes)


@pytest.mark.parametrize(("network", "settings", "words"), CASES, ids=[case[0] for case in CASES])
def test_a_network_of_diffusers_is_known_by_name(network: str, settings: dict[str, Any], words: str) -> None:
    kind = describe_file_kind(state_of(network, settings))

    assert kind is not None
    assert words in kind
    assert "not supported yet" in kind


@pytest.mark.parametrize(("name", "words"), RELEASED.items())
def test_released_names_are_known_too(name: str, words: str) -> None:
    others = ["double_blocks.0.img_attn_qkv.weight", "blocks.0.self_attn.q_proj.weight", "byt5_in.fc1.weight"]

    of_language = [
        "model.visual.pos_embed.weight",
        "noise_refiner.0.attention.to_q.weight",
    ]  # in some of them

    assert words in str(describe_file_kind([*others, *of_language, name]))


@pytest.mark.parametrize(
    ("name", "is_other"),
    [
        ("MiniMax-H3-Image/transformer/diffusion_pytorch_model-00001-of-00001.safetensors", True),
        ("minimax_h3_image_bf16.safetensors", True),
        ("H3Image.safetensors", True),
        ("minimax_h3_fl2va_bf16.safetensors", False),
        ("h3_images/minimax_h3_fl2va_bf16.safetensors", False),  # a folder of somebody
    ],
)
def test_a_model_with_all_tensors_of_another_is_known_by_its_file(
    name: str, is_other: bool, tmp_path: Path
) -> None:
    files = write_tiny_h3(tmp_path / "tiny")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    files.dit.rename(path)

    if is_other:
        with pytest.raises(CheckpointError, match=r"MiniMax-H3-Image, whose heads .* as its name says\.\n"):
            load_h3(path, META)
    else:
        load_h3(path, META)


@pytest.mark.parametrize(
    "network",
    [
        *("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel"),
        *("HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel", "WanTransformer3DModel"),
        *("LTX2VideoTransformer3DModel", "QwenImageTransformer2DModel", "SkyReelsV2Transformer3DModel"),
        *("HunyuanVideoFramepackTransformer3DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"),
    ],
)
def test_networks_that_scripts_run_are_not_taken_for_others(network: str) -> None:
    settings = {"n_layers": 1} if network.startswith("ZImage") else ONE
    assert describe_file_kind(state_of(network, settings), UNSUPPORTED_MODELS) is None


def test_each_mark_says_its_own_kind_and_of_several_the_most_special_counts() -> None:
    marks = families.family_marks()
    assert len(marks) >= 41
    assert {mark: describe_file_kind([mark]) for mark, _ in marks} == dict(marks)
    hunyuan, flux = (
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "double_blocks.0.img_attn.qkv.weight",
    )
    for words, *names in (
        ("Z-Image", "context_refiner.0.attention.qkv.weight", "cap_pad_token"),  # in ComfyUI's layout
        ("HunyuanVideo", flux, hunyuan),
        ("HunyuanImage", flux, hunyuan, "byt5_in.fc1.weight"),
        ("FLUX.2", flux, "double_stream_modulation_img.lin.weight"),
        ("Chroma", flux, "distilled_guidance_layer.in_proj.weight"),
        ("ControlNet", "transformer_blocks.0.img_mod.1.weight", "controlnet_x_embedder.weight"),
        ("Qwen-Image", "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.img_mod.1.weight"),
        ("the autoencoder of FLUX.2", "quant_conv.weight", "bn.running_mean"),
    ):
        assert words in str(describe_file_kind(names)), names


@pytest.mark.parametrize("folder", FORMATS)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[2] in {"Nucleus-Image", "HunyuanVideo 1.5"}],
    ids=lambda case: case[2],
)
def test_every_family_refuses_another_model_by_its_name(
    tmp_path: Path, folder: str, case: tuple[str, dict[str, Any], str]
) -> None:
    path = write_network(tmp_path / "model.safetensors", *case[:2])
    module = import_own(f"{folder}.files")

    assert module.FORMAT.identify(path) is None
    with pytest.raises(CheckpointError, match=rf"is (the|a) transformer of {case[2]}.*\n.*Pass .*--"):
        module.FORMAT.load(path, META)


@pytest.mark.parametrize(
    ("network", "script", "option", "words"),
    [
        (
            "NucleusMoEImageTransformer2DModel",
            "qwen_image_generate_image.py",
            "--dit",
            "is the transformer of Nucleus",
        ),
        ("AutoencoderKLQwenImage21", "wan_cache_latents.py", "--vae", "the VAE of Qwen-Image-2.1"),
    ],
)
def test_a_script_says_in_one_message_what_a_file_is(
    tmp_path: Path, network: str, script: str, option: str, words: str
) -> None:
    path = write_network(tmp_path / "model.safetensors", network, ONE if option == "--dit" else {})
    write_plain_images(tmp_path)
    more = ["--prompt", "a cat", "--save_path", "out", "--output_type", "latent"]
    command = [script, option, path, *(more if option == "--dit" else ["--dataset_config", "dataset.toml"])]

    assert_one_message(*run_here(*command, folder=tmp_path), words, option)


def test_a_damaged_pickle_is_read_once_not_by_each_family(tmp_path: Path) -> None:
    path = tmp_path / "marks.pt"
    path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b".")
    began = time.process_time()
    with pytest.raises(CheckpointError):
        open_file(path)
    alone = time.process_time() - began

    assert families.identify(path) is None
    assert time.process_time() - began < 4 * alone


def test_models_with_the_names_of_another_are_told_by_their_sizes(tmp_path: Path) -> None:
    mage = {"in_channels": 128, "joint_attention_dim": 2560, **ONE}
    write_network(tmp_path / "mage.safetensors", "QwenImageTransformer2DModel", mage)
    with (
        pytest.raises(CheckpointError, match="is the transformer of Mage-Flow"),
        open_checkpoint(tmp_path / "mage.safetensors") as checkpoint,
    ):
        read_qwen_header(checkpoint)
    qwen = {"in_channels": 128, "joint_attention_dim": 2561, **ONE}
    write_network(tmp_path / "qwen.safetensors", "QwenImageTransformer2DModel", qwen)
    with open_checkpoint(tmp_path / "qwen.safetensors") as checkpoint:
        assert read_qwen_header(checkpoint).config.text_dim == 2561


def test_flux_without_pooled_text_is_another_model(tmp_path: Path) -> None:
    """ComfyUI's layout of LongCat-Image: the blocks of FLUX.1."""
    state = {name: tensor for name, tensor in tiny_state("dev").items() if not name.startswith("vector_in")}
    save_file(state, tmp_path / "longcat.safetensors")
    with (
        open_checkpoint(tmp_path / "longcat.safetensors") as checkpoint,
        pytest.raises(CheckpointError, match="LongCat-Image or of another"),
    ):
        read_flux_header(checkpoint)
