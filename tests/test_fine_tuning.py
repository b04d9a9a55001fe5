"""Full fine-tuning from the command line of every family: its file is a checkpoint for generation."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from tests.commands import typed_there
from tests.faults.messages import succeed_here
from tests.test_families import SIZE, shown
from tests.tiny.families import FAMILIES, TinyFamily

CHOSEN = ("wan t2v-1.3B", "wan i2v-14B-FC", "hunyuan_video", "framepack", "framepack one frame")
SLOW = ("wan i2v-14B-FC", "framepack one frame")
CASES = [
    pytest.param(each, id=each.name, marks=pytest.mark.slow if each.name in SLOW else ())
    for each in FAMILIES
    if each.name in CHOSEN
]
SEED = ("--seed", "1", "--max_data_loader_n_workers", "0")
OUTPUT = ("--output_dir", "output", *SEED, "--max_train_steps", "3")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", params=CASES)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    """A folder with models and caches."""
    family: TinyFamily = request.param
    folder = tmp_path_factory.mktemp("whole")
    family.prepare(folder)
    (folder / "prompts.txt").write_text(f"{family.sample_line}\n", encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    return family, folder


def whole(family: TinyFamily) -> list[str]:
    """The command that trains the transformer itself."""
    return [family.train_whole, *family.train[1 : family.train.index("--network_module")]]


def test_the_trained_file_is_a_checkpoint_that_generation_loads(project: tuple[TinyFamily, Path]) -> None:
    """The sample made while training is what the script makes of the file, and not of the one before."""
    family, folder = project
    samples = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "3"]
    rate = ["--learning_rate", "1e-2", "--optimizer_type", "adamw"]

    succeed_here(*whole(family), *OUTPUT, "--output_name", "x", *rate, *samples, folder=folder)

    before, after = (load_file(folder / name) for name in ("model/dit.safetensors", "output/x.safetensors"))
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert sum(not torch.equal(after[name], tensor) for name, tensor in before.items()) > 0.9 * len(before)
    with safe_open(folder / "output" / "x.safetensors", "pt") as file:
        assert "lora" not in file.metadata()["modelspec.architecture"]
    page = (folder / "output" / "x.html").read_text(encoding="utf-8")
    page = typed_there(html.unescape(re.sub("<!--.*?-->", "", page)))
    assert f"python {family.train_whole}" in page
    assert f"python {family.generate[0]}" in page
    generate = [*family.generate, *SIZE, "--prompt", "a cat", "--seed", "7"]
    succeed_here(*generate, "--dit", "output/x.safetensors", "--save_path", "videos", folder=folder)
    succeed_here(*generate, "--save_path", "untrained", folder=folder)
    ours, theirs, untrained = (
        shown(folder / name).float() for name in ("output/sample", "videos", "untrained")
    )
    # mean levels of 255, as in test_families; the sample's video differs by its encoder's settings
    assert (ours - theirs).abs().mean() < 6
    assert (ours - untrained).abs().mean() > 12
