"""Tiny random Stable Diffusion 1.x, 2.x and XL checkpoints, in the released files' layouts.

Networks are drawn once per process under diffusers' and Hugging Face's names; single files get the released
(LDM) names by the tables below, which are the inverse of what `stable_diffusion/` does.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipText
from tests.tiny.dit_files import draw, write_tensors
from tests.tiny.hunyuan_encoders import write_clip_tokenizer

TEXT_DIM = 64
TOKENIZERS = {
    "clip_l": "openai_clip-vit-large-patch14",
    "open_clip": "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
_COMMON = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": TEXT_DIM}


@dataclass(frozen=True)
class TinyKind:
    """What a tiny checkpoint consists of. texts: activation and layers of each text encoder."""

    unet: Mapping[str, Any]
    texts: Sequence[tuple[str, int]]
    latent_scale: float
    pipeline: str
    scheduler: str


KINDS = {
    "sd1": TinyKind(
        {
            **_COMMON,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 8,  # diffusers' name; it is the number of heads
        },
        (("quick_gelu", 3),),
        0.18215,
        "StableDiffusionPipeline",
        "PNDMScheduler",
    ),
    "sd2": TinyKind(
        {
            **_COMMON,
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
        },
        (("gelu", 3),),  # the single file has one layer more, which is not used
        0.18215,
        "StableDiffusionPipeline",
        "DDIMScheduler",
    ),
    "sdxl": TinyKind(
        {
            **_COMMON,
            "block_out_channels": (32, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "cross_attention_dim": 2 * TEXT_DIM,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": TEXT_DIM + 6 * 32,
        },
        (("quick_gelu", 3), ("gelu", 3)),
        0.13025,
        "StableDiffusionXLPipeline",
        "EulerDiscreteScheduler",
    ),
}
# the U-Nets of the released models, without what is diffusers' default
RELEASED_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}


# What users give to options


def write_sd1(folder: Path, channels: int = 4, name: str = "sd1.safetensors", **sizes: Any) -> Path:
    """SD 1.x as a single file. channels: 9 for inpainting. sizes: other values of the U-Net's config."""
    return write_tensors(folder / name, single_file_state("sd1", in_channels=channels, **sizes))


def write_sd2(folder: Path, name: str = "sd2.safetensors", **sizes: Any) -> Path:
    """SD 2.x as a single file. Nothing in such a file tells whether it predicts v."""
    return write_tensors(folder / name, single_file_state("sd2", **sizes))


def write_sdxl(folder: Path, name: str = "sdxl.safetensors", **sizes: Any) -> Path:
    """SDXL as a single file."""
    return write_tensors(folder / name, single_file_state("sdxl", **sizes))


WRITERS: dict[str, Callable[..., Path]] = {"sd1": write_sd1, "sd2": write_sd2, "sdxl": write_sdxl}


