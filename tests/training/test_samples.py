"""Samples while training: what is asked for, when, under which names, and previews while they are made."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blissful_tuner.taehv import TaehvConfig
from generation.prompt_lines import EMBEDDED_GENERATION_OPTIONS, parse_generation_line
from generation.request import make_request
from generation.script_options import RequestOptions
from modules.errors import CheckpointError, OptionError
from modules.media.reading import read_image, read_tags, video_info
from protocols.loading import Placement
from tests.sound_family import generate_with_audio, tiny_audio_family
from tests.tiny.taehv import write_taehv
from tests.tiny.wan import write_tiny_wan
from tests.training.toy import LATENT, ToyFamily, same, toy_options, train_toy, write_caches, write_prompts
from training.samples import PromptSource, prepare_samples, read_requests, sample_request

PROMPTS = "a cat --w 40 --h 70 --f 7 --d 11 --s 2\n# no prompt\na dog --s 2 --f 1\n"


def test_sizes_are_rounded_down_to_what_can_be_made() -> None:
    entry: dict[str, Any] = {"prompt": "", "width": 40, "height": 10, "frame_count": 7, "sample_steps": 2000}

    request = sample_request(entry, ToyFamily())

    assert (request.width, request.height, request.frames, request.steps) == (32, 16, 5, 2000)


@pytest.mark.parametrize("key", ["image_path", "control_image_path"])
def test_a_family_that_sizes_by_images_is_left_the_sides_that_no_line_names(key: str) -> None:
    """As in generation: the start image or the first reference then decides."""
    family = ToyFamily()
    family = replace(family, defaults=replace(family.defaults, sized_by_images=True))

    def size_of(**entry: Any) -> tuple[int | None, int | None]:
        request = sample_request({"prompt": "", **entry}, family)
        return request.width, request.height

    assert size_of(**{key: "a.png"}) == (None, None)
    assert size_of(width=48, **{key: "a.png"}) == (48, None)
    assert size_of() == (32, 32)


def test_every_option_of_a_prompt_arrives() -> None:
    entry = {"prompt": "p", "seed": 4, "cfg_scale": 2, "guidance_scale": 3.5, "discrete_flow_shift": 5}
    entry |= {"negative_prompt": "n", "image_path": "a.png", "control_video_path": "c.mp4"}
    entry |= {"control_image_path": ["d.png", "e.png"], "one_frame": "default"}
    entry |= {"sample_sampler": "euler", "cfg_trunc_ratio": 0.3, "renorm_cfg": 0.9}

    request = sample_request(entry, ToyFamily())

    expected = {
        "seed": 4,
        "guidance_scale": 2.0,
        "embedded_guidance": 3.5,
        "flow_shift": 5.0,
        "negative_prompt": "n",
        "image_path": Path("a.png"),
        "control_path": Path("c.mp4"),
        "control_images": (Path("d.png"), Path("e.png")),
        "solver": "euler",
        "extra": {"one_frame": "default", "cfg_trunc_ratio": "0.3", "renorm_cfg": "0.9"},
    }
    assert {name: getattr(request, name) for name in expected} == expected
    assert sample_request({**entry, "sample_sampler": "ddim"}, ToyFamily()).solver is None


SAYS = {"bt_prompt": "a cat", "bt_seeds": "11", "bt_guidance_scale": "3.0", "bt_sampled_from": "x_000002"}
SAYS |= {"bt_infer_steps": "2", "bt_width": "32", "bt_device": "cpu"}


@pytest.mark.parametrize(
    ("switches", "says"), [([], SAYS), (["--no_metadata"], {})], ids=["told", "not told"]
)
def test_pictures_say_what_made_them_as_those_of_a_generation_do(
    tmp_path: Path, switches: list[str], says: dict[str, str]
) -> None:
    write_caches(tmp_path, count=2)
    words = ["--sample_prompts", write_prompts(tmp_path, "a cat --d 11 --s 2 --l 3 --f 1\n"), *switches]

    train_toy(tmp_path, *words, "--sample_every_n_steps", 2, "--max_train_steps", 2)

    (path,) = (tmp_path / "output" / "sample").iterdir()
    with Image.open(path) as image:
        assert {name: text for name, text in image.info.items() if name in SAYS} == says
        assert not any(name.endswith("_") for name in image.info)


def test_a_run_with_prompts_alone_makes_samples_when_it_is_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "x.sample").touch()

    prompts = write_prompts(tmp_path, "a cat --f 1 --s 1")

    train_toy(tmp_path, "--sample_prompts", prompts, "--max_train_steps", 2)

    (made,) = (tmp_path / "output" / "sample").iterdir()
    assert made.name.startswith("x_00000")
    assert not (tmp_path / "output" / "x.sample").exists()
    assert "ignored" not in caplog.text


def test_files_are_named_by_epoch_or_step_prompt_time_and_seed(tmp_path: Path) -> None:
    """Four steps an epoch, samples every third: at step 12 both are due and only the step's are made."""
    write_caches(tmp_path, count=4)
    times = ["--sample_every_n_steps", 3, "--sample_every_n_epochs", 1, "--sample_at_first"]

    train_toy(tmp_path, "--sample_prompts", write_prompts(tmp_path, PROMPTS), *times, "--max_train_steps", 12)

    names = [path.name for path in (tmp_path / "output" / "sample").iterdir()]
    found = [re.fullmatch(r"x_(e?\d{6})_(\d\d)_(\d{14})(_11\.mp4|_000\.png)", name) for name in names]
    assert all(found)
    marks = ["e000000", "000003", "e000001", "000006", "e000002", "000009", "000012"]
    kinds = {("00", "_11.mp4"), ("01", "_000.png")}
    expected = {(mark, *kind) for mark in marks for kind in kinds}
    assert {(match[1], match[2], match[4]) for match in found if match} == expected


