"""Every family and variant goes the whole way through its scripts: cache, train with a sample, resume, generate."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import run_script
from tests.tiny.families import FAMILIES, TinyFamily

OUTPUT = ["--output_dir", "output", "--output_name", "lora", "--seed", "1", "--max_data_loader_n_workers", "0"]
SIZE = ["--video_size", "32", "32", "--video_length", "5", "--infer_steps", "2", "--flow_shift", "5", "--guidance_scale", "3"]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyFamily, Path]:
    """A folder in which a LoRA was trained for three steps; a sample was made at the end."""
    family: TinyFamily = request.param
    folder = tmp_path_factory.mktemp("a family")  # the space in the name is part of the test
    family.prepare(folder)
    (folder / "prompts.txt").write_text(f"# a comment\n{family.sample_line}\n", encoding="utf-8")
    run_script(*family.cache_latents, folder=folder)
    run_script(*family.cache_texts, folder=folder)
    samples = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3"]
    run_script(*family.train, *OUTPUT, *samples, "--max_train_steps", "3", "--save_state", folder=folder)
    return family, folder


def test_the_lora_has_learned(trained: tuple[TinyFamily, Path]) -> None:
    _, folder = trained
    tensors = load_file(folder / "output" / "lora.safetensors")

    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))


def test_training_goes_on_from_its_state(trained: tuple[TinyFamily, Path]) -> None:
    family, folder = trained
    output = ["--output_dir", "output", "--output_name", "longer", "--seed", "1", "--max_data_loader_n_workers", "0"]

    run_script(*family.train, *output, "--max_train_steps", "5", "--resume", "output/lora-state", folder=folder)
    run_script(*family.train, *output[:2], "--output_name", "whole", *output[4:], "--max_train_steps", "5", folder=folder)

    resumed, whole = (load_file(folder / "output" / f"{name}.safetensors") for name in ("longer", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_sample_is_what_the_generation_script_makes(trained: tuple[TinyFamily, Path]) -> None:
    """Same LoRA, seed and settings, float32: the pictures may differ by one level where rounding falls on the other side."""
    from modules.media import video_frames

    family, folder = trained
    lora = ["--lora_weight", "output/lora.safetensors", "--prompt", "a cat", "--seed", "7"]

    run_script(*family.generate, *SIZE, *lora, "--save_path", "videos", folder=folder)

    (sample,) = sorted((folder / "output" / "sample").glob("*.mp4"))
    (video,) = sorted((folder / "videos").glob("*.mp4"))
    ours, theirs = (torch.stack([torch.from_numpy(frame) for frame in video_frames(path)]) for path in (sample, video))
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs.float()).abs().mean() < 8  # two encoders' settings; the latents are compared in tests/training


CHECKPOINTS = ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--gradient_checkpointing_keep", "attention"]


def test_what_checkpointed_blocks_keep_and_where_changes_nothing(trained: tuple[TinyFamily, Path]) -> None:
    family, folder = trained
    output = ["--output_dir", "output", "--output_name", "checkpointed", *OUTPUT[4:]]

    run_script(*family.train, *output, *CHECKPOINTS, "--max_train_steps", "3", folder=folder)

    plain, checkpointed = (load_file(folder / "output" / f"{name}.safetensors") for name in ("lora", "checkpointed"))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.slow
def test_compiled_training_goes_on_from_its_state(trained: tuple[TinyFamily, Path]) -> None:
    family, folder = trained
    compiled = [*CHECKPOINTS, "--dynamo_backend", "eager", "--dynamo_fullgraph", "--seed", "1", "--max_data_loader_n_workers", "0"]
    train = [*family.train, *compiled, "--output_dir", "compiled", "--output_name"]

    run_script(*train, "part", "--max_train_steps", "2", "--save_state", folder=folder)
    run_script(*train, "resumed", "--max_train_steps", "4", "--resume", "compiled/part-state", folder=folder)
    run_script(*train, "whole", "--max_train_steps", "4", folder=folder)

    resumed, whole = (load_file(folder / "compiled" / f"{name}.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if name.endswith("lora_up.weight"))


@pytest.mark.slow
def test_compiled_generation_makes_the_same_latents(trained: tuple[TinyFamily, Path]) -> None:
    """Float32 weights; rotary turns are multiplied out in another order."""
    family, folder = trained
    options = [*SIZE, "--prompt", "a cat", "--seed", "7", "--output_type", "latent", "--save_path"]

    run_script(*family.generate, *options, "plain", folder=folder)
    run_script(*family.generate, *options, "fast", "--compile", "--compile_args", "eager", "default", "auto", "true", folder=folder)

    found = [load_file(next((folder / name).glob("*.safetensors")))["latent"] for name in ("plain", "fast")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
