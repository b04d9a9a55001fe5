"""A complete tiny HiDream-O1-Image on disk, in the released file layouts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor

from hidream_o1.configs import HiDreamO1Config, HiDreamO1VisionConfig
from hidream_o1.model import HiDreamO1Model
from hidream_o1.texts import IMAGE_TOKEN, TIME_TOKEN
from hidream_o1.vision import HiDreamO1Vision
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
# heads as many as where no config.json says it
VISION = HiDreamO1VisionConfig(
    dim=64,
    ffn_dim=48,
    num_heads=16,
    num_layers=3,
    position_side=5,
    patch_size=16,
    frames=2,
    merge=2,
    out_dim=CONFIG.dim,
)
DEEP_LAYERS = (0, 2)  # of a folder, whose config.json says so; single files have none
WITH_TOWER = replace(CONFIG, vision=VISION)
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


def tower_state(deep_layers: Sequence[int] = ()) -> dict[str, Tensor]:
    """The weights of a vision tower, with mergers for these layers."""
    vision = replace(VISION, deep_layers=tuple(deep_layers))
    state = draw_state(lambda: HiDreamO1Vision(vision), 4)
    return {f"visual.{name}": tensor for name, tensor in state.items()}


def write_edit_folder(folder: Path, deep_layers: Sequence[int] = DEEP_LAYERS) -> Path:
    """Write a released folder with a tower, whose config.json names the layers. Returns its path."""
    state = {**tiny_state(), **tower_state(DEEP_LAYERS)}
    vision = {
        "model_type": "qwen3_vl",
        "hidden_size": VISION.dim,
        "num_heads": VISION.num_heads,
        "deepstack_visual_indexes": list(deep_layers),
    }
    write_shards(folder, {f"model.{name}": tensor for name, tensor in state.items()}, "model")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_vl", "vision_config": vision}), encoding="utf-8"
    )
    write_tokenizer(folder)
    return folder


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
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", edits: bool = False, **sizes: int
) -> TinyHiDreamO1:
    """Write the network and its tokenizer below `folder`.

    name: of the network's file. edits: whether it has a vision tower. sizes: of the network.
    """
    tower = {key: tensor.to(dtype) for key, tensor in tower_state().items()} if edits else {}
    dit = write_dit(folder, {**tiny_state(dtype=dtype, **sizes), **tower}, name=name)
    return TinyHiDreamO1(dit, write_tokenizer(folder / "hidream_o1"))
