"""fpack_cache_latents.py: what it refuses before anything is loaded, and what it does when a clip, or the
run, is cut short.
"""

from pathlib import Path

import pytest
from safetensors import safe_open

import fpack_cache_latents
from modules.errors import DatasetError, OptionError
from modules.media.writing import write_video
from tests.commands import assert_user_error, run_script
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


@pytest.mark.parametrize("missing", ["--vae", "--image_encoder"])
def test_encoders_are_needed_but_to_look_and_to_check(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_project(tmp_path / "data", one=20)
    given = arguments(folder, CLIPS, more=SHORT)
    place = given.index(missing)
    without = [*given[:place], *given[place + 2 :]]
    with pytest.raises(OptionError, match=missing):
        fpack_cache_latents.main(without)
    fpack_cache_latents.main([*without, "--debug_mode", "video"])
    assert sorted(path.name for path in (folder / "debug_views").iterdir()) == [
        "0_one_00000-009.mp4",
        "0_one_00000-017.mp4",
    ]
    with pytest.raises(SystemExit) as ended:
        fpack_cache_latents.main([*without, "--check"])
    assert ended.value.code == 0
    assert "32x32, 5 frames: 3 items x 1" in capsys.readouterr().out  # sections
    assert not (folder / "cache").exists()


def test_a_short_clip_is_named_and_the_others_are_cached(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "my data", long=21, short=8)
    more = 'frame_extraction = "full"\nfp_latent_window_size = 2'
    done = run_script("fpack_cache_latents.py", *arguments(folder, CLIPS, more=more), check=False)
    assert_user_error(
        done,
        "1 of the sources",
        "short.mp4",
        "5 usable frames (4 n + 1 of the clip's) are too few: a section takes 9, 4 x 2",
    )
    assert files(folder) == [f"long_00000-021-000{section}_0032x0032_fp.safetensors" for section in range(2)]


def test_another_window_order_or_place_makes_files_again(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "data", one=17)
    by_run = []
    for switches, window in (((), 2), ((), 2), (("--f1",), 2), ((), 4), ((), 1)):
        more = f"target_frames = [17]\nfp_latent_window_size = {window}"
        fpack_cache_latents.main(arguments(folder, CLIPS, *switches, "--keep_cache", more=more))
        by_run.append({name: (folder / "cache" / name).stat().st_mtime_ns for name in files(folder)})
    assert by_run[0] == by_run[1]
    assert [len(run) for run in by_run] == [2, 2, 2, 1, 4]
    for before, after in zip(by_run[1:], by_run[2:], strict=False):
        assert not {*before.items()} & {*after.items()}


def test_the_switches_and_keys_of_one_frame_make_files_again(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "data")
    keys = (
        "",
        "fp_1f_clean_indices = [3]",
        "fp_1f_target_index = 3",
        "fp_1f_no_post = true",
        "fp_latent_window_size = 8",
    )
    runs: list[tuple[tuple[str, ...], str]] = [(("--one_frame",), key) for key in keys]
    runs += [(("--one_frame", f"--one_frame_no_{kind}"), keys[0]) for kind in ("2x", "4x")]
    seen = set()
    for switches, key in runs:
        fpack_cache_latents.main(arguments(folder, PICTURES, *switches, more=f"{CONTROL}\n{key}"))
        with safe_open(folder / "cache" / "pic_0032x0032_fp.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if "indices" in name]  # noqa: SIM118
            numbers = [f"{name} {file.get_tensor(name).tolist()}" for name in names]
            seen.add(
                " ".join([*sorted(numbers), str(file.get_slice("latents_clean_1x4x4_float32").get_shape())])
            )
    assert len(seen) == len(runs)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())
