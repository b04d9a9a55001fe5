"""Targets and kinds of networks in two processes: what they learn is what one process does with twice the
accumulation, a resumed run ends with equal bytes, and so does one whose processes share the transformer.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from modules.media.writing import write_video
from tests.commands import run_in_processes
from tests.test_targets_by_command import SLIDER, write_teacher
from tests.tiny.families import family_called, write_deep
from tests.tiny.project import write_clips
from tests.tiny.runs import TinyProject, make_project
from tests.training.toy import same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries"),
]

# three micro-batches: the second process lacks one in the last step of each epoch
RUN = (
    *("--output_name", "x", "--seed", "1", "--max_data_loader_n_workers", "0", "--no_page"),
    *("--learning_rate", "1", "--max_train_steps", "4", "--validation_split", "0.25"),
    *("--optimizer_type", "SGD", "--max_grad_norm", "0"),
)
STATES = ("--save_state", "--save_every_n_steps", "2")
DATASET = """[general]
resolution = [32, 32]
caption_extension = ".txt"
caption_dropout_rate = 0.3

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [5]
worse_directory = "worse"

[[datasets]]
video_directory = "masked"
cache_directory = "masked cache"
target_frames = [5]
mask_directory = "masks"
worse_directory = "worse"
network_multiplier = -0.5
"""
TEACHER = ("--teacher", "dit", "--teacher_lora", "base/x.safetensors", "--teacher_weight", "0.7")
WAYS = {
    "guided": ("--guided_target", "3", "--guided_target_min_timestep", "200"),
    "priors": ("--blank_prior_weight", "0.5", "--mask_prior_weight", "0.5"),
    "teacher": (
        *("--teacher", "base", "--teacher_max_timestep", "600", "--teacher_split"),
        *("--teacher_colour_weight", "0.3"),
    ),
    "trained teacher": (*TEACHER, "--teacher_delta"),
    "tread": ("--tread", "0.5", "--tread_blocks", "1", "-2"),
    "oft": ("--network_module", "networks.oft", "--network_dim", "8"),
    "tlora": ("--network_args", "tlora=True"),
    "slider": ("--slider", "slider.toml", "--t5", "model/t5.safetensors"),
    "preference": ("--preference", "2000", "--preference_data_weight", "0.5"),
}
ALONE = {"other teacher": (*TEACHER, "--teacher_dit", "teacher.safetensors")}  # it cannot be split


def write_pairs(family: Any, folder: Path) -> None:
    """Write models of four blocks and clips in two folders, each with a worse one; two of four have masks."""
    write_deep(family, folder, partial(write_clips, count=2))
    write_clips(folder / "masked", count=2)
    for folder_name in ("clips", "masked"):
        for index in range(2):
            for suffix in (".mp4", ".txt"):
                old = folder / folder_name / f"clip {index}{suffix}"
                old.rename(old.with_name(f"{folder_name} {index}{suffix}"))
    random = numpy.random.default_rng(7)
    (folder / "worse").mkdir()
    for path in [*(folder / "clips").glob("*.mp4"), *(folder / "masked").glob("*.mp4")]:
        frames = random.integers(0, 256, (9, 48, 48, 3), dtype=numpy.uint8)
        write_video(folder / "worse" / path.name, list(frames), 16)
    (folder / "masks").mkdir()
    mask = numpy.zeros((48, 48), numpy.uint8)
    mask[:, :30] = 255
    for path in (folder / "masked").glob("*.mp4"):
        Image.fromarray(mask).save(folder / "masks" / f"{path.stem}.png")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (folder / "slider.toml").write_text(SLIDER, encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With a LoRA to learn from, `base/x.safetensors`."""
    made = make_project(family_called("wan t2v-1.3B"), tmp_path_factory.mktemp("two"), write=write_pairs)
    made.run(*made.family.cache_texts, "--empty_prompt")
    made.train("base", "--learning_rate", "1e-2")
    write_teacher(made)
    return made


@pytest.fixture(scope="module")
def plain(project: TinyProject) -> dict[str, Tensor]:
    """Return what a run without any of these learns."""
    return project.train("plain", *RUN, "--gradient_accumulation_steps", "2")


def train_both(project: TinyProject, output: str, *words: str) -> dict[str, Tensor]:
    """Train in two processes; return the tensors of the file."""
    command = (*project.family.train, *RUN, "--output_dir", output, *words)
    run_in_processes(2, *command, folder=project.folder)
    return load_file(project.folder / output / "x.safetensors")


@pytest.mark.parametrize("way", [*WAYS, *ALONE])
def test_two_processes_learn_what_one_does_and_go_on_with_equal_bytes(
    project: TinyProject, plain: dict[str, Tensor], way: str
) -> None:
    words = {**WAYS, **ALONE}[way]
    alone = project.train(f"{way} alone", *RUN, *words, "--gradient_accumulation_steps", "2")
    assert not same(alone, plain)

    both = train_both(project, f"{way} both", *words, *STATES)

    largest = max(float(tensor.abs().max()) for tensor in alone.values())
    for name, tensor in alone.items():
        # sums of other orders
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-6 * largest)
    resume = ("--resume", f"{way} both/x-step00000002-state")
    assert same(train_both(project, f"{way} resumed", *words, *resume), both)


@pytest.mark.parametrize("way", WAYS)
def test_processes_that_share_the_transformer_learn_the_same(project: TinyProject, way: str) -> None:
    """They run equal passes, also where a level, a mask or a slider's anchor needs one in one of them."""
    expected = train_both(project, f"{way} whole", *WAYS[way])

    assert same(train_both(project, f"{way} shared", *WAYS[way], "--shard_base"), expected)
