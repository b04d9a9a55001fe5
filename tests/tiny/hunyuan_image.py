"""A complete tiny HunyuanImage-2.1 on disk, in the released file layouts."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.filling import on_meta_device
from encoders.language_models import QWEN25_VL, LanguageConfig, build_language_model
from encoders.t5_network import T5Config, T5Network
from hunyuan_image.configs import HunyuanImageConfig
from hunyuan_image.model import HunyuanImageModel
from hunyuan_image.vae import HunyuanImageVaeConfig, HunyuanImageVaeDecoder, HunyuanImageVaeEncoder
from tests.golden_cases import read_case
from tests.tiny import hunyuan_dit
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


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: queries, keys and values apart, the last halves swapped."""
    return hunyuan_dit.diffusers_state(state, diffusers_parts)


def diffusers_parts(name: str) -> list[str]:
    """The names there of a published tensor; several where it is fused there."""
    if name.startswith("byt5_in."):
        name = name.replace("byt5_in.layernorm", "context_embedder_2.norm")
        return [name.replace("byt5_in.fc", "context_embedder_2.linear_")]
    return [
        re.sub("^time_text_embed", "time_guidance_embed", part) for part in hunyuan_dit.diffusers_parts(name)
    ]


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "hunyuanimage2.1"
) -> Path:
    """Write a transformer as one of DIALECTS. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    if dialect == "comfy":
        return save(path, hunyuan_dit.comfy_state(state))
    return write_dialect(path, state, dialect, diffusers_state)


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
