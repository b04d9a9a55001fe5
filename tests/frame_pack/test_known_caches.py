"""Caches that the known tuner wrote, without our record: found, put into batches, and given to the
transformer.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dataset.batches.finding import find_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.cache.files import write_tensors
from dataset.config import DatasetConfig, load_dataset_config
from frame_pack.family import LATENT, TEXT_KEYS, FramePack
from frame_pack.files import FramePackFiles
from modules.contract.data import Batch, Conditions
from tests.frame_pack.making import tiny_model
from tests.tiny.framepack_dit import CONFIG

WINDOW, FLOAT16 = 9, torch.float16
HISTORY = {"": 2, "_2x": 2, "_4x": 16}


def write_text(folder: Path, stem: str) -> None:
    tensors = {
        "llama_vec_float16": torch.zeros(512, CONFIG.text_dim, dtype=FLOAT16),
        "llama_attention_mask": torch.arange(512) < 7,
        "clip_l_pooler_float16": torch.ones(CONFIG.pooled_dim, dtype=FLOAT16),
    }
    metadata = {"architecture": "framepack", "caption1": "a text", "format_version": "1.0.1"}
    write_tensors(folder / f"{stem}_fp_te.safetensors", tensors, metadata)


def write_section(path: Path, start: float = 1.0) -> None:
    """A section of a clip as the format has it: the target's size in the names of all latents."""
    grid = f"{WINDOW}x4x6_float16"
    tensors = {f"latents_{grid}": torch.full((16, WINDOW, 4, 6), start, dtype=FLOAT16)}
    for kind, frames in HISTORY.items():
        tensors[f"latents_clean{kind}_{grid}"] = torch.zeros(16, frames, 4, 6, dtype=FLOAT16)
        tensors[f"clean_latent{kind}_indices_int64"] = torch.arange(frames)
    tensors["latent_indices_int64"] = torch.arange(WINDOW)
    tensors["image_embeddings_float16"] = torch.zeros(729, CONFIG.image_dim, dtype=FLOAT16)
    metadata = {
        "architecture": "framepack",
        "width": "48",
        "height": "32",
        "format_version": "1.0.1",
        "frame_count": "73",
    }
    write_tensors(path, tensors, metadata)


def write_picture(path: Path, controls: int = 1, coarse: tuple[str, ...] = ("_2x", "_4x")) -> None:
    """A picture: latents of its control images and a black frame; of coarse frames the places alone."""
    tensors = {
        "latents_1x4x6_float16": torch.ones(16, 1, 4, 6, dtype=FLOAT16),
        "latents_clean_1x4x6_float16": torch.ones(16, controls + 1, 4, 6, dtype=FLOAT16),
        "latent_indices_int64": torch.tensor([WINDOW]),
        "clean_latent_indices_int64": torch.arange(controls + 1),
        "image_embeddings_float16": torch.zeros(729, CONFIG.image_dim, dtype=FLOAT16),
    }
    tensors |= {f"clean_latent{kind}_indices_int64": torch.arange(HISTORY[kind]) for kind in coarse}
    write_tensors(
        path, tensors, {"architecture": "framepack", "width": "60", "height": "40", "format_version": "1.0.1"}
    )


def config_of(folder: Path, source: str, more: str = "") -> DatasetConfig:
    path = folder / "data.toml"
    settings = (
        f"{source} = '{folder}'\ncache_directory = '{folder}'\nresolution = [48, 32]\nbatch_size = "
        f"2\n{more}\n"
    )
    path.write_text(f"[[datasets]]\n{settings}", encoding="utf-8")
    return load_dataset_config(path)


def batches_of(config: DatasetConfig) -> list[Batch]:
    found = find_items(config, "fp", LATENT, TEXT_KEYS)
    assert not found.missing_text
    return [read_batch(items, LATENT) for items in BatchOrder(found.items, seed=0).epoch(0)]


def velocity_of(batch: Batch) -> Tensor:
    """What a tiny transformer makes of all that is cached."""
    cond: Conditions = {name: tensor for name, tensor in batch.tensors.items() if name != "latents"}
    latents = batch.tensor("latents").float()
    cond = {**cond, "guidance": torch.full((len(latents),), 1000.0)}
    model = tiny_model(text_dim=CONFIG.text_dim)
    floats = {
        name: value.float() if isinstance(value, Tensor) and value.dtype == FLOAT16 else value
        for name, value in cond.items()
    }
    return FramePack(FramePackFiles()).predict(model, latents, torch.full((len(latents),), 500.0), floats)


def test_sections_of_clips_load_and_are_learned_from(tmp_path: Path) -> None:
    """Of clips of different lengths, in one batch."""
    write_text(tmp_path, "a_b")
    write_text(tmp_path, "c")
    for section in range(2):
        write_section(tmp_path / f"a_b_00000-073-{section:04d}_0048x0032_fp.safetensors", section + 1)
    write_section(tmp_path / "c_00010-037-0000_0048x0032_fp.safetensors", 3)

    batches = batches_of(config_of(tmp_path, "video_directory"))

    assert sorted(map(len, batches)) == [1, 2]
    full = next(batch for batch in batches if len(batch) == 2)
    coarse = {
        f"{name}{kind}{end}"
        for kind in HISTORY
        for name, end in (("latents_clean", ""), ("clean_latent", "_indices"))
    }
    assert full.tensors.keys() == {"latents", "latent_indices", "image_embeddings", *TEXT_KEYS, *coarse}
    assert full.tensor("latents").shape == (2, 16, WINDOW, 4, 6)
    assert full.tensor("latents_clean_4x").shape == (2, 16, 16, 4, 6)
    assert full.captions == ("a text", "a text")
    assert torch.isfinite(velocity_of(full)).all()


@pytest.mark.parametrize("coarse", [("_2x", "_4x"), ("_4x",), ()])
def test_pictures_load_and_are_learned_from(tmp_path: Path, coarse: tuple[str, ...]) -> None:
    for stem in ("pic", "other_1"):
        write_text(tmp_path, stem)
        write_picture(tmp_path / f"{stem}_0060x0040_fp.safetensors", 2, coarse)
    (batch,) = batches_of(config_of(tmp_path, "image_directory", "fp_1f_clean_indices = [0, 1]"))
    assert batch.tensor("latents").shape == (2, 16, 1, 4, 6)
    assert batch.tensor("latents_clean").shape == (2, 16, 3, 4, 6)
    assert {name for name in batch.tensors if "x_indices" in name} == {
        f"clean_latent{kind}_indices" for kind in coarse
    }
    assert velocity_of(batch).shape == (2, 16, 1, 4, 6)
