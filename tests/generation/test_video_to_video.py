"""Videos that start from a video, an image or saved latents, in all families, from the command line."""

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fpack_generate_video
import hv_generate_video
import wan_generate_video
from encoders.tiles import posterior_generator
from hunyuan_model.spec import LATENT as HUNYUAN_LATENT
from hunyuan_model.vae import load_vae as load_hunyuan_vae
from modules.errors import CheckpointError, OptionError, UserError
from modules.media.pixels import byte_clips, to_pixels
from modules.media.writing import write_png
from tests.generation.guided import Script
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import moving_square, write_image
from tests.tiny.wan import write_tiny_wan
from wan.vae import load_vae as load_wan_vae

HEIGHT, WIDTH, FRAMES = 32, 48, 9
CPU = torch.device("cpu")
SIZE = ("--video_size", HEIGHT, WIDTH)
SAY = ("--prompt", "a cat", "--seed", 1, "--infer_steps", 4)


Scripts = dict[str, Script]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Scripts:
    folder = tmp_path_factory.mktemp("models")
    write_image(folder / "start.png", WIDTH, HEIGHT)
    length = (*SIZE, "--video_length", FRAMES)
    sections = (*SIZE, "--latent_window_size", 1, "--video_sections", 2, "--image_path", folder / "start.png")
    framepack = write_tiny_framepack(folder / "framepack").models
    plain = ("--guidance_scale", 1, "--sample_solver", "vanilla", "--task", "t2v-1.3B")
    return {
        "wan": Script(wan_generate_video.main, (*write_tiny_wan(folder / "wan").models, *length, *plain)),
        "hv": Script(hv_generate_video.main, (*write_tiny_hunyuan(folder / "hv").models, *length)),
        "fpack": Script(fpack_generate_video.main, (*framepack, *sections)),
        "f1": Script(fpack_generate_video.main, (*framepack, *sections, "--f1")),
    }


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, so that nothing is lost to a codec."""
    folder = tmp_path_factory.mktemp("clip")
    for index, frame in enumerate(moving_square(FRAMES, WIDTH, HEIGHT, 3)):
        write_png(folder / f"{index}.png", frame)
    return folder


def frames_of(count: int = FRAMES) -> Tensor:
    """The frames of `clip`, 1 F H W 3."""
    return torch.from_numpy(numpy.stack(moving_square(FRAMES, WIDTH, HEIGHT, 3)))[None, :count]


@torch.no_grad()
def reconstruction(name: str, scripts: Scripts) -> Tensor:
    """What the VAE makes of the clip, C F h w in model space."""
    words = [str(word) for word in scripts[name].words]
    path = Path(words[words.index("--vae") + 1])
    if name == "wan":
        return load_wan_vae(path, CPU, torch.float32).encode(to_pixels(frames_of()))[0]
    vae = load_hunyuan_vae(path, CPU, torch.float32)
    return vae.encode(byte_clips(frames_of()), [posterior_generator(1)])[0] * HUNYUAN_LATENT.scale


FAMILIES = ["wan", "hv", "fpack"]


@pytest.mark.slow_cases("f1-direct", "wan-direct")
@pytest.mark.parametrize(("name", "mode"), [("wan", "direct"), ("hv", "traditional"), ("f1", "direct")])
def test_all_of_it_made_anew_equals_a_video_from_noise(
    tmp_path: Path, scripts: Scripts, clip: Path, name: str, mode: str
) -> None:
    make, more = scripts[name].one, ("--video_path", clip, "--strength", 1, "--noise_mode", mode)
    assert torch.equal(make(tmp_path / "plain", *SAY), make(tmp_path / mode, *SAY, *more))


@pytest.mark.slow_cases("f1", "fpack", "hv")
@pytest.mark.parametrize("name", [*FAMILIES, "f1"])
def test_little_made_anew_is_near_what_the_vae_reconstructs(
    tmp_path: Path, scripts: Scripts, clip: Path, name: str
) -> None:
    """The last of 400 steps has a noise level of 0.0025; sections lie where they belong in the video."""
    say = ("--prompt", "a cat", "--seed", 1, "--infer_steps", 400, "--flow_shift", 1, "--v2v_denoise", 0)
    latents = scripts[name].one(tmp_path, *say, "--video_path", clip)
    expected = reconstruction(name, scripts)
    if name in {"fpack", "f1"}:  # the start image is not part of what is made
        latents, expected = latents[:, 1:], expected[:, 1:]
    off = float((latents - expected).norm() / expected.norm())
    assert 0 < off < 0.05
    steps = float((expected[:, 0] - expected[:, 1]).norm() / expected[:, 0].norm())
    assert steps > 2 * off, "the frames are too alike to tell one from another"


@pytest.mark.slow_cases("fpack")
@pytest.mark.parametrize("name", ["wan", "fpack"])
def test_lines_of_a_file_equal_single_runs(
    tmp_path: Path, scripts: Scripts, clip: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    script, lines = scripts[name], tmp_path / "lines.txt"
    lines.write_text(
        f"a cat --d 1 --v {clip} --vd 0.25\na dog --d 2 --video_path {clip} --denoise_strength 0.75\n"
        "a dog --d 3\na cow --d 4 --vd 0.3\n",
        encoding="utf-8",
    )
    more = ("--infer_steps", 4, "--v2v_extra_noise", 0.05)

    made = script.made(tmp_path / "file", *more, "--from_file", lines)

    assert "--vd 0.3 is ignored because the line has no source video" in caplog.text
    assert "--v2v_extra_noise" not in caplog.text  # other lines use it
    from_clip = ("--video_path", clip)
    single = {
        1: ("--prompt", "a cat", "--seed", 1, *from_clip, "--strength", 0.25),
        2: ("--prompt", "a dog", "--seed", 2, *from_clip, "--strength", 0.75),
        3: ("--prompt", "a dog", "--seed", 3),
    }
    assert made.keys() == {1, 2, 3, 4}
    for seed, arguments in single.items():
        alone = script.one(tmp_path / f"alone {seed}", *more, *arguments)
        assert torch.equal(made[seed], alone), seed


@pytest.mark.slow_cases("fpack", "hv")
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_latents_are_a_start_too(
    tmp_path: Path, scripts: Scripts, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They need no VAE; another size is scaled."""
    script = scripts[name]
    made = script.one(tmp_path / "first", *SAY)
    (path,) = (tmp_path / "first").iterdir()
    say = ("--prompt", "a dog", "--seed", 2, "--infer_steps", 400, "--flow_shift", 1, "--v2v_denoise", 0)

    same = script.one(tmp_path / "same", *say, "--from_latent", path)
    wider = script.one(tmp_path / "wider", *say, "--from_latent", path, "--video_size", 64, 96)

    begin = 1 if name == "fpack" else 0
    assert float((same - made)[:, begin:].abs().max()) < 0.05 * float(made.abs().max())
    assert wider.shape == (16, 3, 8, 12)
    assert "VAE:" not in caplog.text or name == "fpack"  # which encodes its start image


