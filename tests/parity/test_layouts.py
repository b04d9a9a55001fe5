"""Folders that diffusers itself writes are taken as they are, and give the latents of the official files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import run_script
from tests.parity.running import assert_equal, generate_one
from tests.parity.theirs import Theirs
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan

ASK = (
    *("--prompt", "a red apple", "--seed", 4, "--video_size", 32, 48, "--video_length", 5),
    *("--infer_steps", 3),
)
TASKS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with the official files in `models` and those of diffusers in `pipeline`."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder = tmp_path_factory.mktemp(kind)
            write_tiny_wan(folder / "models", kind)
            write_image(folder / "start.png", 48, 32)
            theirs, pipeline = Theirs(folder / "models"), folder / "pipeline"
            theirs.dit.save_pretrained(pipeline / "transformer", max_shard_size="500KB")
            theirs.vae.save_pretrained(pipeline / "vae")
            theirs.t5.save_pretrained(pipeline / "text_encoder", max_shard_size="20KB")
            theirs.tokenizer.save_pretrained(pipeline / "tokenizer")
            theirs.clip.save_pretrained(pipeline / "image_encoder")
        return made[kind]

    return folder_of


@pytest.mark.parametrize("kind", TASKS)
def test_a_pipeline_of_diffusers_gives_the_same_latents(
    tmp_path: Path, folders: Callable[[str], Path], kind: str
) -> None:
    folder = folders(kind)
    image = ["--image_path", folder / "start.png"] if kind == "i2v" else []
    parts = {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "clip": "image_encoder"}
    given = [word for name, part in parts.items() for word in (f"--{name}", folder / "pipeline" / part)]
    options = ["--task", TASKS[kind], "--save_path", "made", "--output_type", "latent", "--device", "cpu"]
    assert len(list((folder / "pipeline" / "transformer").glob("*-of-*.safetensors"))) > 1

    run_script("wan_generate_video.py", *given, *options, *ASK, *image, folder=tmp_path)

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    expected = generate_one(
        tmp_path / "official", folder / "models", TASKS[kind], *ASK, *image, in_process=True
    )
    assert_equal(load_file(path)["latent"], expected, f"{kind} from diffusers' folders")


def test_a_release_folder_needs_no_other_option(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """--ckpt_dir with the names of the official repository; pickled files."""
    folder = folders("i2v")
    release = tmp_path / "Wan2.1"
    release.mkdir()
    names = {"vae": "Wan2.1_VAE.pth", "t5": "models_t5_umt5-xxl-enc-bf16.pth"}
    names["clip"] = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    for part, name in names.items():
        torch.save(load_file(folder / "models" / f"{part}.safetensors"), release / name)
    (release / "google").symlink_to(folder / "models" / "google")
    save_file(
        load_file(folder / "models" / "dit.safetensors"), release / "diffusion_pytorch_model.safetensors"
    )
    options = [
        *("--ckpt_dir", release, "--dit", release, "--task", "i2v-14B", "--save_path", "made"),
        *("--output_type", "latent"),
    ]
    image = ["--image_path", folder / "start.png"]

    run_script("wan_generate_video.py", *options, *ASK, *image, "--device", "cpu", folder=tmp_path)

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    expected = generate_one(
        tmp_path / "official", folder / "models", "i2v-14B", *ASK, *image, in_process=True
    )
    assert_equal(load_file(path)["latent"], expected, "release folder")
