"""Data sets in CogVideoX form, and pipelines with tiny models."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataset.config import DatasetTable, load_dataset_config
from modules.media.writing import write_video
from tests.tiny.hunyuan_encoders import write_text_encoders
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.project import CAPTIONS, moving_square
from tests.tiny.wan_encoders import t5_tensors, vae_tensors, write_tokenizer

NAMES = ("00000", "00001", "00002")


def write_data(root: Path, frames: int = 16, size: int = 32, count: int = 3) -> Path:
    """Clips with their captions in all forms: two lists, a CSV and data.jsonl."""
    (root / "videos").mkdir(parents=True, exist_ok=True)
    names, captions = NAMES[:count], CAPTIONS[:count]
    for index, name in enumerate(names):
        write_video(root / "videos" / f"{name}.mp4", moving_square(frames, size, size, index), fps=8)
    videos = [f"videos/{name}.mp4" for name in names]
    write_lists(root, captions, videos)
    pairs = list(zip(captions, videos, strict=True))
    rows = "".join(f'"{caption}",{video}\n' for caption, video in pairs)
    (root / "data.csv").write_text(f"caption,video\n{rows}", encoding="utf-8")
    lines = [json.dumps({"prompt": caption, "video": video}) + "\n" for caption, video in pairs]
    (root / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


def write_lists(root: Path, captions: tuple[str, ...], videos: list[str]) -> None:
    (root / "prompt.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (root / "videos.txt").write_text("\n".join(videos) + "\n", encoding="utf-8")


def write_config(
    folder: Path, root: Path, *lines: str, name: str = "data.toml", cache: str = "cache"
) -> Path:
    """A dataset file with a table over `root`."""
    path = folder / name
    text = [
        "[general]",
        "resolution = [32, 32]",
        "[[datasets]]",
        f'cogvideox_root = "{root.as_posix()}"',
        f'cache_directory = "{folder.as_posix()}/{cache}"',
        *lines,
    ]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def read_table(folder: Path, root: Path, *lines: str) -> DatasetTable:
    return load_dataset_config(write_config(folder, root, *lines)).datasets[0]


def save(tensor: Tensor | dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensor, path)
    return path


def write_wan_pipeline(folder: Path) -> Path:
    """The parts of a diffusers pipeline that preparing needs."""
    _write_vae_config(folder, "AutoencoderKLWan")
    save_file(vae_tensors(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "text_encoder").mkdir()
    save_file(t5_tensors(), folder / "text_encoder" / "model.safetensors")
    write_tokenizer(folder / "tokenizer")
    return folder


def write_hunyuan_pipeline(folder: Path) -> Path:
    _write_vae_config(folder, "AutoencoderKLHunyuanVideo")
    write_vae(folder / "vae" / "diffusion_pytorch_model.safetensors")
    write_text_encoders(folder)
    return folder


def _write_vae_config(folder: Path, name: str) -> None:
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