def test_a_video_has_the_size_and_frames_asked_for_and_a_single_frame_is_a_picture(tmp_path: Path) -> None:
    write_caches(tmp_path, count=4)

    train_toy(tmp_path, "--sample_prompts", write_prompts(tmp_path, PROMPTS), "--sample_every_n_steps", 8)

    (video,), (image,) = ((tmp_path / "output" / "sample").glob(pattern) for pattern in ("*.mp4", "*.png"))
    info = video_info(video)
    assert (info.width, info.height, info.frames, info.fps) == (32, 64, 5, 16.0)
    assert read_tags(video)["bt_seeds"] == "11"
    assert read_tags(video)["bt_sampled_from"] == "x_000008"
    assert "\nNegative prompt: " in read_tags(image)["parameters"]
    assert read_image(image).shape == (32, 32, 3)


def test_a_sample_has_the_track_that_a_generation_makes(tmp_path: Path) -> None:
    models = [*write_tiny_wan(tmp_path / "model").models, "--task", "t2v-1.3B"]
    family, cpu = tiny_audio_family(models), torch.device("cpu")
    prompts = write_prompts(tmp_path, "a cat --w 32 --h 32 --f 9 --d 1 --s 2 --l 3 --fs 5\n")
    sampler = prepare_samples(family, PromptSource(prompts), tmp_path, "x", cpu)

    (path,) = sampler.make(lambda _: family.load_dit(Placement(cpu)), nullcontext, "e000001", lambda: None)

    generate_with_audio(
        [*models, "--save_path", tmp_path / "made", "--device", "cpu", "--prompt", "a cat", "--seed", 1]
        + ["--video_size", 32, 32, "--video_length", 9, "--infer_steps", 2, "--guidance_scale", 3]
        + ["--flow_shift", 5]
    )
    (made,) = (tmp_path / "made").iterdir()
    tracks = []
    for one in (path, made):
        with av.open(str(one)) as container:
            tracks.append([frame.to_ndarray() for frame in container.decode(audio=0)])
    assert len(tracks[0]) > 2
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*tracks, strict=True))


def test_all_prompts_that_cannot_be_made_are_told_at_once(tmp_path: Path) -> None:
    write_caches(tmp_path)
    prompts = write_prompts(tmp_path, "impossible\na dog --d 1 --s 2 --w 32 --h 32\nimpossible")

    with pytest.raises(OptionError, match="(?s)1.*impossible.*3.*impossible"):
        train_toy(tmp_path, "--sample_prompts", prompts, "--sample_at_first")


