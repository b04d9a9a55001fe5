"""fpack_cache_latents.py: what it refuses before anything is loaded, and what it does when a clip, or the
run, is cut short.
"""

from pathlib import Path

import pytest

import fpack_cache_latents
from modules.errors import DatasetError
from modules.media.writing import write_video
from tests.tiny.framepack import write_siglip
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.project import moving_square, write_image

CLIPS = """
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
resolution = [32, 32]
caption_extension = ".txt"
{more}
"""
PICTURES = CLIPS.replace("video_directory", "image_directory").replace("clips", "pictures")


def make_project(folder: Path, **frames: int) -> Path:
    """Clips of so many frames, two pictures and control images for them; the models; the folder."""
    for name in ("clips", "pictures", "control"):
        (folder / name).mkdir(parents=True)
    for seed, (name, count) in enumerate((frames or {"one": 9}).items()):
        write_video(folder / "clips" / f"{name}.mp4", moving_square(count, 32, 32, seed), fps=30)
        (folder / "clips" / f"{name}.txt").write_text(name, encoding="utf-8")
    for name in ("pic", "other"):
        write_image(folder / "pictures" / f"{name}.png", 32, 32)
        write_image(folder / "control" / f"{name}.png", 32, 32)
        (folder / "pictures" / f"{name}.txt").write_text(name, encoding="utf-8")
    write_vae(folder / "vae.safetensors")
    write_siglip(folder / "siglip.safetensors")
    return folder


def arguments(folder: Path, dataset: str, *switches: str, more: str = "") -> list[str]:
    """The words behind the script's name; nothing in them but the dataset file has to exist."""
    config = folder / "dataset.toml"
    config.write_text(
        dataset.format(folder=folder.as_posix(), more=more.format(folder=folder.as_posix())), encoding="utf-8"
    )
    models = ["--vae", str(folder / "vae.safetensors"), "--image_encoder", str(folder / "siglip.safetensors")]
    return ["--dataset_config", str(config), "--device", "cpu", *models, "--vae_dtype", "float32", *switches]


# sections of two latent frames, one or two of them
SHORT = "target_frames = [9, 17]\nfp_latent_window_size = 2"
CONTROL = 'control_directory = "{folder}/control"'


@pytest.mark.parametrize(
    ("dataset", "switches", "more", "message"),
    [
        (CLIPS, (), "", r"target_frames = \[1\], but clips of 1 frames are too short: a section takes 37"),
        (
            CLIPS,
            ("--f1",),
            "target_frames = [33, 73]",
            "clips of 33 frames are too short: a section takes 37",
        ),
        (CLIPS, ("--one_frame",), SHORT, "these are videos"),
        (CLIPS, (), SHORT + '\ncontrol_directory = "{folder}/clips"', "FramePack takes no control video"),
        (PICTURES, (), "", "these are images"),
        (
            PICTURES,
            ("--one_frame",),
            "",
            "needs control images, from which each image is made. Set control_directory",
        ),
        (PICTURES, ("--one_frame",), CONTROL + "\nfp_1f_clean_indices = [0, 10]", "pic_0.png, pic_1.png"),
    ],
)
def test_what_cannot_be_cached_is_named_before_anything_is_loaded(
    tmp_path: Path, dataset: str, switches: tuple[str, ...], more: str, message: str
) -> None:
    folder = make_project(tmp_path / "data")
    for model in folder.glob("*.safetensors"):
        model.unlink()  # what is not there cannot be loaded
    with pytest.raises(DatasetError, match=message) as caught:
        fpack_cache_latents.main(arguments(folder, dataset, *switches, more=more))
    assert "dataset.toml, [[datasets]] 1" in str(caught.value)
    assert not (folder / "cache").exists()
