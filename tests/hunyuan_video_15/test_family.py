"""What HunyuanVideo 1.5 settles for a request and a training, and what it refuses before anything loads."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from safetensors.torch import load_file

from hunyuan_video_15.configs import LARGE, SMALL, nearest_size
from hunyuan_video_15.options import find_task, release_name
from modules.media.reading import video_frames
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import family_called
from tests.tiny.hunyuan_dit import tiny_state as old_state
from tests.tiny.hunyuan_dit import write_dit as write_old_dit
from tests.tiny.hunyuan_video_15 import TinyHunyuanVideo15, tiny_state, write_dit, write_tiny_hunyuan_video_15
from tests.tiny.project import write_image
from tests.tiny.runs import make_project
from tests.tiny.taehv import CONFIG, write_taehv


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanVideo15:
    return write_tiny_hunyuan_video_15(tmp_path_factory.mktemp("models"))


def generate(
    files: TinyHunyuanVideo15, folder: Path, *more: object, dit: Path | None = None
) -> tuple[int, str]:
    options = ["--dit", dit or files.dit, "--vae", files.vae, *files.texts, "--prompt", "a cat"]
    options += ["--save_path", "made", "--output_type", "latent", "--device", "cpu"]
    return run_here("hv_1_5_generate_video.py", *options, *more, folder=folder)


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_sizes_are_those_of_the_release(side: int) -> None:
    theirs, draw = HunyuanVideo15ImageProcessor(vae_scale_factor=16), random.Random(3)
    for _ in range(100):
        width, height = draw.randint(300, 1000), draw.randint(300, 1000)
        rows, columns = theirs.calculate_default_height_width(height, width, side)
        assert nearest_size(width, height, side) == (columns, rows)
    assert nearest_size(16, 9, side) == {SMALL: (848, 480), LARGE: (1280, 720)}[side]


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("hunyuanvideo1.5_720p_i2v_fp16.safetensors", "i2v"),
        ("transformer/480p_i2v/diffusion_pytorch_model.safetensors", "i2v"),
        ("HunyuanVideo-1.5-Diffusers-480p_i2v/transformer", "i2v"),
        ("HunyuanVideo-1.5-Diffusers-480p_i2v", "i2v"),
        ("i2v clips/my_tune.safetensors", "t2v"),
        ("transformer/480p_t2v/diffusion_pytorch_model.safetensors", "t2v"),
    ],
)
def test_a_name_says_the_task(path: str, task: str) -> None:
    assert find_task(None, Path("models", path)).name == task
    assert find_task("t2v", Path("models", path)).name == "t2v"
    assert release_name(None) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hunyuanvideo1.5_480p_t2v", (848, 480, 5.0)),
        ("hunyuanvideo1.5_720p_t2v", (1280, 720, 7.0)),
        ("my_tune", (848, 480, 7.0)),
    ],
)
def test_the_name_sets_size_and_shift(
    tmp_path: Path, files: TinyHunyuanVideo15, name: str, expected: tuple[int, int, float]
) -> None:
    from hunyuan_video_15.family import HunyuanVideo15
    from hunyuan_video_15.files import HunyuanVideo15Files

    dit = write_dit(tmp_path, tiny_state(), name=name)

    found = HunyuanVideo15(HunyuanVideo15Files(dit)).defaults

    assert (found.width, found.height, found.flow_shift) == expected
    assert (found.steps, found.guidance_scale, found.frames, found.fps) == (50, 6.0, 121, 24.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hunyuanvideo1.5_480p_t2v_cfg_distilled", "a distilled transformer"),
        ("hy1.5_t2v_480p_lightx2v_4step", "a distilled transformer"),
        ("720p_sr_distilled", "enlarges clips (sr)"),
    ],
)
def test_distilled_files_are_refused_by_their_names(
    tmp_path: Path, files: TinyHunyuanVideo15, name: str, said: str
) -> None:
    dit = write_dit(tmp_path, tiny_state(), name=name)

    assert_one_message(*generate(files, tmp_path, dit=dit), name, said, "not supported")


def test_a_folder_of_a_distilled_release_is_refused(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    dit = write_dit(tmp_path / "480p_t2v_distilled", tiny_state(), name="diffusion_pytorch_model")

    assert_one_message(*generate(files, tmp_path, dit=dit), "a distilled transformer")


def test_meanflow_is_refused_by_its_tensors(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    dit = write_dit(tmp_path, {**tiny_state(), "time_r_in.mlp.0.weight": torch.zeros(4, 4)}, name="my_tune")

    assert_one_message(*generate(files, tmp_path, dit=dit), "distilled by MeanFlow", "time_r_in")


def test_a_network_of_other_channels_is_refused(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    state = tiny_state()
    state["img_in.proj.weight"] = torch.zeros(128, 98, 1, 1, 1)
    dit = write_dit(tmp_path, state, name="my_tune")

    assert_one_message(*generate(files, tmp_path, dit=dit), "takes 98 channels", "65")


def test_a_hunyuan_video_file_is_named(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    dit = write_old_dit(tmp_path, old_state())

    assert_one_message(*generate(files, tmp_path, dit=dit), "looks like a HunyuanVideo or SkyReels V1")
    options = ["--dit", files.dit, "--vae", files.vae, "--prompt", "a cat", "--save_path", "made"]
    options += ["--text_encoder1", files.text_encoder, "--text_encoder2", files.text_encoder]
    said = assert_one_message(*run_here("hv_generate_video.py", *options, folder=tmp_path))
    assert "a HunyuanVideo 1.5 transformer" in said


def test_a_file_for_images_as_the_start_is_warned_of_with_t2v(
    tmp_path: Path, files: TinyHunyuanVideo15
) -> None:
    dit = write_dit(tmp_path, tiny_state(), name="hunyuanvideo1.5_480p_i2v")
    small = ("--video_size", 32, 32, "--video_length", 1, "--infer_steps", 1)

    code, said = generate(files, tmp_path, "--task", "t2v", *small, dit=dit)
    assert code == 0
    assert "is named as a file that starts from an image" in said
    assert_one_message(
        *generate(files, tmp_path, *small, dit=dit), "--image_path", "starts from an image", remedy=False
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--video_size", 40, 48), ("multiples of 16", "Nearest")),
        (("--task", "i2v"), ("--image_path",)),
        (("--vae_sample_size", 128, "--vae_tiling"), ("--vae_sample_size", "--vae_tiling")),
        (("--vae_sample_size", 64), ("--vae_sample_size",)),
    ],
)
def test_requests_that_cannot_be_made_are_refused(
    tmp_path: Path, files: TinyHunyuanVideo15, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_one_message(*generate(files, tmp_path, *options), *words, remedy=False)


def test_a_number_of_frames_is_rounded_down_with_a_warning(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    code, said = generate(files, tmp_path, "--video_size", 32, 32, "--video_length", 8, "--infer_steps", 1)

    assert code == 0
    assert "--video_length 8 is changed to 5" in said
    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    assert load_file(path)["latent"].shape == (32, 2, 2, 2)


@pytest.mark.parametrize("words", [["--i2v"], ["--image_encoder", "model/siglip.safetensors"]])
def test_first_frames_are_cached_with_both_options(tmp_path: Path, words: list[str]) -> None:
    family = family_called("hunyuan_video_15")
    family.prepare(tmp_path)

    code, said = run_here(*family.cache_latents, *words, folder=tmp_path)

    if words == ["--i2v"]:
        assert_one_message(code, said, "--i2v", "--image_encoder", remedy=False)
    else:
        assert code == 0
        assert "--image_encoder" in said
        assert "--i2v" in said
        (path, *_) = (tmp_path / "cache").glob("*00000-001*_hv15.safetensors")
        assert "siglip" not in " ".join(load_file(path))


def test_i2v_needs_caches_of_first_frames(tmp_path: Path) -> None:
    family = family_called("hunyuan_video_15")
    make_project(family, tmp_path)
    words = [word if word != "t2v" else "i2v" for word in family.train]

    code, said = run_here(*words, "--output_dir", "out", "--output_name", "x", folder=tmp_path)

    assert_one_message(code, said, "latents_image", "hv_1_5_cache_latents.py --i2v")


def test_control_media_are_refused(tmp_path: Path) -> None:
    family = family_called("hunyuan_video_15")
    family.prepare(tmp_path)
    shutil.copytree(tmp_path / "clips", tmp_path / "control")
    dataset = tmp_path / "dataset.toml"
    text = dataset.read_text(encoding="utf-8")
    dataset.write_text(f'{text}control_directory = "control"\n', encoding="utf-8")

    code, said = run_here(*family.cache_latents, folder=tmp_path)

    assert_one_message(code, said, "takes no control media", remedy=False)


def test_caches_have_the_names_of_musubi_tuner(tmp_path: Path) -> None:
    """And a text in quotation marks has as many rows as ByT5 has tokens of it."""
    family = family_called("hunyuan_video_15 i2v")
    family.prepare(tmp_path)
    (tmp_path / "clips" / "clip 0.txt").write_text('a sign that says "hi"', encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)

    latents = load_file(tmp_path / "cache" / "clip 0_00000-005_0032x0032_hv15.safetensors")
    texts = load_file(tmp_path / "cache" / "clip 0_hv15_te.safetensors")
    plain = load_file(tmp_path / "cache" / "clip 1_hv15_te.safetensors")

    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in latents.items()}
    assert shapes == {
        "latents_2x2x2_float32": (32, 2, 2, 2),
        "latents_image_1x2x2_float32": (32, 1, 2, 2),
        "siglip_float32": (729, 144),
    }
    assert set(texts) == {"varlen_vl_embed_float32", "varlen_byt5_embed_float32"}
    assert len(texts["varlen_byt5_embed_float32"]) == len('Text "hi". ') + 1
    assert len(plain["varlen_byt5_embed_float32"]) == 0


def test_an_image_gives_the_clip_its_shape(tmp_path: Path, files: TinyHunyuanVideo15) -> None:
    from hunyuan_video_15.configs import TASKS
    from hunyuan_video_15.family import HunyuanVideo15
    from hunyuan_video_15.files import HunyuanVideo15Files
    from protocols.requests import Request

    write_image(tmp_path / "tall.png", 50, 100)
    family = HunyuanVideo15(
        HunyuanVideo15Files(
            files.dit,
            vae=files.vae,
            task=TASKS["i2v"],
            text_encoder=files.text_encoder,
            byt5=files.byt5,
            image_encoder=files.image_encoder,
        ),
        takes_image=True,
    )

    prepared = family.prepare(Request("a cat", 1, image_path=tmp_path / "tall.png"))

    assert (prepared.width, prepared.height) == nearest_size(50, 100, SMALL)
    assert prepared.height > prepared.width


def test_previews_are_decoded_by_the_tiny_vae_of_this_model(
    files: TinyHunyuanVideo15, tmp_path: Path
) -> None:
    """There is no map from its latents to colors; those of HunyuanVideo are other ones."""
    size = ("--video_size", "32", "32", "--video_length", "5", "--infer_steps", "2", "--seed", "7")
    every_step = ("--preview_latent_every", "1")
    code, said = generate(files, tmp_path, *size, *every_step)
    assert_one_message(code, said, "no map from this model's latents to colors", "--preview_vae")
    old = write_taehv(tmp_path / "taehv.safetensors")
    code, said = generate(files, tmp_path, *size, *every_step, "--preview_vae", old)
    assert_one_message(code, said, "is for other latents", "taehv1_5 for HunyuanVideo 1.5")

    own = write_taehv(tmp_path / "taehv1_5.pth", replace(CONFIG, channels=32, patch=2))
    code, said = generate(files, tmp_path, *size, *every_step, "--preview_vae", own)

    assert not code, said
    frames = list(video_frames(tmp_path / "made" / "latent_preview.mp4"))
    assert [frame.shape for frame in frames] == [(32, 32, 3)] * 5
