"""A complete tiny Lumina-Image-2.0 on disk, in the released file layouts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from encoders.language_models import LanguageConfig, build_language_model
from lumina.configs import LuminaConfig
from lumina.model import LuminaModel
from lumina.text_encoder import GEMMA_2, SCALAR
from tests.golden_cases import read_case
from tests.tiny.dit_files import draw, draw_state, write_dialect
from tests.tiny.picture_encoders import write_autoencoder

TEXT_DIM = 48
CONFIG = LuminaConfig(
    dim=96,
    ffn_dim=384,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    noise_refiner_layers=1,
    context_refiner_layers=1,
    in_dim=16,
    text_dim=TEXT_DIM,
    time_dim=96,
)
GEMMA = LanguageConfig(
    vocabulary=520,  # of the tokenizer in tests/golden
    dim=TEXT_DIM,
    ffn_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_width=32,
    num_layers=3,  # in the file: with the last one, which is not run
    final_norm=False,
    model=GEMMA_2,
    theta=GEMMA_2.theta,
    eps=GEMMA_2.eps,
    settings={SCALAR: 32},
)
ALL_IN_ONE = "text_encoders.gemma2_2b.transformer."


@dataclass(frozen=True)
class TinyLumina:
    """Paths of a tiny checkpoint set, as given to --pretrained_model_name_or_path, --ae, --gemma2."""

    dit: Path
    ae: Path
    gemma2: Path

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        files = ["--pretrained_model_name_or_path", str(self.dit), "--ae", str(self.ae)]
        return [*files, "--gemma2", str(self.gemma2)]


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: LuminaModel(config), seed, dtype)


_DIFFUSERS_NAMES = (
    ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    ("cap_embedder", "time_caption_embed.caption_embedder"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    ("final_layer.linear", "norm_out.linear_2"),
    ("attention.out", "attn.to_out.0"),
    ("attention.q_norm", "attn.norm_q"),
    ("attention.k_norm", "attn.norm_k"),
    ("feed_forward.w", "feed_forward.linear_"),
    ("adaLN_modulation.1", "norm1.linear"),
    ("attention_norm2", "norm2"),
)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout: queries, keys and values apart."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in _DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        plain = "norm1" if name.startswith("context_refiner") else "norm1.norm"
        name = name.replace("attention_norm1", plain)
        if "attention.qkv" not in name:
            found[name] = tensor
            continue
        dim = tensor.shape[1]
        keys = (len(tensor) - dim) // 2
        for character, rows in zip("qkv", tensor.split((dim, keys, keys)), strict=True):
            found[name.replace("attention.qkv", f"attn.to_{character}")] = rows.contiguous()
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "lumina"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, diffusers_state)


def gemma_state(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a Gemma 2 as google names them."""
    with torch.device("meta"):
        shapes = build_language_model(GEMMA).state_dict()
    generator = torch.Generator().manual_seed(seed)
    found = {"norm.weight": 0.1 * torch.randn(TEXT_DIM, generator=generator)}
    for name, tensor in shapes.items():
        values = draw(name, tuple(tensor.shape), generator)
        found[name] = values - 1 if name.endswith("norm.weight") else values  # these are added to 1
    return {f"model.{name}": tensor.to(dtype) for name, tensor in found.items()}


def write_gemma(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as transformers write it, with the tokenizer inside. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(gemma_state(dtype=dtype), folder / "model.safetensors")
    config = {"model_type": "gemma2", "hidden_size": TEXT_DIM, "head_dim": 32, "query_pre_attn_scalar": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    description, _ = read_case("lumina_text")
    tokenizer = json.dumps(description["tokenizers"]["gemma2"])
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return folder


def write_tiny_lumina(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> TinyLumina:
    """Write transformer, autoencoder and text encoder with its tokenizer below `folder`.

    sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name="dit")
    return TinyLumina(dit, write_autoencoder(folder / "ae.safetensors"), write_gemma(folder / "gemma2"))
