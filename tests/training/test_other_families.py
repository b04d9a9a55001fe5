"""Families unlike the video families go through the same caching and training: no loop knows of them."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.cache.files import read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import load_dataset_config
from dataset.options import CachingOptions
from modules.contract.family import NoiseSpec
from modules.options import read_options
from modules.parser import add_options
from tests.training.toy_images import LATENT, LEVELS, PictureFamily, count_tokens
from training.noise_options import SAMPLERS, SIZE_SAMPLERS
from training.options import TrainingOptions, read_arguments, training_parser
from training.run import train_network

NOISE_PREDICTION = NoiseSpec(training_offset=0.0, whole_timesteps=True, table=LEVELS)
STEPS = 6


def cache(folder: Path, left: int = 255, right: int = 255) -> Path:
    """Three pictures of 32 x 32 pixels, cached. left, right: alpha of their halves."""
    (folder / "pictures").mkdir()
    random = np.random.default_rng(1)
    for index in range(3):
        pixels = random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[:, :16, 3], pixels[:, 16:, 3] = left, right
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text("a" * (index + 1), encoding="utf-8")
    path, here = folder / "dataset.toml", folder.as_posix()
    table = (
        f'image_directory = "{here}/pictures"\ncache_directory = "{here}/cache"\ncaption_extension = ".txt"\n'
    )
    path.write_text(
        f"[general]\nresolution = [32, 32]\nbatch_size = 2\n[[datasets]]\n{table}", encoding="utf-8"
    )
    config = load_dataset_config(path)
    parser = argparse.ArgumentParser()
    add_options(parser, CachingOptions)
    given = ["--dataset_config", str(path), "--device", "cpu", "--num_workers", "1"]
    options = read_options(CachingOptions, parser.parse_args(given))
    assert cache_media(PictureFamily(), config, options).written == 3
    assert cache_texts(PictureFamily(), config, options).written == 3
    return path


def train(folder: Path, family: PictureFamily, *arguments: object) -> dict[str, torch.Tensor]:
    """The LoRA of a whole training, its options as a script of that family would have them."""
    usual = [
        *("--dataset_config", folder / "dataset.toml", "--output_dir", folder / "output"),
        *("--output_name", "x", "--seed", 3),
    ]
    usual += ["--learning_rate", "1e-2", "--max_train_steps", STEPS, "--max_data_loader_n_workers", 0]
    parser = training_parser("", settings={"timestep_sampling": {"choices": (*SAMPLERS, *SIZE_SAMPLERS)}})
    options = read_options(
        TrainingOptions, read_arguments(parser, [str(one) for one in (*usual, *arguments)], {})
    )
    assert train_network(family, options) == 0
    return load_file(folder / "output" / "x.safetensors")


def made(noise: NoiseSpec | None = None) -> PictureFamily:
    torch.manual_seed(7)
    family = PictureFamily()
    return family if noise is None else replace(family, noise=noise)


def has_learned(tensors: dict[str, torch.Tensor]) -> bool:
    return any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))


def test_a_picture_family_is_cached_and_trained_with_a_shift_that_follows_the_size(tmp_path: Path) -> None:
    cache(tmp_path)
    family = made()

    assert has_learned(train(tmp_path, family, "--timestep_sampling", "flux_shift", "--loss_type", "huber"))

    times = torch.cat([times for _, times in family.network.fed])
    assert len(family.network.fed) == STEPS
    assert times.min() > 0
    assert times.max() <= 1  # without the 1 / 1000 that video families add
    assert {tokens.shape[1:] for tokens, _ in family.network.fed} == {
        (count_tokens((4, 4)), 4 * LATENT.channels)
    }


def test_transparent_places_of_a_picture_teach_nothing(tmp_path: Path) -> None:
    for name, right in {"half": 255, "nothing": 0}.items():
        folder = tmp_path / name
        folder.mkdir()
        cache(folder, left=0, right=right)
        masks = [
            read_entry(path).named["alpha_mask"] for path in (folder / "cache").glob("*_pic.safetensors")
        ]
        assert [mask.mean() for mask in masks] == [right / 255 / 2] * 3
        assert has_learned(train(folder, made())) == (name == "half")


def test_a_model_that_predicts_noise_is_trained_on_its_own_levels(tmp_path: Path) -> None:
    cache(tmp_path)
    family = made(NOISE_PREDICTION)

    assert has_learned(train(tmp_path, family, "--timestep_sampling", "uniform", "--validation_split", "0.3"))

    for _, times in family.network.fed:
        torch.testing.assert_close(1000 * times, (1000 * times).round(), atol=1e-3, rtol=0)  # whole timesteps
    spread = torch.cat([tokens.flatten() for tokens, _ in family.network.fed]).std()
    assert 0.5 < spread < 1.5  # noise of up to 15 is scaled back by the family