def write_tiny_stable_diffusion(folder: Path, kind: str) -> None:
    """Write a checkpoint, a VAE of its own, and the tokenizer next to them."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[kind](folder, name="ckpt.safetensors")
    write_tensors(folder / "vae.safetensors", ldm_vae(vae_state()))
    write_tokenizer(folder / "clip_l")


def write_folder(kind: str, folder: Path, velocity: bool = False, **sizes: Any) -> Path:
    """The same weights as a diffusers folder, which diffusers' own pipelines open."""
    tiny = KINDS[kind]
    write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", unet_state(kind, **sizes))
    _write_json(
        folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **tiny.unet, **sizes}
    )
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_state())
    _write_json(
        folder / "vae" / "config.json",
        {"_class_name": "AutoencoderKL", **VAE, "scaling_factor": tiny.latent_scale},
    )
    index: dict[str, Any] = {
        "_class_name": tiny.pipeline,
        "scheduler": ["diffusers", tiny.scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for number, (activation, layers) in enumerate(tiny.texts):
        ending = "" if number == 0 else f"_{number + 1}"
        is_projected = kind == "sdxl" and number == 1
        architecture = "CLIPTextModelWithProjection" if is_projected else "CLIPTextModel"
        write_tensors(
            folder / f"text_encoder{ending}" / "model.safetensors",
            text_state(kind, number, projected=is_projected),
        )
        _write_json(
            folder / f"text_encoder{ending}" / "config.json",
            text_config_json(architecture, activation, layers),
        )
        write_tokenizer(
            folder / f"tokenizer{ending}", "clip_l" if activation == "quick_gelu" else "open_clip"
        )
        index[f"text_encoder{ending}"] = ["transformers", architecture]
        index[f"tokenizer{ending}"] = ["transformers", "CLIPTokenizer"]
    if kind == "sdxl":
        index["force_zeros_for_empty_prompt"] = False
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(kind, velocity))
    _write_json(folder / "model_index.json", index)
    return folder


def tokenizer_folder(folder: Path) -> Path:
    """A folder for --tokenizer_cache_dir."""
    for kind, name in TOKENIZERS.items():
        write_tokenizer(folder / name, kind)
    return folder


# Tokenizers and configurations


def write_tokenizer(folder: Path, kind: str = "clip_l") -> Path:
    """vocab.json, merges.txt and the settings of CLIP-L's, which pads with its end, or OpenCLIP's, with 0."""
    write_clip_tokenizer(folder)
    end, start = "<|endoftext|>", "<|startoftext|>"
    tokens = {
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if kind == "clip_l" else "!",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **tokens}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", tokens)
    return folder


@cache
def vocabulary() -> int:
    """Tokens of the tokenizer; the last one is the end token, the one before it starts a text."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder))
        return len(json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8")))


def text_config(activation: str, layers: int) -> ClipTextConfig:
    """Dimensions of a tiny text encoder: one head, which is 64 wide."""
    return ClipTextConfig(vocabulary(), 77, TEXT_DIM, 2 * TEXT_DIM, 1, layers, activation)


def text_config_json(architecture: str, activation: str, layers: int) -> dict[str, Any]:
    """config.json of a text encoder."""
    config = text_config(activation, layers)
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.positions,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "projection_dim": TEXT_DIM,
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": config.vocabulary - 1,
        "pad_token_id": config.vocabulary - 1 if activation == "quick_gelu" else 0,
    }


def scheduler_config(kind: str, velocity: bool = False) -> dict[str, Any]:
    """scheduler_config.json as released."""
    return {
        "_class_name": KINDS[kind].scheduler,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if velocity else "epsilon",
        "steps_offset": 1,
        **({} if kind == "sdxl" else {"clip_sample": False, "set_alpha_to_one": False}),
        **({"skip_prk_steps": True} if kind == "sd1" else {}),
        **({"timestep_spacing": "leading"} if kind == "sdxl" else {}),
    }


# Weights under diffusers' and Hugging Face's names


def unet_state(kind: str, **sizes: Any) -> dict[str, Tensor]:
    """The U-Net. sizes: other values of its configuration."""
    return _copy(_unet_state(kind, tuple(sorted(sizes.items()))))


@cache
def _unet_state(kind: str, sizes: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = UNet2DConditionModel(**{**KINDS[kind].unet, **dict(sizes)})
    state = _draw_all(network, 1)
    for name in state:  # texts must be seen in a picture, so that tests of texts can fail
        if name.endswith("attn2.to_out.0.weight"):
            state[name] *= 3
    return state


def vae_state() -> dict[str, Tensor]:
    """The autoencoder."""
    return _copy(_vae_state())


@cache
def _vae_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        network = AutoencoderKL(**VAE)
    state = _draw_all(network, 2)
    state["decoder.conv_out.weight"] *= 0.5  # few pixels beyond -1..1
    state["quant_conv.weight"][4:] *= 0.1
    state["quant_conv.bias"][4:] = -2.0  # log variances
    return state


def text_state(
    kind: str, number: int = 0, projected: bool = False, extra_layers: int = 0
) -> dict[str, Tensor]:
    """A text encoder with Hugging Face's names. extra_layers: above those that are used."""
    activation, layers = KINDS[kind].texts[number]
    with torch.device("meta"):
        network = ClipText(text_config(activation, layers + 1))
    state = {f"text_model.{name}": tensor for name, tensor in _draw_all(network, 3 + number).items()}
    unused = [f"text_model.encoder.layers.{layers + number}." for number in range(extra_layers, 1)]
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(unused))}
    for name in state:
        if name.endswith("embedding.weight"):
            state[name] *= 8  # about 1 each
    generator = torch.Generator().manual_seed(30 + number)
    projection = torch.randn((TEXT_DIM, TEXT_DIM), generator=generator) / TEXT_DIM**0.5
    return {**state, "text_projection.weight": projection} if projected else state


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in memory of their own: a test may change what it gets in place."""
    return {name: tensor.clone() for name, tensor in state.items()}


def _draw_all(network: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, tuple(tensor.shape), generator) for name, tensor in network.state_dict().items()}


# The same weights under the released single files' names


def single_file_state(kind: str, **sizes: Any) -> dict[str, Tensor]:
    """All of a checkpoint under the released names, with what such files carry beside the networks."""
    unet = ldm_unet(unet_state(kind, **sizes))
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in ldm_vae(vae_state()).items()}
    if kind == "sd1":
        text = {**text_state(kind), "text_model.embeddings.position_ids": torch.arange(77)[None]}
        state |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
        schedule = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        state |= {"betas": schedule, "alphas_cumprod": (1 - schedule).cumprod(0)}
    elif kind == "sd2":
        text = open_clip(text_state(kind, projected=True, extra_layers=1))
        state |= {f"cond_stage_model.model.{name}": tensor for name, tensor in text.items()}
    else:
        first = {**text_state(kind), "text_model.embeddings.position_ids": torch.arange(77)[None]}
        second = open_clip(text_state(kind, 1, projected=True))
        state |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
        state |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
        state["denoiser.sigmas"] = torch.linspace(0.03, 14.6, 1000)
    return state


_UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net of diffusers under the released names."""
    layers = 1 + max(
        int(name.split(".")[3]) for name in state if re.match(r"down_blocks\.\d+\.resnets", name)
    )
    with_attention = {
        int(name.split(".")[1]) for name in state if re.match(r"up_blocks\.\d+\.attentions", name)
    }

    def renamed(name: str) -> str:
        for theirs, released in _UNET_NAMES.items():
            if name.startswith(theirs + "."):
                name = released + name.removeprefix(theirs)
                return _in_resnet(name) if "resnets" in theirs else name
        side, level, part, number, rest = name.split(".", 4)
        block, place = int(level), int(number)
        per_level = layers + 1
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * per_level}.0.{rest.replace('conv', 'op', 1)}"
        if part == "upsamplers":
            index = 2 if block in with_attention else 1
            return f"output_blocks.{block * per_level + layers}.{index}.{rest}"
        first = 1 if side == "down_blocks" else 0
        start = "input_blocks" if first else "output_blocks"
        where = f"{start}.{first + block * per_level + place}.{int(part == 'attentions')}"
        return _in_resnet(f"{where}.{rest}") if part == "resnets" else f"{where}.{rest}"

    return {renamed(name): tensor for name, tensor in state.items()}