def test_latents_of_another_length_or_model_are_refused(tmp_path: Path, scripts: Scripts) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"latent": torch.zeros(16, 2, 4, 6)}, path)
    with pytest.raises(OptionError, match=r"--from_latent .*: it has 2 latent frames.*has 3 \(9 frames\)"):
        scripts["hv"].made(tmp_path, *SAY, "--from_latent", path)
    save_file({"latent": torch.zeros(16, 3, 4, 6)}, path, {"bt_model_type": "wan"})
    with pytest.raises(CheckpointError, match="the latents were made by wan"):
        scripts["hv"].made(tmp_path, *SAY, "--from_latent", path)
    save_file({"latent": torch.zeros(4, 3, 4, 6)}, path)
    with pytest.raises(CheckpointError, match="have 4 channels"):
        scripts["wan"].made(tmp_path, *SAY, "--from_latent", path)
    path.write_text("no tensors", encoding="utf-8")
    with pytest.raises(CheckpointError, match="x.safetensors"):
        scripts["wan"].made(tmp_path, *SAY, "--from_latent", path)


@pytest.mark.slow_cases(
    "fpack---i2i_path CLIP/0.png---i2i_path is refused",
    "fpack---video_path CLIP --one_frame_inference default---video_path .*--one_frame_inference",
    "fpack---video_path no.mp4---video_path no.mp4: no such file",
)
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wan", "--video_path CLIP --i2i_path CLIP/0.png", "--video_path and --i2i_path"),
        ("hv", "--video_path CLIP --from_latent x", "--video_path and --from_latent exclude each other"),
        ("fpack", "--video_path no.mp4", "--video_path no.mp4: no such file"),
        ("wan", "--i2i_path TMP/text.mp4 --video_length 1", "--i2i_path: .*text.mp4.*. Pass an image file"),
        ("wan", "--i2i_path CLIP/0.png", "--i2i_path .*0.png and --video_length 9"),
        (
            "wan",
            "--video_path CLIP --denoise_strength 1.5",
            "--denoise_strength 1.5: use a number from 0 to 1",
        ),
        ("wan", "--video_path CLIP --v2v_extra_noise -1", "--v2v_extra_noise -1"),
        ("fpack", "--i2i_path CLIP/0.png", "--i2i_path is refused"),
        ("fpack", "--video_path CLIP --one_frame_inference default", "--video_path .*--one_frame_inference"),
        ("wan", "--task t2i-14B --video_length 1 --video_path CLIP", "--task t2i-14B does not take it"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    tmp_path: Path,
    scripts: Scripts,
    clip: Path,
    name: str,
    arguments: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    words = [word.replace("CLIP", str(clip)).replace("TMP", str(tmp_path)) for word in arguments.split()]
    with pytest.raises(UserError, match=message):
        scripts[name].made(tmp_path / "out", *SAY, *words)
    assert not (tmp_path / "out").exists()
    assert "computing in" not in caplog.text


def test_options_that_no_video_uses_are_said_to_be_ignored(
    tmp_path: Path, scripts: Scripts, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("--v2v_pad_mode", "front", "--v2v_extra_noise", 0.1, "--v2v_denoise", 0.5)
    scripts["wan"].one(tmp_path / "a", *SAY, *given)
    assert caplog.text.count("is ignored because --video_path") == 3  # 0.5, the usual one, too
    caplog.clear()
    scripts["wan"].one(tmp_path / "b", *SAY, "--video_path", clip, *given, "--i2_extra_noise", 0.1)
    assert "--i2_extra_noise 0.1 is ignored because --i2i_path is not given" in caplog.text
    assert caplog.text.count("is ignored") == 1
