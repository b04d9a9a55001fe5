"""A complete tiny Anima on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anima.configs import AdapterConfig, AnimaConfig
from anima.model import AnimaModel
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3, write_model, write_qwen_tokenizer
from tests.tiny.wan_encoders import vae_tensors, write_tokenizer

T5_VOCABULARY = 520  # more than the tokenizer in tests/tiny has
# heads of 32
CONFIG = AnimaConfig(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    context_dim=48,
    modulation_dim=16,
    adapter=AdapterConfig(
        dim=48, text_dim=DIM, ffn_dim=96, num_heads=3, num_layers=2, vocabulary=T5_VOCABULARY
    ),
)
ADAPTER = "llm_adapter."


@dataclass(frozen=True)
class TinyAnima:
    """Paths of a tiny checkpoint set."""

    dit: Path
    vae: Path
    text_encoder: Path
    adapter: Path | None = None  # if the transformer's file has none

    @property
    def models(self) -> list[str]:
        """The options that name the models of a generation."""
        files = ["--dit", str(self.dit), "--vae", str(self.vae), "--text_encoder", str(self.text_encoder)]
        return files if self.adapter is None else [*files, "--llm_adapter_path", str(self.adapter)]


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: AnimaModel(config), seed, dtype)


_BLOCK = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    "adaln_modulation_attn1.": "norm1.linear_",
    "adaln_modulation_attn2.": "norm2.linear_",
    "adaln_modulation_mlp.": "norm3.linear_",
}
_REST = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1": "time_embed.t_embedder",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.": "norm_out.linear_",
    "final_layer.linear": "proj_out",
}


def in_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without the adapter under diffusers' names, in the order of its conversion script."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(ADAPTER):
            continue
        is_in_block = name.startswith("blocks.")
        for ours, theirs in (_BLOCK if is_in_block else _REST).items():
            name = name.replace(ours, theirs)
        renamed["transformer_" + name if is_in_block else name] = tensor
    return renamed


def adapter_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights under its own names, as a diffusers release has them."""
    return {name.removeprefix(ADAPTER): tensor for name, tensor in state.items() if name.startswith(ADAPTER)}


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "anima"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, in_diffusers_names)


def write_tiny_anima(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> TinyAnima:
    """Write transformer, VAE and text encoder with both tokenizers below `folder`.

    sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name="dit")
    vae = save(folder / "vae.safetensors", vae_tensors())
    text_encoder = write_qwen_tokenizer(folder / "text_encoder")
    write_model(text_encoder / "model.safetensors", qwen3())
    write_tokenizer(folder / "t5_tokenizer")
    return TinyAnima(dit, vae, text_encoder)
