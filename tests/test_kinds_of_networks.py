"""T-LoRA and OFT from the command line to files: trained in every family, sampled, generated, converted."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_fp8 import CHOSEN, difference
from tests.tiny.families import FAMILIES
from tests.tiny.runs import RUN, SIZE, TinyProject, make_project

OFT = ["--network_module", "networks.oft", "--network_dim", "8", "--network_alpha", "1"]
TLORA = ["--network_args", "tlora=True", "tlora_min_rank=1", "tlora_alpha=1"]
UPS = ("lora_up.weight", "lora_B.weight")


@pytest.fixture(scope="module", params=CHOSEN)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With batches of two samples where a family has enough of one size."""
    project = make_project(request.param, tmp_path_factory.mktemp("kinds"))
    data = project.folder / "dataset.toml"
    data.write_text(data.read_text("utf-8").replace("batch_size = 1", "batch_size = 2"), encoding="utf-8")
    return project


def together(project: TinyProject, output: str, *words: object) -> dict[str, Tensor]:
    """The latents of one generation, of picture and sound."""
    shutil.rmtree(project.folder / output, ignore_errors=True)
    (latents,) = project.generate(output, "--prompt", "a cat", "--seed", "7", *words)
    return {name: tensor.float() for name, tensor in latents.items()}


def rewrite(path: Path, output: Path, **metadata: str) -> None:
    """Copy a file with other metadata."""
    with safe_open(path, "pt") as file:
        stored = dict(file.metadata())
    save_file(load_file(path), output, {**stored, **metadata})


def as_json(arguments: Mapping[str, str]) -> str:
    return json.dumps(dict(arguments))


@pytest.mark.slow_cases("wan t2v-1.3B")
def test_a_tlora_is_generated_with_its_masks(project: TinyProject) -> None:
    tensors = project.train("tlora", *TLORA)
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(UPS))
    path, folder = project.folder / "tlora" / "x.safetensors", project.folder
    found = together(project, "masked", "--lora_weight", path)
    # with a rule by which all ranks act, and merged
    all_ranks = {"tlora": "True", "tlora_min_rank": "4"}
    rewrite(path, folder / "all.safetensors", ss_network_args=as_json(all_ranks))
    rewrite(path, folder / "plain.safetensors", ss_network_args="{}")
    beside = together(project, "beside", "--lora_weight", folder / "all.safetensors")
    merged = together(project, "merged", "--lora_weight", folder / "plain.safetensors")
    plain = together(project, "plain")

    effect = difference(merged, plain)
    assert effect > 0
    rounding = difference(beside, merged)
    assert rounding < 0.05 * effect
    assert difference(found, merged) > 3 * rounding


@pytest.mark.slow_cases("wan t2v-1.3B")
def test_an_oft_is_generated_as_trained(project: TinyProject) -> None:
    tensors = project.train("oft", *OFT, "--learning_rate", "1e-2")
    assert all(name.endswith(".oft_R.weight") for name in tensors)
    assert sum(bool(tensor.any()) for tensor in tensors.values()) > len(tensors) / 2
    path, folder = project.folder / "oft" / "x.safetensors", project.folder
    found = together(project, "merged oft", "--lora_weight", path)
    plain = together(project, "plain")
    effect = difference(found, plain)
    assert effect > 0

    project.run(
        "convert_lora.py", "--input", path, "--output", folder / "peft.safetensors", "--target", "diffusers"
    )
    assert all(name.startswith("base_model.model.") for name in load_file(folder / "peft.safetensors"))
    converted = together(project, "converted", "--lora_weight", folder / "peft.safetensors")
    assert difference(converted, found) < 1e-3 * effect
    back = [
        "--input",
        folder / "peft.safetensors",
        "--output",
        folder / "back.safetensors",
        "--target",
        "default",
    ]
    project.run("convert_lora.py", *back)
    ours = load_file(folder / "back.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["oft", "tlora"])
def test_small_bases_and_plans_take_them(tmp_path: Path, kind: str) -> None:
    """Next to weights in 8 bits, in training, samples and generation; memory is planned with them."""
    project = make_project(FAMILIES[0], tmp_path)
    words = {"oft": [*OFT, "--learning_rate", "1e-2"], "tlora": TLORA}[kind]
    samples = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3"]
    project.train("small", *words, "--convrot_int8", *samples)
    project.run(*project.family.train, *RUN, "--output_dir", "planned", *words, "--plan")
    lora = ["--lora_weight", "small/x.safetensors"]
    small = together(project, "small clip", *lora, "--convrot_int8")
    full = together(project, "whole clip", *lora)
    plain = together(project, "plain clip")
    assert difference(small, full) < 0.5 * difference(full, plain)
    project.run(*project.family.generate, *SIZE, "--prompt", "a cat", "--save_path", "x", *lora, "--plan")
    both = ["--base_weights", "small/x.safetensors", "--sample_lora", "small/x.safetensors", *samples]
    assert project.train("again", *words, *both)