@pytest.mark.parametrize(
    "option",
    [
        "s 1000000000",
        "s 0",
        "w 0",
        "h 20000",
        "f 0",
        "l 1e4",
        "g -1",
        "g 1e999",
        "fs 0",
        "fs -3",
        f"d {2**70}",
    ],
)
def test_a_number_is_refused_in_the_words_that_a_generation_has(tmp_path: Path, option: str) -> None:
    write_caches(tmp_path)
    prompts, line = tmp_path / "p.txt", f"a cat --{option}"
    prompts.write_text(line, encoding="utf-8")
    with pytest.raises(OptionError) as of_generation:
        make_request(RequestOptions.from_defaults(), parse_generation_line(line, EMBEDDED_GENERATION_OPTIONS))

    with pytest.raises(OptionError) as found:
        train_toy(tmp_path, "--sample_prompts", prompts, "--sample_at_first")

    assert str(found.value) == f"{prompts}, prompt 1 ('a cat'): {of_generation.value}"


def test_a_guidance_scale_below_1_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = write_prompts(tmp_path, "a cat --l 0\na dog --l 0")

    read_requests(ToyFamily(), prompts)

    said = [record.getMessage() for record in caplog.records if "counts from 1" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("--guidance_scale 0 (--l in a prompt line): it counts from 1 here; 0 leaves")


def test_a_missing_prompt_file_ends_the_run_before_the_network_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path)

    with pytest.raises(OptionError, match="sample_prompts"):
        train_toy(tmp_path, "--sample_prompts", tmp_path / "no.txt", "--sample_at_first")


COLORED = replace(LATENT, preview_factors=((1.0, 0.5, 0.0), (0.0, 0.5, 1.0)))
PREVIEWED = "a cat --w 32 --h 32 --f 9 --d 11 --s 4\na picture --w 32 --h 32 --f 1 --d 12 --s 3\n"


def test_samples_have_previews_and_the_training_is_the_same(tmp_path: Path) -> None:
    trained, samples = [], []
    taehv = write_taehv(tmp_path / "taehv.pth", TaehvConfig(2, (8, 8, 8, 8), (1, 2, 2)))
    every = ["--preview_latent_every", 1]
    kinds = {"plain": [], "colours": every, "decoded": [*every, "--preview_vae", taehv]}
    for name, more in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        write_caches(folder)
        decoded: list[torch.Tensor] = []
        family = ToyFamily(on_decode=decoded.append, latent=COLORED)
        samples_at = ["--sample_prompts", write_prompts(folder, PREVIEWED), "--sample_every_n_steps", 4]
        trained.append(train_toy(folder, *samples_at, *more, family=family))
        samples.append(decoded)

    for index in (1, 2):
        assert same(trained[0], trained[index])
        assert all(torch.equal(one, other) for one, other in zip(samples[0], samples[index], strict=True))
    plain, colors, decoded_ones = (tmp_path / name / "output" / "sample" for name in kinds)
    previews = sorted(path.name for path in colors.glob("latent_preview.*"))
    assert previews == ["latent_preview.mp4", "latent_preview.png"]
    assert len(list(colors.iterdir())) == 2 + len(list(plain.iterdir()))
    shown = video_info(colors / "latent_preview.mp4")
    assert (shown.frames, shown.fps) == (3, 4.0)
    assert video_info(decoded_ones / "latent_preview.mp4").frames == 9


def test_a_file_for_other_latents_ends_the_run_before_the_network_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path)
    taehv, family = write_taehv(tmp_path / "taehv.pth"), ToyFamily(latent=COLORED)
    words = ["--sample_prompts", write_prompts(tmp_path), "--sample_at_first", "--preview_latent_every", 1]

    with pytest.raises(CheckpointError, match="decodes 16 channels"):
        train_toy(tmp_path, *words, "--preview_vae", taehv, family=family)
    assert family.passes == []
    with pytest.raises(OptionError, match="--preview_vae .*lost.pth: no such file"):
        toy_options(tmp_path, *words, "--preview_vae", tmp_path / "lost.pth")
