"""fpack_train_network.py from the command line to its files: what is said of a LoRA, and its samples."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from frame_pack.family import FramePack, family_for_training
from frame_pack.files import FramePackFiles
from frame_pack.options import FramePackTrainingOptions
from modules.contract.loading import Placement
from modules.options import read_options
from modules.parser import add_options
from networks.adapter import make_network
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.loras import make_lora
from tests.training.watched import Watched
from training.options import TrainingOptions, read_arguments, training_parser
from training.samples import prepare_samples

CPU = torch.device("cpu")
OUTPUT = ("--output_name", "lora", "--seed", "1", "--max_data_loader_n_workers", "0")
ProjectOf = Callable[[str], tuple[TinyFamily, Path]]


@pytest.fixture(scope="module")
def project_of(tmp_path_factory: pytest.TempPathFactory) -> ProjectOf:
    """A family's commands, and a folder with its models and caches. Nothing in it may be changed."""
    made: dict[str, tuple[TinyFamily, Path]] = {}

    def find(name: str) -> tuple[TinyFamily, Path]:
        if name not in made:
            family, folder = (
                next(one for one in FAMILIES if one.name == name),
                tmp_path_factory.mktemp("project"),
            )
            family.prepare(folder)
            succeed_here(*family.cache_latents, folder=folder)
            succeed_here(*family.cache_texts, folder=folder)
            made[name] = family, folder
        return made[name]

    return find


def without(command: list[str], option: str) -> list[str]:
    """A command without an option and its value."""
    place = command.index(option)
    return command[:place] + command[place + 2 :]


def sample_latents(tiny: TinyFamily, lora: Path, lines: str, folder: Path) -> list[Tensor]:
    """What a training that continues a LoRA would show at its next samples: 1 16 F h w each.

    For in the project's folder.
    """
    parser = training_parser("")
    add_options(parser, FramePackTrainingOptions)
    args = read_arguments(
        parser, [*tiny.train[1:], "--output_dir", str(folder), *OUTPUT, "--network_weights", str(lora)]
    )
    options, family = (
        read_options(TrainingOptions, args),
        Watched(family_for_training(read_options(FramePackTrainingOptions, args))),
    )
    (folder / "prompts.txt").write_text(f"{lines}\n", encoding="utf-8")
    sampler = prepare_samples(family, folder / "prompts.txt", folder / "sample", "lora", CPU, 0, 1)  # type: ignore[arg-type]
    dit = family.load_dit(Placement(CPU))
    make_network(options.network, family.lora_module, dit, seed=0).module.eval()
    with torch.no_grad():
        sampler.make(lambda _: dit, nullcontext, "000003", lambda: False)
    return family.decoded


def test_a_lora_says_what_it_was_trained_on(project_of: ProjectOf, tmp_path: Path) -> None:
    """Without --network_module it is FramePack's own."""
    family, folder = project_of("framepack")
    unnamed = TinyFamily(**{**vars(family), "train": without(family.train, "--network_module")})
    metadata = ("--metadata_title", "A cat", "--training_comment", "for a test", "--guidance_scale", "8")
    output = (*OUTPUT, "--output_dir", tmp_path, "--max_train_steps", 1)
    succeed_here(*unnamed.train, *output, *metadata, "--min_timestep", "100", folder=folder)

    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_base_model_version"] == "framepack"
    assert found["ss_network_module"] == "networks.lora_framepack"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "1.0")
    assert (found["ss_sd_model_name"], found["ss_vae_name"]) == ("dit.safetensors", "vae.safetensors")
    assert (found["ss_guidance_scale"], found["ss_training_comment"]) == ("8.0", "for a test")
    # sections of clips of 5 and 9 frames
    assert (found["ss_num_train_items"], found["ss_num_batches_per_epoch"]) == ("12", "6")
    (dataset,) = json.loads(found["ss_datasets"])
    assert (dataset["video_directory"], dataset["target_frames"]) == ("clips", [5, 9])
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "framepack/lora"
    assert found["reelsmith_trained_for"] == "videos of FramePack"
    assert found["modelspec.implementation"] == "https://github.com/lllyasviel/FramePack"
    assert (found["modelspec.title"], found["modelspec.resolution"]) == ("A cat", "1280x720")
    assert found["modelspec.timestep_range"] == "100,1000"
    assert len(found["sshs_model_hash"]) == 64


@pytest.fixture(scope="module")
def lora(project_of: ProjectOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with an effect; the transformers of all variants are the same."""
    family = FramePack(FramePackFiles(project_of("framepack")[1] / "model" / "dit.safetensors"))
    network = make_lora("lora_framepack", 4, 4.0, family.load_dit(Placement(CPU)))
    generator = torch.Generator().manual_seed(3)
    drawn = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if tensor.ndim == 2 else tensor
        for name, tensor in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(drawn, path)
    return path


def test_a_line_without_of_is_a_picture_by_default(
    project_of: ProjectOf, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, folder = project_of("framepack one frame")
    monkeypatch.chdir(folder)
    Image.new("RGBA", (32, 32), (200, 100, 50, 0)).save(tmp_path / "nothing.png")
    line = "a cat --w 32 --h 32 --d 7 --s 1 --i start.png"
    controls = f"--ci start.png --ci {tmp_path / 'nothing.png'}"

    lines = [f"{line} --ci start.png{more}" for more in ("", " --of default", " --of target_index=5")]
    lines += [f"{line} {controls} --of no_post,control_index=0;2", f"{line} --ci start.png --of default"]

    silent, default, other, transparent, black = sample_latents(family, lora, "\n".join(lines), tmp_path)

    assert silent.shape == (1, 16, 1, 4, 4)
    assert torch.equal(silent, default)
    assert not torch.equal(silent, other)
    # a control without anything that is seen is the black frame that stands behind the controls by default,
    # at window + 1
    assert torch.equal(transparent, black)
