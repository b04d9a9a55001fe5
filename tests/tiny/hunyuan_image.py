"""A complete tiny HunyuanImage-2.1 on disk, in the released file layouts."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.language_models import QWEN25_VL, LanguageConfig, build_language_model
from encoders.t5_network import T5Config, T5Network
from hunyuan_image.configs import HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from hunyuan_image.vae import HunyuanImageVaeConfig, HunyuanImageVaeDecoder, HunyuanImageVaeEncoder
from modules.checkpoints.filling import on_meta_device
from tests.golden_cases import read_case
from tests.tiny.dit_files import write_dialect
from tests.tiny.hunyuan_encoders import prefixed, save
from tests.tiny.wan_encoders import random_tensors, t5_hf_tensors

TEXT_DIM, GLYPH_DIM, CHANNELS = 64, 32, 64
CONFIG = HunyuanImageConfig(
    dim=64,
    ffn_dim=256,
    num_heads=2,
    double_blocks=2,
    single_blocks=3,
    refiner_blocks=2,
    refiner_ffn_dim=256,
    in_dim=CHANNELS,
    out_dim=CHANNELS,
    text_dim=TEXT_DIM,
    glyph_dim=GLYPH_DIM,
    glyph_hidden=(48, 48),
)
# narrow where pictures are large; the last level folds 32 channels into 128
VAE = HunyuanImageVaeConfig(CHANNELS, (32, 32, 32, 32, 32, 128), 2, 3)
QWEN_LAYERS = 4
QWEN = LanguageConfig(524, TEXT_DIM, 96, 2, 1, 32, QWEN_LAYERS, True, 1e6, 1e-6, QWEN25_VL)
BYT5 = T5Config(384, GLYPH_DIM, 32, 48, 2, 2, 32, shares_positions=True)
DIALECTS = ("safetensors", "sharded", "prefixed", "comfy", "diffusers", "diffusers_sharded")


@dataclass(frozen=True)
class TinyHunyuanImage:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder, --byt5."""

    dit: Path
    vae: Path
    text_encoder: Path
    byt5: Path

    @property
    def texts(self) -> list[str]:
        """The options that name the text encoders."""
        return ["--text_encoder", str(self.text_encoder), "--byt5", str(self.byt5)]

    @property
    def encoders(self) -> list[str]:
        """The options that name VAE and text encoders."""
        return ["--vae", str(self.vae), *self.texts]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a generation."""
        return ["--dit", str(self.dit), *self.encoders]


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights of a transformer under the published names. sizes: fields of the config to change."""
    with torch.device("meta"):
        network = HunyuanImageModel(replace(CONFIG, **sizes))  # type: ignore[arg-type]
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