def _in_resnet(name: str) -> str:
    path, kind = name.rsplit(".", 1)
    start, _, part = path.rpartition(".")
    return f"{start}.{_UNET_RESNETS[part]}.{kind}" if part in _UNET_RESNETS else name


_VAE_NAMES = (
    (r"encoder\.down_blocks\.", "encoder.down."),
    (r"\.resnets\.", ".block."),
    (r"\.(up|down)samplers\.0\.", r".\1sample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.block\.0", "mid.block_1"),
    (r"mid_block\.block\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_norm_out", "norm_out"),
)


def ldm_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder of diffusers under the released names: projections of its attention are convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    stored = {}
    for name, tensor in state.items():
        if re.search(r"attentions\.0\.to_.*weight", name):
            tensor = tensor[:, :, None, None]
        name = re.sub(
            r"decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name
        )
        for theirs, released in _VAE_NAMES:
            name = re.sub(theirs, released, name)
        stored[name] = tensor
    return stored


_OPEN_CLIP_NAMES = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
)


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder with OpenCLIP's names: q, k and v in one tensor, the projection transposed."""
    stored = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in state.items():
        if "self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            start, kind = name.split("self_attn.q_proj.")
            name, tensor = f"{start}attn.in_proj_{kind}", torch.cat(parts)
        elif "self_attn.k_proj." in name or "self_attn.v_proj." in name:
            continue
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for theirs, released in _OPEN_CLIP_NAMES:
            name = name.replace(theirs, released)
        stored[name] = tensor
    return stored


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
