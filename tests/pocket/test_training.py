"""A LoRA for the pocket model, from drawn clips as real files to a sample: caching, training, resuming,
converting, generating.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocket.clips import write_clips
from pocket.concepts import CONCEPTS, DATASET
from pocket.measure import CLIP, POCKET, model_options
from tests.commands import run_script

STEPS = 4
SAMPLE = "a red blorp moving left --w 64 --h 64 --f 17 --s 4 --g 4 --fs 3 --d 1\n"


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few clips of a concept, cached."""
    folder = tmp_path_factory.mktemp("blorp")
    for name, seed in (("clips", 1), ("known_clips", 3), ("validation_clips", 2)):
        write_clips(folder / name, 2, seed, CONCEPTS["blorp"].make)
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder.as_posix()), encoding="utf-8")
    (folder / "samples.txt").write_text(SAMPLE, encoding="utf-8")
    dataset = ("--dataset_config", folder / "dataset.toml")
    run_script("wan_cache_latents.py", *dataset, "--vae", POCKET / "vae.safetensors")
    run_script("wan_cache_text_encoder_outputs.py", *dataset, "--t5", POCKET / "t5.safetensors")
    return folder


def train(folder: Path, name: str, *options: object) -> Path:
    """The LoRA of a run in `folder`/NAME."""
    network = (
        *("--network_module", "networks.lora_wan", "--network_dim", 4, "--learning_rate", 1e-2, "--seed", 3),
        "--sdpa",
    )
    times = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--max_data_loader_n_workers", 0)
    output = (
        *("--dataset_config", folder / "dataset.toml", "--output_dir", folder / name),
        *("--output_name", "blorp"),
    )
    run_script("wan_train_network.py", *model_options(POCKET), *network, *times, *output, *options)
    return folder / name / "blorp.safetensors"


@pytest.fixture(scope="module")
def trained(cached: Path) -> Path:
    """A LoRA of a few steps, with a sample half way and at the end."""
    samples = ("--sample_prompts", cached / "samples.txt", "--sample_every_n_steps", STEPS // 2)
    return train(cached, "whole", "--max_train_steps", STEPS, *samples)


def test_samples_are_made_while_training(trained: Path) -> None:
    samples = sorted((trained.parent / "sample").glob("*.mp4"))
    assert len(samples) == 2


def test_a_resumed_run_ends_with_the_same_lora(cached: Path, trained: Path) -> None:
    train(cached, "parts", "--max_train_steps", STEPS // 2, "--save_state_on_train_end")
    parts = train(cached, "parts", "--max_train_steps", STEPS, "--resume", "latest")
    first, second = load_file(trained), load_file(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_converted_lora_makes_the_same_clip(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    run_script("convert_lora.py", "--input", trained, "--output", other, "--target", "other")
    made = []
    for index, path in enumerate((trained, other)):
        folder = tmp_path / str(index)
        prompt = (
            *("--prompt", "a red blorp moving left", "--seed", 1, "--infer_steps", 4),
            *("--output_type", "latent"),
        )
        run_script(
            "wan_generate_video.py",
            *model_options(POCKET),
            *CLIP,
            *prompt,
            *("--lora_weight", path, "--save_path", folder),
        )
        made += [load_file(latent)["latent"] for latent in folder.glob("*_latent.safetensors")]
    assert torch.allclose(made[0], made[1], atol=1e-5)
