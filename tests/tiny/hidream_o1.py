"""A complete tiny HiDream-O1-Image on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor

from hidream_o1.configs import HiDreamO1Config
from hidream_o1.model import HiDreamO1Model
from hidream_o1.texts import IMAGE_TOKEN, TIME_TOKEN
from tests.tiny.dit_files import draw_state, write_dialect, write_shards
from tests.tiny.language_models import qwen_tokenizer

CONFIG = HiDreamO1Config(
    dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    num_layers=2,
    vocabulary=qwen_tokenizer().get_vocab_size() + 2,
    bottleneck=16,
    freq_dim=32,
)
DIALECTS = ("released", "released_sharded")


@dataclass(frozen=True)
class TinyHiDreamO1:
    """Paths of a tiny checkpoint set, as given to --dit and --tokenizer."""

    dit: Path
    tokenizer: Path

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return ["--dit", str(self.dit), "--tokenizer", str(self.tokenizer)]


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the names of single files. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: HiDreamO1Model(config), seed, dtype)


def as_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the released folder: behind a prefix, with a vision tower and a head for words."""
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    named["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(12, 4)
    return {**named, "lm_head.weight": torch.ones_like(state["language_model.embed_tokens.weight"])}


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "hidream_o1_image"
) -> Path:
    """Write a network in a layout of `write_dialect`, or as released. Returns the value of --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    if dialect == "released":
        return write_dialect(path, as_released(state), "safetensors", dict)
    if dialect == "released_sharded":
        return write_shards(folder / name, as_released(state), "model").parent
    return write_dialect(path, state, dialect, dict)


def write_tokenizer(folder: Path) -> Path:
    """Write Qwen's tokenizer with the tokens of this model. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (IMAGE_TOKEN, TIME_TOKEN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_tiny_hidream_o1(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyHiDreamO1:
    """Write the network and its tokenizer below `folder`.

    name: of the network's file. sizes: of the network.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name)
    return TinyHiDreamO1(dit, write_tokenizer(folder / "hidream_o1"))
