"""Complete tiny FLUX.2 models on disk, in the released file layouts: dev and klein."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.autoencoder_blocks import AutoencoderConfig
from flux_2.configs import Flux2Config
from flux_2.model import Flux2Model
from flux_2.vae import Flux2Vae
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, mistral3, qwen3, write_mistral_tokenizer, write_model
from tests.tiny.language_models import write_qwen_tokenizer as write_tokenizer
from tests.tiny.picture_encoders import as_released, autoencoder_diffusers
from tests.tiny.wan_encoders import random_tensors

TEXT_LAYERS = {"klein": 28, "dev": 31}  # one more than is read
CONFIG = Flux2Config(
    dim=64, ffn_dim=192, num_heads=2, double_blocks=2, single_blocks=3, channels=128, text_dim=3 * DIM
)
CONFIGS = {"klein": CONFIG, "dev": replace(CONFIG, has_guidance=True)}
VERSIONS = {"klein": "klein-base-4b", "dev": "dev"}  # --model_version
VAE = AutoencoderConfig(32, 32, (32, 64, 64, 64), 2, 3)


def tiny_state(
    kind: str = "klein", seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change."""
    config = replace(CONFIGS[kind], **sizes)
    found = draw_state(lambda: Flux2Model(config), seed, dtype)
    found["txt_in.weight"] *= 0.1  # states of middle layers are large: what blocks add to them has to show
    return found


_NAMES = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    **{
        f"{name}.lin": f"{name}.linear"
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    },
}


def diffusers_parts(name: str) -> list[str]:
    """The names in diffusers' layout of a published tensor; several where it is fused there."""
    path = name.rpartition(".")[0]
    kind, _, rest = path.partition("_blocks.")
    if not rest:
        return [f"{_NAMES[path]}.weight"]
    number, _, module = rest.partition(".")
    start = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    return [f"{start}.{number}.{part}.weight" for part in _NAMES[module].split()]


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: queries, keys and values apart, the last halves swapped."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = diffusers_parts(name)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[part] = torch.cat(rows.chunk(2)[::-1]) if "norm_out" in part else rows.contiguous()
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "flux2"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, diffusers_state)


def vae_state(seed: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The autoencoder with the names and shapes of flux2-vae.safetensors."""
    with torch.device("meta"):
        network = Flux2Vae(VAE)
    found = add_statistics(as_released(random_tensors(network, seed)), seed)
    return {name: tensor if tensor.ndim == 0 else tensor.to(dtype) for name, tensor in found.items()}


def add_statistics(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same with statistics of packed latents."""
    generator = torch.Generator().manual_seed(seed)
    return {
        **state,
        "bn.running_mean": 0.3 * torch.randn(128, generator=generator),
        "bn.running_var": 0.2 + torch.rand(128, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def vae_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with the names of diffusers' AutoencoderKLFlux2."""
    named = autoencoder_diffusers(state)
    return {
        name.replace("encoder.quant", "quant").replace("decoder.post", "post"): tensor
        for name, tensor in named.items()
    }


@dataclass(frozen=True)
class TinyFlux2(TinyModel):
    """The same with a release."""

    version: str

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return [*super().models, "--model_version", self.version]


def write_text_encoder(folder: Path, kind: str = "klein") -> Path:
    """Write a language model with layers enough, and its tokenizer, into a folder. Returns it."""
    model = mistral3(TEXT_LAYERS[kind]) if kind == "dev" else qwen3(TEXT_LAYERS[kind])
    (write_mistral_tokenizer if kind == "dev" else write_tokenizer)(folder)
    write_model(folder / "model.safetensors", model)
    return folder


def write_tiny_flux_2(
    folder: Path, kind: str = "klein", dtype: torch.dtype = torch.float32, **sizes: int
) -> TinyFlux2:
    """Write transformer, autoencoder and text encoder with its tokenizer below `folder`.

    sizes: of the transformer.
    """
    return TinyFlux2(
        write_dit(folder, tiny_state(kind, dtype=dtype, **sizes), name="dit"),
        save(folder / "vae.safetensors", vae_state()),
        write_text_encoder(folder / "text_encoder", kind),
        VERSIONS[kind],
    )
