"""Training of Stable Diffusion from its command lines: a device's losses are the CPU's, in each precision and
with each attention, and no step waits.

The pictures of gen_img.py are compared in test_generation.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.gpu.measuring import equal_bits
from tests.gpu.runs.project import CPU, ON_GPU, OUTPUT, Trained, read_trained, run
from tests.gpu.runs.test_training import BF16, CHECKPOINTED, OFFLOADED
from tests.gpu.runs.test_waits import Waits, waits  # noqa: F401  # a fixture
from tests.gpu.test_attention import require
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl

pytestmark = ON_GPU

SCRIPTS = {"sd1": "train_network.py", "sdxl": "sdxl_train_network.py"}
WRITERS = {"sd1": write_sd1, "sdxl": write_sdxl}
# a batch of two: cuDNN gave NaN for gradients of several samples (modules/attention/sdpa.py)
DATASET = """[general]
resolution = 64
caption_extension = ".txt"
shuffle_caption = {shuffles}

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"
"""
CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--dataset_config", "plain.toml")
LEARNING_TEXTS = ("--dataset_config", "dataset.toml", "--text_encoder_lr", "1e-3")
PRECISIONS = {
    "float32": (CACHED, 1e-4),
    "bf16": ((*CACHED, *BF16), 1e-2),
    "fp8": ((*CACHED, *BF16, "--fp8_base"), 1e-2),
    "texts learn": (LEARNING_TEXTS, 1e-3),
    "texts learn in bf16": ((*LEARNING_TEXTS, *BF16), 1e-2),
    "all options of noise": (
        (*CACHED, "--noise_offset", "0.1", "--min_snr_gamma", "5", "--multires_noise_iterations", "2"),
        1e-3,
    ),
}
WAYS = {"flash": "--flash_attn", "flash3": "--flash3", "xformers": "--xformers"}


@dataclass(frozen=True)
class ImageProject:
    """A folder with a tiny checkpoint, and pictures with captions."""

    kind: str
    folder: Path

    def train(self, device: torch.device, name: str, *arguments: object, steps: int = 4) -> Trained:
        files = (
            "--pretrained_model_name_or_path",
            "model.safetensors",
            "--tokenizer_cache_dir",
            "tokenizers",
        )
        learning = ("--network_dim", 4, "--learning_rate", "1e-3", "--max_train_steps", steps)
        words = (*files, "--cache_latents", *learning, *OUTPUT, name, *arguments)
        run(self.folder, device, SCRIPTS[self.kind], *words)
        return read_trained(self.folder / "output", name)


@pytest.fixture(scope="module", params=SCRIPTS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageProject:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET.format(shuffles="true"), encoding="utf-8")
    (folder / "plain.toml").write_text(DATASET.format(shuffles="false"), encoding="utf-8")
    tokenizer_folder(folder / "tokenizers")
    WRITERS[request.param](folder, name="model.safetensors")
    return ImageProject(request.param, folder)


@pytest.mark.parametrize("case", PRECISIONS)
def test_losses_are_those_of_the_cpu(project: ImageProject, device: torch.device, case: str) -> None:
    words, bar = PRECISIONS[case]
    ours, theirs = (project.train(where, where.type, *words) for where in (device, CPU))
    assert ours.losses == pytest.approx(theirs.losses, rel=bar)
    assert all(tensor.isfinite().all() for tensor in ours.tensors.values())


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_checkpointing_changes_no_bit(project: ImageProject, device: torch.device, precision: str) -> None:
    words, _ = PRECISIONS[precision]
    expected = project.train(device, "plain", *words)
    for options in (CHECKPOINTED, OFFLOADED):
        found = project.train(device, "saving", *words, *options)
        assert found.losses == expected.losses
        assert all(equal_bits(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("mode", WAYS)
def test_losses_with_packages_for_attention(project: ImageProject, device: torch.device, mode: str) -> None:
    """Those of torch's own attention. Where a package is missing, nothing else is tested."""
    if device.type != "cuda":
        pytest.skip("these packages need CUDA")
    require(mode, device)
    expected = project.train(device, "torch", *CACHED, *BF16)
    found = project.train(device, mode, *CACHED, *BF16, WAYS[mode])
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


@pytest.mark.usefixtures("repeatable")
def test_samples_of_a_batch_one_by_one_change_no_loss(project: ImageProject, device: torch.device) -> None:
    expected = project.train(device, "together", *CACHED)
    found = project.train(device, "split", *CACHED, "--split_attn")
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_compiled_blocks_give_the_losses_of_eager_ones(project: ImageProject, device: torch.device) -> None:
    expected = project.train(device, "eager", *CACHED, *BF16, *CHECKPOINTED)
    found = project.train(device, "compiled", *CACHED, *BF16, *CHECKPOINTED, "--compile")
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)


@pytest.mark.parametrize("saves", [False, True], ids=["plain", "saves memory"])
def test_training_waits_nowhere(
    project: ImageProject,
    device: torch.device,
    saves: bool,
    waits: Waits,  # noqa: F811
) -> None:
    saving = ("--fp8_base", *OFFLOADED) if saves else ()
    project.train(device, "waits", *CACHED, *BF16, *saving, steps=6)
    assert waits.steps == 6
    assert waits.places == []


def test_a_sample_is_drawn_while_training(project: ImageProject, device: torch.device) -> None:
    """At the start, by the released text encoders, which then leave the device."""
    line = project.folder / "samples.txt"
    line.write_text("a (red:1.2) cat --w 64 --h 64 --s 3 --d 1\n", encoding="utf-8")
    samples = ("--sample_prompts", line, "--sample_at_first", "--sample_sampler", "euler_a")
    project.train(device, "sampled", *CACHED, *BF16, *samples, steps=2)
    assert list((project.folder / "output" / "sample").glob("*.png"))