_COMFY = (
    (r"(time_in|t_embedder)\.mlp\.0", r"\1.in_layer"),
    (r"(time_in|t_embedder)\.mlp\.2", r"\1.out_layer"),
    (r"c_embedder\.linear_1", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2", "c_embedder.out_layer"),
    (r"(img|txt|self)_attn_(qkv|proj)", r"\1_attn.\2"),
    (r"(img|txt)_attn_q_norm\.weight", r"\1_attn.norm.query_norm.scale"),
    (r"(img|txt)_attn_k_norm\.weight", r"\1_attn.norm.key_norm.scale"),
    (r"(single_blocks\.\d+)\.q_norm\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.k_norm\.weight", r"\1.norm.key_norm.scale"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
    (r"(img_mod|txt_mod|modulation)\.linear", r"\1.lin"),
)


def comfy_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under ComfyUI's names."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in _COMFY:
            name = re.sub(ours, theirs, name)
        found[name] = tensor
    return found


_DIFFUSERS = (
    (r"time_in\.mlp\.0", "time_guidance_embed.timestep_embedder.linear_1"),
    (r"time_in\.mlp\.2", "time_guidance_embed.timestep_embedder.linear_2"),
    (r"byt5_in\.layernorm", "context_embedder_2.norm"),
    (r"byt5_in\.fc", "context_embedder_2.linear_"),
    (r"img_in\.", "x_embedder."),
    (r"txt_in\.input_embedder", "context_embedder.proj_in"),
    (r"txt_in\.t_embedder\.mlp\.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    (r"txt_in\.t_embedder\.mlp\.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    (r"txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    (r"txt_in\.individual_token_refiner\.blocks", "context_embedder.token_refiner.refiner_blocks"),
    (r"(refiner_blocks\.\d+)\.self_attn_proj", r"\1.attn.to_out.0"),
    (r"(refiner_blocks\.\d+)\.mlp\.fc1", r"\1.ff.net.0.proj"),
    (r"(refiner_blocks\.\d+)\.mlp\.fc2", r"\1.ff.net.2"),
    (r"(refiner_blocks\.\d+)\.adaLN_modulation\.1", r"\1.norm_out.linear"),
    (r"double_blocks\.", "transformer_blocks."),
    (r"single_blocks\.", "single_transformer_blocks."),
    (r"img_mod\.", "norm1."),
    (r"txt_mod\.", "norm1_context."),
    (r"img_attn_proj", "attn.to_out.0"),
    (r"txt_attn_proj", "attn.to_add_out"),
    (r"img_attn_([qk])_norm", r"attn.norm_\1"),
    (r"txt_attn_([qk])_norm", r"attn.norm_added_\1"),
    (r"img_mlp\.fc1", "ff.net.0.proj"),
    (r"img_mlp\.fc2", "ff.net.2"),
    (r"txt_mlp\.fc1", "ff_context.net.0.proj"),
    (r"txt_mlp\.fc2", "ff_context.net.2"),
    (r"(single_transformer_blocks\.\d+)\.([qk])_norm", r"\1.attn.norm_\2"),
    (r"(single_transformer_blocks\.\d+)\.modulation\.", r"\1.norm."),
    (r"(single_transformer_blocks\.\d+)\.linear2", r"\1.proj_out"),
    (r"final_layer\.linear", "proj_out"),
    (r"final_layer\.adaLN_modulation\.1", "norm_out.linear"),
)
_PARTS = (
    (r"(.+refiner_blocks\.\d+)\.self_attn_qkv\.", r"\1.attn.to_{}."),
    (r"(.+\.\d+)\.img_attn_qkv\.", r"\1.attn.to_{}."),
    (r"(.+\.\d+)\.txt_attn_qkv\.", r"\1.attn.add_{}_proj."),
    (r"(.+\.\d+)\.linear1\.", r"\1.attn.to_{}."),
)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: queries, keys and values apart, the last halves swapped."""
    found: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        name = ours
        for pattern, theirs in _DIFFUSERS:
            name = re.sub(pattern, theirs, name)
        if ours.startswith("final_layer.adaLN"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        stacked = next((part for part in _PARTS if re.match(part[0], name)), None)
        if stacked is None:
            found[name] = tensor
            continue
        dim = state["img_in.proj.bias"].numel()
        start = re.sub(*stacked, name)
        for index, letter in enumerate("qkv"):
            found[start.format(letter)] = tensor[index * dim : (index + 1) * dim].clone()
        if len(tensor) > 3 * dim:
            found[start.replace("attn.to_{}", "proj_mlp")] = tensor[3 * dim :].clone()
    return found


def diffusers_parts(name: str) -> list[str]:
    """What a published weight of a linear layer is there: one, or those that are stacked."""
    heights = {"qkv": 3, "linear1": 7}
    rows = next((height for ending, height in heights.items() if ending in name), 1)
    found = diffusers_state({name: torch.zeros(rows, 1), "img_in.proj.bias": torch.zeros(1)})
    return [part for part in found if not part.startswith("x_embedder")]


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "hunyuanimage2.1"
) -> Path:
    """Write a transformer as one of DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    return (
        save(path, comfy_state(state))
        if dialect == "comfy"
        else write_dialect(path, state, dialect, diffusers_state)
    )


def vae_state(seed: int = 5, config: HunyuanImageVaeConfig = VAE) -> dict[str, Tensor]:
    """Random weights of a VAE under the published names."""
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {"encoder": HunyuanImageVaeEncoder(config), "decoder": HunyuanImageVaeDecoder(config)}
        )
    found = random_tensors(parts, seed)
    for name in found:
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            found[name] = found[name][..., None, None]
    found["encoder.conv_out.bias"][config.latent_channels :] -= 8  # little noise in a sample
    return found


def diffusers_vae(state: Mapping[str, Tensor], config: HunyuanImageVaeConfig = VAE) -> dict[str, Tensor]:
    """The same VAE with the names of diffusers, whose layers of all levels stand in one list."""
    found = {}
    for name, tensor in state.items():
        level = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.+)", name)
        if level:
            blocks = config.encoder_blocks if level[1] == "encoder" else config.decoder_blocks
            place, rest = int(level[3]) * (blocks + 1), level[4]
            block = re.fullmatch(r"block\.(\d+)\.(.+)", rest)
            place, rest = (
                (place + int(block[1]), block[2]) if block else (place + blocks, rest.split(".", 1)[1])
            )
            name = f"{level[1]}.{level[2]}_blocks.{place}.{rest}"
        for ours, theirs in (
            (r"mid\.block_1", "mid_block.resnets.0"),
            (r"mid\.block_2", "mid_block.resnets.1"),
            (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.proj"),
            (r"mid\.attn_1\.norm", "mid_block.attentions.0.norm"),
            (r"mid\.attn_1\.", "mid_block.attentions.0.to_"),
        ):
            name = re.sub(ours, theirs, name)
        found[name] = tensor
    return found


def write_vae(path: Path, seed: int = 5) -> Path:
    """A tiny hunyuan_image_2.1_vae_fp16.safetensors, in float32."""
    return save(path, vae_state(seed))


def qwen_state(seed: int = 3) -> dict[str, Tensor]:
    """Random weights of the whole language model, with the names of Qwen2ForCausalLM."""
    with on_meta_device():
        network = build_language_model(QWEN)
    head = {"lm_head.weight": torch.ones(QWEN.vocabulary, TEXT_DIM)}
    return prefixed(random_tensors(network, seed), "model.", **head)


def qwen_config() -> dict[str, object]:
    """The config.json of a Qwen2.5-VL."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": TEXT_DIM,
        "num_attention_heads": QWEN.num_heads,
        "rms_norm_eps": QWEN.eps,
        "rope_theta": QWEN.theta,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    }


def write_qwen(folder: Path) -> Path:
    """A folder as transformers write it, with the tokenizer inside. Returns the folder."""
    save(folder / "model.safetensors", qwen_state())
    (folder / "config.json").write_text(json.dumps(qwen_config()), encoding="utf-8")
    tokenizer = read_case("hunyuan_image_text")[0]["tokenizers"]["text_encoder"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def byt5_state(seed: int = 4) -> dict[str, Tensor]:
    """Random weights of a ByT5 encoder with Hugging Face's names."""
    with torch.device("meta"):
        network = T5Network(BYT5)
    return t5_hf_tensors(random_tensors(network, seed))


def write_tiny_hunyuan_image(
    folder: Path, dtype: torch.dtype = torch.float32, **sizes: int
) -> TinyHunyuanImage:
    """Write transformer, VAE and both text encoders below `folder`. sizes: of the transformer."""
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name="dit")
    vae = write_vae(folder / "vae.safetensors")
    return TinyHunyuanImage(
        dit, vae, write_qwen(folder / "text_encoder"), save(folder / "byt5.safetensors", byt5_state())
    )
