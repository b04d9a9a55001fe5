"""Training Wan2.2 A14B through the scripts: samples of both transformers are what generation makes."""

import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modules.media.reading import read_image
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.wan import write_tiny_wan

LOW, HIGH = ["--dit", "model/dit.safetensors"], ["--dit_high_noise", "model/dit_high.safetensors"]
ENCODERS = ["--vae", "model/vae.safetensors", "--t5", "model/t5.safetensors"]
TASK = ["--task", "t2v-A14B", "--timestep_boundary", "0.8"]
TRAIN = [
    *("wan_train_network.py", *TASK, *ENCODERS, "--dataset_config", "dataset.toml", "--sdpa"),
    *("--network_dim", "4", "--learning_rate", "1e-1", "--output_dir", "output", "--output_name", "lora"),
    *("--seed", "1", "--max_data_loader_n_workers", "0", "--max_train_steps", "4"),
    *("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "4", "--sample_at_first"),
]
GENERATE = [
    *("wan_generate_video.py", *TASK, *LOW, *HIGH, *ENCODERS, "--video_size", "32", "32", "--video_length"),
    *("1", "--infer_steps", "4", "--flow_shift", "5", "--prompt", "a cat", "--seed", "7"),
    *("--guidance_scale", "3", "--guidance_scale_high_noise", "3"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two experts")
    write_tiny_wan(folder / "model", experts=2)
    write_clips(folder / "clips")
    write_dataset(folder)
    (folder / "prompts.txt").write_text(
        "a cat --w 32 --h 32 --f 1 --d 7 --s 4 --fs 5 --l 3\n", encoding="utf-8"
    )
    caching = ["--dataset_config", "dataset.toml"]
    succeed_here("wan_cache_latents.py", *caching, *ENCODERS[:2], "--vae_dtype", "float32", folder=folder)
    succeed_here("wan_cache_text_encoder_outputs.py", *caching, *ENCODERS[2:], folder=folder)
    return folder


def samples(folder: Path) -> list[Tensor]:
    """The pictures before the first step and after the last."""
    found = [
        [*(folder / "output" / "sample").glob(f"lora_{mark}_00_*.png")] for mark in ("e000000", "000004")
    ]
    return [picture(path) for (path,) in found]


def picture(path: Path) -> Tensor:
    return torch.as_tensor(read_image(path)).int()


def generated(folder: Path, name: str, *arguments: str) -> Tensor:
    succeed_here(*GENERATE, *arguments, "--save_path", name, folder=folder)
    (path,) = (folder / name).rglob("*.png")
    return picture(path)


def generated_as_told(folder: Path, name: str, said: str) -> Tensor:
    """The picture that the command of the last box makes."""
    lines = said.splitlines()
    (line,) = (lines[index + 1] for index, each in enumerate(lines) if each.startswith("Generate with it"))
    succeed_here(*shlex.split(line)[1:], folder=folder)
    (path,) = (folder / name / "output" / "generated").rglob("*.png")
    return picture(path)


CASES = {
    "shared": ([*LOW, *HIGH], ["lora"] * 2),
    "apart": (
        [*LOW, *HIGH, "--lora_per_expert", "--offload_inactive_dit"],
        ["lora_low_noise", "lora_high_noise"],
    ),
    "low": ([*LOW, "--sample_dit_other", HIGH[1]], ["lora", None]),
    "high": ([*HIGH, "--sample_dit_other", LOW[1]], [None, "lora"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "high")) for name in CASES]
)
def test_a_sample_is_what_the_generation_script_makes(project: Path, name: str) -> None:
    options, files = CASES[name]
    said = succeed_here(*TRAIN, *options, "--output_dir", f"{name}/output", folder=project)
    first, last = samples(project / name)

    words = []
    for option, file in zip(("--lora_weight", "--lora_weight_high_noise"), files, strict=True):
        words += [] if file is None else [option, f"{name}/output/{file}.safetensors"]
    assert torch.equal(first, generated(project, f"{name}/before"))
    # float32 sums in another order: the LoRA is merged there and added here
    assert (last - generated(project, f"{name}/after", *words)).abs().max() <= 1
    assert (last - first).abs().float().mean() > 3
    assert (last - generated_as_told(project, name, said)).abs().max() <= 1
    for file in {file for file in files if file is not None}:
        with safe_open(project / name / "output" / f"{file}.safetensors", "pt") as opened:
            expert = opened.metadata().get("ss_wan_expert")
        assert expert == {"shared": "both", "apart": file[5:].removesuffix("_noise"), "low": None}.get(
            name, name
        )
    assert ("--min_timestep 200 --preserve_distribution_shape" in said) == (name == "low")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*LOW, *HIGH, "--sample_dit_other", LOW[1]], ["--sample_dit_other", "Leave it out"]),
        ([*LOW, "--sample_dit_other", LOW[1]], ["this one is trained"]),
        ([*LOW, "--task", "t2v-14B", "--sample_dit_other", HIGH[1]], ["--task t2v-14B has one transformer"]),
        ([*LOW, "--lora_per_expert"], ["--lora_per_expert needs two transformers"]),
        ([*LOW, *HIGH, "--network_args", "dora_wd=True"], ["--lora_per_expert"]),
        (
            [*LOW, *HIGH, "--timestep_sampling", "uniform", "--max_timestep", "700"],
            ["high-noise transformer"],
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(project: Path, arguments: list[str], words: list[str]) -> None:
    code, said = run_here(*TRAIN, *arguments, "--output_dir", "refused", folder=project)
    assert code in {1, 2}
    assert_one_message(code, said, *words)
