"""Runs with swapped blocks, from the command lines of the families: their files are those of runs without, to
the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import succeed_here
from tests.tiny.families import TinyFamily, family_called, write_deep
from tests.training.toy import state_tensors

OUTPUT = ("--output_name", "x", "--seed", "1", "--max_data_loader_n_workers", "0")
SIZE = ("--video_size", "32", "32", "--infer_steps", "3", "--guidance_scale", "3")
ADAFACTOR = (
    *("--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"),
)
FUSED = ("--fused_backward_pass", *ADAFACTOR, "--learning_rate", "1e-2", "--max_grad_norm", "0")


@dataclass(frozen=True)
class Project:
    """A folder with models, caches, and blocks enough to swap."""

    family: TinyFamily
    folder: Path
    most: str

    def run(self, script: str, *arguments: object) -> str:
        return succeed_here(script, *arguments, folder=self.folder)

    def train(self, output: Path, *arguments: object, steps: int = 3) -> dict[str, Tensor]:
        """The tensors of the LoRA."""
        self.run(*self.family.train, *OUTPUT, "--output_dir", output, "--max_train_steps", steps, *arguments)
        return load_file(output / "x.safetensors")

    def generate(self, output: Path, *arguments: object) -> list[dict[str, Tensor]]:
        """The latents of all that is made, with those of its sound."""
        latents = ("--output_type", "latent", "--save_path", output)
        self.run(*self.family.generate, *SIZE, *latents, *arguments)
        return [load_file(path) for path in sorted(output.glob("*.safetensors"))]


TWO_LISTS = {"hunyuan_video", "framepack", "hunyuan_image", "flux", "flux_2", "kontext"}  # of blocks


# tests/frame_pack/test_training.py and tests/ltx_2/test_training.py have one of these for every day
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("framepack", "ltx_2 with sound")]
OF_PICTURES = ("lumina", "hunyuan_image", "flux", "kontext", "flux_2", "z_image")
OF_PICTURES += ("qwen_image", "qwen_image edit-2511")
PICTURES = [pytest.param(name, marks=pytest.mark.slow) for name in OF_PICTURES]


@pytest.fixture(scope="module", params=["wan t2v-1.3B", "hunyuan_video", *LATER, *PICTURES])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    family = family_called(request.param)
    folder = tmp_path_factory.mktemp("swap")
    write_deep(family, folder)
    found = Project(family, folder, "4" if family.name in TWO_LISTS else "3")  # all but one of each list
    found.run(*family.cache_latents)
    found.run(*family.cache_texts)
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "usual",
    [
        (),
        ("--gradient_checkpointing", "--fp8_base", "--fp8_scaled"),
        ("--gradient_checkpointing", "--mixed_precision", "bf16"),
    ],
    ids=["kept", "fp8", "bf16"],
)
def test_a_lora_is_trained_to_the_same_bits(project: Project, tmp_path: Path, usual: Sequence[str]) -> None:
    expected = project.train(tmp_path / "plain", *usual)

    found = project.train(
        tmp_path / "swapped", *usual, "--blocks_to_swap", project.most, "--img_in_txt_in_offloading"
    )

    assert same(expected, found)
    assert any(tensor.any() for name, tensor in found.items() if "lora_up" in name)


def test_samples_and_resuming_change_nothing(project: Project, tmp_path: Path) -> None:
    swap = ("--blocks_to_swap", "2", "--gradient_checkpointing")
    (tmp_path / "prompts.txt").write_text(project.family.sample_line, encoding="utf-8")
    samples = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", "2")
    expected = project.train(tmp_path / "plain", "--gradient_checkpointing", steps=4)

    project.train(tmp_path / "first", *swap, *samples, "--save_state", steps=2)
    found = project.train(tmp_path / "second", *swap, "--resume", tmp_path / "first" / "x-state", steps=4)

    assert same(expected, found)


@pytest.mark.parametrize("usual", [(), ("--fp8", "--fp8_scaled")], ids=["plain", "fp8"])
def test_the_same_latents_are_generated(project: Project, tmp_path: Path, usual: Sequence[str]) -> None:
    """Two videos, one after the other."""
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat --d 5\na dog --d 6 --s 2\n", encoding="utf-8")

    expected = project.generate(tmp_path / "plain", "--from_file", lines, *usual)
    swap = ("--blocks_to_swap", project.most, "--img_in_txt_in_offloading")
    found = project.generate(tmp_path / "swapped", "--from_file", lines, *usual, *swap)

    assert len(found) == 2
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="float32", marks=pytest.mark.slow),
        pytest.param(("--full_bf16", "--mixed_precision", "bf16", "--gradient_checkpointing"), id="bf16"),
    ],
)
def test_a_whole_transformer_is_trained_to_the_same_bits(
    project: Project, tmp_path: Path, more: Sequence[str]
) -> None:
    """Saved in between, resumed, and sampled from; both the file and the state hold what the blocks have
    learned.
    """
    if not project.family.train_whole:
        pytest.skip("no script trains the whole transformer")
    models = project.family.train[1 : project.family.train.index("--network_module")]
    (tmp_path / "prompts.txt").write_text(project.family.sample_line, encoding="utf-8")
    samples = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", "2")

    def train(name: str, *arguments: object, steps: int = 4) -> dict[str, Tensor]:
        output = ("--output_dir", tmp_path / name, "--max_train_steps", steps)
        project.run(project.family.train_whole, *models, *OUTPUT, *FUSED, *more, *output, *arguments)
        return load_file(tmp_path / name / "x.safetensors")

    expected = train("plain")
    swapped = train(
        "swapped", "--blocks_to_swap", project.most, *samples, "--save_every_n_steps", 2, "--save_state"
    )
    state = tmp_path / "swapped" / "x-step00000002-state"
    resumed = train("resumed", "--blocks_to_swap", 1, "--resume", state)

    assert same(expected, swapped)
    assert same(expected, resumed)
    between = load_file(tmp_path / "swapped" / "x-step00000002.safetensors")
    assert same(between, train("short", steps=2))
    assert same(between, state_tensors(state)["dit"])
