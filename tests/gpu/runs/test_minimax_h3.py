"""MiniMax-H3 from its command lines, pictures and sound in one sequence: a device's results are the CPU's,
and what saves memory changes no bit.

Caches are written with random numbers, so that no machine needs FFmpeg; heads are as wide as released ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.stored.fp8_products import supports_fp8
from modules.media.reading import read_image
from protocols.data import AUDIO_LATENTS
from tests.gpu.measuring import equal_bits, relative_error
from tests.gpu.runs.project import CPU, ON_GPU, OUTPUT, Trained, read_trained, run
from tests.gpu.runs.test_training import (
    BF16,
    CHECKPOINTED,
    FP8,
    KEPT,
    OFFLOADED,
    assert_same,
)
from tests.gpu.runs.test_waits import Waits, waits  # noqa: F401  # a fixture
from tests.minimax_h3.caches import random_clip, write_caches
from tests.minimax_h3.tiny_dit import released, their_dit
from tests.tiny.language_models import DIM
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3

pytestmark = ON_GPU

SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 256},
    **{"time_embed_dim": 64, "text_dim": DIM, "num_layers": 4},
}
INT8 = ("--convrot_int8",)
SWAP = ("--blocks_to_swap", "2")  # of 4, the most
PRECISIONS = {"float32": (), "bf16": BF16, "fp8": (*BF16, *FP8), "int8": (*BF16, *INT8)}
CLIP = ("--video_size", "32", "64", "--video_length", "22", "--allow_experimental_duration")


@dataclass(frozen=True)
class H3Project:
    """A folder with a tiny model and caches of clips, of which one has no sound."""

    folder: Path
    files: TinyH3

    def train(self, device: torch.device, name: str, *arguments: object, steps: int = 4) -> Trained:
        words = ("--dit", self.files.dit, "--dataset_config", "dataset.toml", "--sdpa", "--network_dim", 4)
        rate = ("--learning_rate", "1e-3", "--max_train_steps", steps)
        run(
            self.folder,
            device,
            "minimax_h3_train_network.py",
            *(*words, *rate, *OUTPUT, name, *arguments),
        )
        return read_trained(self.folder / "output", name)

    def generate(self, device: torch.device, folder: Path, *arguments: object) -> dict[str, Tensor]:
        """Return the latents of pictures and of sound, from noise of the CPU."""
        shown = ("--prompt", "a cat", "--infer_steps", 3, "--seed", 7, "--output_type", "latent")
        self.make(device, folder, *shown, "--cpu_noise", *CLIP, *arguments)
        (path,) = folder.glob("*_latent.safetensors")
        return load_file(path)

    def make(self, device: torch.device, folder: Path, *arguments: object) -> None:
        where = ("--device", device, "--save_path", folder)
        run(self.folder, device, "minimax_h3_generate_video.py", *self.files.words, *where, *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> H3Project:
    folder = tmp_path_factory.mktemp("h3")
    files = write_tiny_h3(folder / "model")
    save_file(released(their_dit(**SIZES).state_dict()), files.dit)
    clips = {name: random_clip(seed, is_heard=name != "b") for seed, name in enumerate("abcd")}
    write_caches(folder, clips)
    return H3Project(folder, files)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[], Path]:
    """Return a new folder at each call."""
    numbers = iter(range(1000))
    return lambda: tmp_path / str(next(numbers))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_are_those_of_the_cpu(project: H3Project, device: torch.device, precision: str) -> None:
    words = PRECISIONS[precision]
    ours, theirs = (project.train(where, where.type, *words) for where in (device, CPU))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-2 if words else 1e-4)
    assert all(tensor.isfinite().all() for tensor in ours.tensors.values())


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_what_saves_memory_changes_no_bit(project: H3Project, device: torch.device, precision: str) -> None:
    words = PRECISIONS[precision]
    expected = project.train(device, "plain", *words)
    for options in (CHECKPOINTED, OFFLOADED, KEPT, SWAP, (*OFFLOADED, *SWAP), (*OFFLOADED, *KEPT, *SWAP)):
        assert_same(project.train(device, "saving", *words, *options), expected)


@pytest.mark.usefixtures("repeatable")
def test_pictures_alone_are_learned_with_sound_beside_them(project: H3Project, device: torch.device) -> None:
    """The network hears the sound, of whose loss nothing is learned."""
    both = project.train(device, "both", *BF16)
    alone = project.train(device, "alone", *BF16, "--video_only")
    assert not all(equal_bits(alone.tensors[name], tensor) for name, tensor in both.tensors.items())
    theirs = project.train(CPU, "cpu", *BF16, "--video_only")
    assert alone.losses == pytest.approx(theirs.losses, rel=1e-2)


def test_fp8_products_give_nearly_the_losses_of_fp8_weights(project: H3Project, device: torch.device) -> None:
    if not supports_fp8(device):
        pytest.skip(f"{device} has no fp8 units")
    expected = project.train(device, "weights", *BF16, *FP8)
    found = project.train(device, "products", *BF16, *FP8, "--fp8_fast")
    assert found.losses == pytest.approx(expected.losses, rel=5e-2)
    assert found.losses != expected.losses


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_compiled_blocks_give_the_losses_of_eager_ones(
    project: H3Project, device: torch.device, precision: str
) -> None:
    words = PRECISIONS[precision]
    expected = project.train(device, "eager", *words, *CHECKPOINTED)
    found = project.train(device, "compiled", *words, *OFFLOADED, *KEPT, "--compile")
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


def waits_inside(waits: Waits) -> list[str]:  # noqa: F811
    """Return where the host waited, except for the noise levels before the first block.

    They decide which tokens share an embedded time. The host reads them once in a pass.
    """
    return [place for place in waits.places if not place.endswith(".tolist()")]


@pytest.mark.parametrize("saves", [False, True], ids=["plain", "saves memory"])
def test_training_waits_for_no_block(
    project: H3Project,
    device: torch.device,
    saves: bool,
    waits: Waits,  # noqa: F811
) -> None:
    saving = (*INT8, *SWAP, *OFFLOADED) if saves else ()
    project.train(device, "waits", *BF16, *saving, steps=6)
    assert waits.steps == 6
    assert sorted(set(waits_inside(waits))) == []


@pytest.mark.parametrize("saves", [False, True], ids=["plain", "saves memory"])
def test_denoising_waits_for_no_block(
    project: H3Project,
    device: torch.device,
    saves: bool,
    waits: Waits,  # noqa: F811
    made: Callable[[], Path],
) -> None:
    project.generate(device, made(), "--infer_steps", 6, *(SWAP if saves else ()))
    assert waits.steps >= 6
    assert sorted(set(waits_inside(waits))) == []


@pytest.mark.parametrize("form", [(), ("--fp8_scaled",), INT8], ids=["float32", "fp8", "int8"])
def test_pictures_and_sound_are_those_of_the_cpu(
    project: H3Project, device: torch.device, form: tuple[str, ...], made: Callable[[], Path]
) -> None:
    """The text encoder is in float32 on both."""
    ours, theirs = (project.generate(where, made(), *form) for where in (device, CPU))
    for name in ("latent", AUDIO_LATENTS):
        assert relative_error(ours[name], theirs[name]) < (5e-2 if form else 2e-4), name


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("form", [(), INT8], ids=["float32", "int8"])
def test_swapped_blocks_change_no_bit(
    project: H3Project, device: torch.device, form: tuple[str, ...], made: Callable[[], Path]
) -> None:
    plain = project.generate(device, made(), *form)
    swapped = project.generate(device, made(), *form, *SWAP)
    assert all(equal_bits(swapped[name], tensor) for name, tensor in plain.items())


def test_a_picture_is_decoded_as_on_the_cpu(
    project: H3Project, device: torch.device, made: Callable[[], Path]
) -> None:
    """Two levels of 255."""
    one = ("--prompt", "a cat", "--video_size", "32", "64", "--video_length", 1, "--seed", 7, "--cpu_noise")
    latents = made()
    project.make(CPU, latents, *one, "--infer_steps", 2, "--output_type", "latent")
    (path,) = latents.glob("*_latent.safetensors")
    images = []
    for where in (device, CPU):
        folder = made()
        project.make(where, folder, "--latent_path", path, "--output_type", "images")
        (image,) = folder.rglob("*.png")
        images.append(read_image(image).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 2
    assert images[1].std() > 1
