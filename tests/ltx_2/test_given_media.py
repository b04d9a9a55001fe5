"""Results of LTX-2 that keep parts of other media equal those of diffusers' loop with the same mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import LTX2ConditionPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import ltx2_generate_video
from ltx_2.keyframes import space_generated_keyframes
from modules.media.reading import resize_cover
from modules.media.writing import write_png
from protocols.data import AUDIO_LATENTS
from tests.faults.messages import assert_one_message, run_here
from tests.ltx_2.release import TinyRelease, write_release, write_upscaler
from tests.ltx_2.test_family import (
    HEIGHT,
    NEGATIVE,
    PROMPT,
    SEED,
    STEPS,
    WIDTH,
    alone,
    generate,
    scale_words,
    theirs,
)
from tests.parity.running import assert_equal
from tests.sound_media import Track, write_media
from tests.tiny.project import moving_square

FRAMES = 17  # 3 latent frames of 2 x 3
# no rescaling: diffusers counts given tokens in the standard deviation
SCALES = {"guidance_scale": 3.0, "stg_scale": 1.5, "modality_scale": 1.0, "guidance_rescale": 0.0}
SHAPE = (3, HEIGHT // 32, WIDTH // 32)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"), "2.3")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 17 frames as images, its right part, and a mask whose left third is white."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("clip", "right"):
        (folder / name).mkdir()
    for number, frame in enumerate(clip()):
        write_png(folder / "clip" / f"{number:02}.png", frame)
        write_png(folder / "right" / f"{number:02}.png", numpy.ascontiguousarray(frame[:, 32:]))
    mask = numpy.zeros((HEIGHT, WIDTH), numpy.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def clip() -> list[numpy.ndarray]:
    return moving_square(FRAMES, WIDTH, HEIGHT, 5)


def pixels(frames: list[numpy.ndarray]) -> Tensor:
    return torch.from_numpy(numpy.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def encode(pipe: Any, images: Tensor) -> Tensor:
    vae = pipe.vae
    latents = vae.encode(images).latent_dist.mode()
    normalized: Tensor = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)
    return normalized


Given = tuple[Tensor, Tensor]  # clean latents 1 C F H W, and a mask F H W of those that are kept


def keep_prefix(pipe: Any) -> Given:
    mask = torch.zeros(SHAPE)
    mask[:2] = 1
    return torch.cat([encode(pipe, pixels(clip()[-9:])), torch.zeros(1, 16, 1, *SHAPE[1:])], 2), mask


def keep_suffix(pipe: Any) -> Given:
    mask = torch.zeros(SHAPE)
    mask[2:] = 1
    latents = encode(pipe, pixels(clip()[:9]))[:, :, 1:]
    return torch.cat([torch.zeros(1, 16, 2, *SHAPE[1:]), latents], 2), mask


def keep_right(pipe: Any) -> Given:
    mask = torch.zeros(SHAPE)
    mask[..., 1:] = 1
    images = pixels(clip())
    images[..., :32] = 0  # gray
    return encode(pipe, images), mask


def keep_left(pipe: Any) -> Given:
    mask = torch.zeros(SHAPE)
    mask[..., :1] = 1
    return encode(pipe, pixels(clip())), mask


def keep_start(pipe: Any) -> Given:
    mask = torch.zeros(SHAPE)
    mask[:2] = 1
    return encode(pipe, pixels(clip())), mask


def expect(pipe: Any, given: Given) -> Tensor:
    """The latents that diffusers' loop makes of noise in the latents' shape, and of what is given."""
    clean, mask = given
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
    tokens, kept = (pipe._pack_latents(one, 1, 1) for one in (clean, mask[None, None]))

    def prepare(*_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        start = pipe._pack_latents(noise, 1, 1)
        return kept * tokens + (1 - kept) * start, kept, tokens, None

    pipe.prepare_latents = prepare
    latents, _ = call(pipe)
    vae = pipe.vae
    normalized: Tensor = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0]
    return normalized


def call(pipe: Any, **more: Any) -> Any:
    return pipe(
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": HEIGHT, "width": WIDTH},
        **{"num_frames": FRAMES, "frame_rate": 24.0, "num_inference_steps": STEPS},
        **{"spatio_temporal_guidance_blocks": [1], "return_dict": False, "output_type": "latent"},
        **{"generator": torch.Generator().manual_seed(SEED), **SCALES, **more},
    )


def condition_pipe(release: TinyRelease) -> Any:
    pipe: Any = LTX2ConditionPipeline(**theirs(release).components)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(alone, with_kwargs=True)
    return pipe


@pytest.mark.parametrize(
    ("words", "keep"),
    [
        ("--extend_prefix {0}/clip --extend_prefix_frames 12", keep_prefix),
        ("--extend_suffix {0}/clip --extend_suffix_frames 9", keep_suffix),
        ("--outpaint_source {0}/right --outpaint_region 32,0,64,64", keep_right),
        ("--reference_video {0}/clip --inpaint_mask {0}/mask.png", keep_left),
        ("--inpaint_source {0}/clip --inpaint_mask {0}/mask.png --inpaint_invert", keep_right),
        ("--inpaint_source {0}/clip --retake 0.4,0.7", keep_start),
    ],
    ids=["prefix", "suffix", "outpainting", "inpainting", "inverted", "retake"],
)
def test_kept_parts_equal_those_of_diffusers(
    release: TinyRelease, media: Path, tmp_path: Path, words: str, keep: Callable[[Any], Given]
) -> None:
    typed = words.format(media.as_posix()).split()

    made = generate(release, tmp_path, *typed, *scale_words(SCALES, SCALES), "--stg_blocks", 1, frames=FRAMES)

    pipe = condition_pipe(release)
    given = keep(pipe)
    if "invert" in words:
        given = encode(pipe, pixels(clip())), given[1]
    assert_equal(made["latent"], expect(pipe, given), "latents")


def test_the_prefix_of_these_tests_is_that_of_diffusers(release: TinyRelease) -> None:
    pipe = condition_pipe(release)
    frames = [Image.fromarray(frame) for frame in clip()[-9:]]

    _, mask, clean, _ = pipe.prepare_latents(
        LTX2VideoCondition(frames, index=0),
        num_channels_latents=16,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        generator=torch.Generator().manual_seed(SEED),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    expected_clean, expected_mask = keep_prefix(pipe)
    torch.testing.assert_close(mask, pipe._pack_latents(expected_mask[None, None], 1, 1))
    torch.testing.assert_close(clean, pipe._pack_latents(expected_clean, 1, 1), atol=1e-5, rtol=1e-5)


def expect_placed(pipe: Any, *conditions: LTX2VideoCondition) -> Tensor:
    """The latents of diffusers with these conditions, from our noise: of the clip, then of keyframes.

    A token's clean prediction is made at its own noise level, as in the released code of LTX-2; diffusers
    makes it at that of the clip, which differs for strengths below 1.
    """
    prepare = pipe.prepare_latents
    masks = []

    def predict_clean(sample: Tensor, velocity: Tensor, step: int, scheduler: Any) -> Tensor:
        level = scheduler.sigmas[step]
        of_images = sample.shape[1] == masks[-1].shape[1]
        return sample - velocity * level * (1 - masks[-1] if of_images else 1)

    def prepare_from_noise(*words: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, mask, clean, coords = prepare(*words, **more)
        generator = torch.Generator().manual_seed(SEED)
        count = (mask.shape[1] - torch.Size(SHAPE).numel()) // torch.Size(SHAPE[1:]).numel()
        drawn = [torch.randn(1, 16, frames, *SHAPE[1:], generator=generator) for frames in (SHAPE[0], count)]
        start = torch.cat([pipe._pack_latents(one, 1, 1) for one in drawn], dim=1)
        masks.append(mask)
        return (1 - mask) * start + mask * clean, mask, clean, coords

    pipe.prepare_latents = prepare_from_noise
    pipe.convert_velocity_to_x0 = predict_clean
    latents, _ = call(pipe, conditions=list(conditions))
    normalized: Tensor = pipe._normalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std)[0]
    return normalized


def test_keyframes_equal_those_of_diffusers(release: TinyRelease, media: Path, tmp_path: Path) -> None:
    """Of a whole and of a partial strength, together with a first frame that is given in part."""
    folder = (media / "clip").as_posix()
    typed = ["--keyframe", f"9:{folder}/16.png", "--keyframe", f"1:{folder}/08.png:0.6", "--image_crf", 0]
    typed += ["--latent_frame", f"0:{folder}/00.png:0.7", "--stg_blocks", 1]

    made = generate(release, tmp_path, *typed, *scale_words(SCALES, SCALES), frames=FRAMES)

    images = [Image.fromarray(clip()[number]) for number in (16, 8, 0)]
    placed = zip(images, (2, 1, 0), (1.0, 0.6, 0.7), strict=True)
    conditions = [LTX2VideoCondition(image, index, strength, crf=0) for image, index, strength in placed]
    assert_equal(made["latent"], expect_placed(condition_pipe(release), *conditions), "latents")


def expect_generated(pipe: Any, frames: list[int]) -> Tensor:
    """The latents of diffusers' loop with single frames behind the clip, from noise and at the clip's time.

    Their tokens have the mark of the first frame, as in its pipeline for keyframes that are generated.
    """
    count = len(frames) * torch.Size(SHAPE[1:]).numel()
    sizes = {
        "batch_size": 1,
        "height": SHAPE[1],
        "width": SHAPE[2],
        "device": torch.device("cpu"),
        "fps": 24.0,
    }
    coords = []
    for frame in frames:
        one = pipe.transformer.rope.prepare_video_coords(num_frames=1, **sizes)
        one[:, 0] = torch.tensor([frame, frame + 1]) / 24.0
        coords.append(one)

    def prepare(*_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        shapes = (SHAPE, (len(frames), *SHAPE[1:]))
        drawn = [torch.randn(1, 16, *shape, generator=generator) for shape in shapes]
        start = torch.cat([pipe._pack_latents(one, 1, 1) for one in drawn], dim=1)
        return start, torch.zeros_like(start[..., :1]), torch.zeros_like(start), torch.cat(coords, dim=2)

    def mark(_: Any, words: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = given["video_keyframes_mask"].clone()
        mask[:, -count:] = 1
        return words, {**given, "video_keyframes_mask": mask}

    pipe.prepare_latents = prepare
    pipe.transformer.register_forward_pre_hook(mark, with_kwargs=True)
    latents, _ = call(pipe)
    normalized: Tensor = pipe._normalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std)[0]
    return normalized


def test_generated_keyframes_equal_those_of_diffusers(tmp_path: Path) -> None:
    release = write_release(tmp_path / "model", "2.5")
    words = [*scale_words(SCALES, SCALES), "--stg_blocks", 1]

    made = generate(release, tmp_path / "a", *words, "--num_generated_keyframes", 2, frames=FRAMES)
    other = generate(release, tmp_path / "b", *words, frames=FRAMES)

    assert space_generated_keyframes(2, FRAMES) == [5, 11]
    assert space_generated_keyframes(1, 10) == [4]  # 4.5, to the even number, as in the official code
    assert_equal(made["latent"], expect_generated(condition_pipe(release), [5, 11]), "latents")
    assert (made["latent"] - other["latent"]).abs().max() > 1e-3


def make_by_line(release: TinyRelease, folder: Path, line: str, *words: object) -> dict[str, Tensor]:
    """The latents of the only line of a file of prompts."""
    folder.mkdir()
    (folder / "lines.txt").write_text(f"{PROMPT} --n {NEGATIVE} --d {SEED} {line}\n", encoding="utf-8")
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS]
    command = [*release.words, *release.vaes, *release.texts, "--device", "cpu", *size, *words]
    command += [
        "--from_file",
        folder / "lines.txt",
        "--output_type",
        "latent",
        "--save_path",
        folder / "made",
    ]
    ltx2_generate_video.main([str(word) for word in command])
    (path,) = (folder / "made").iterdir()
    return load_file(path)


@pytest.mark.slow
def test_keyframes_guide_images_and_audio_and_lines_set_them_and_masks(
    release: TinyRelease, media: Path, tmp_path: Path
) -> None:
    image = f"{(media / 'clip').as_posix()}/16.png"
    plain = ["--ltx2_mode", "av", *scale_words(SCALES, SCALES), "--stg_blocks", 1]

    made = generate(release, tmp_path / "a", *plain, "--keyframe", f"9:{image}", frames=FRAMES)
    other = generate(release, tmp_path / "b", *plain, frames=FRAMES)
    same = make_by_line(release, tmp_path / "c", f"--gk 9:{image}", *plain)
    masked = make_by_line(
        release,
        tmp_path / "e",
        f"--v {media.as_posix()}/clip --im {media.as_posix()}/mask.png --ii 1 --it 0.4",
        *plain,
    )
    typed = ["--inpaint_source", media / "clip", "--inpaint_mask", media / "mask.png", "--inpaint_invert"]
    same_masked = generate(release, tmp_path / "f", *plain, *typed, frames=FRAMES)
    two = make_by_line(release, tmp_path / "d", f"--gk 9:{image} --gk -1:{image} --gl 1:{image}", *plain)

    for name in ("latent", AUDIO_LATENTS):
        torch.testing.assert_close(made[name], same[name])
        torch.testing.assert_close(masked[name], same_masked[name])
        assert made[name].shape == two[name].shape == other[name].shape
        assert (made[name] - other[name]).abs().max() > 1e-4
        assert (made[name] - two[name]).abs().max() > 1e-4


def make_small_or_large(release: TinyRelease, folder: Path, *words: object, scale: int = 2) -> Tensor:
    """The latents of a clip of so many times the usual sides."""
    size = ["--video_size", scale * HEIGHT, scale * WIDTH, "--video_length", FRAMES, "--infer_steps", 2]
    command = [
        *release.words,
        *release.vaes,
        *release.texts,
        "--device",
        "cpu",
        "--seed",
        SEED,
        *size,
        *words,
    ]
    command += ["--prompt", PROMPT, "--output_type", "latent", "--save_path", folder]
    ltx2_generate_video.main([str(word) for word in command])
    (path,) = folder.iterdir()
    return load_file(path)["latent"]


@pytest.mark.slow
def test_both_stages_keep_parts_and_see_keyframes(release: TinyRelease, media: Path, tmp_path: Path) -> None:
    write_upscaler(tmp_path / "up.safetensors", "rational")
    folder = media / "clip"
    two = ["--sample_two_stage", "--spatial_upsampler_path", tmp_path / "up.safetensors", "--image_crf", 0]
    kept = ["--extend_prefix", folder, "--extend_prefix_frames", 9]
    kept += ["--latent_frame", f"2:{folder.as_posix()}/16.png:0.5"]
    guided = ["--keyframe", f"12:{folder.as_posix()}/08.png:0.5"]

    made = make_small_or_large(release, tmp_path / "both", *two, *kept, *guided)
    early = make_small_or_large(release, tmp_path / "early", *two, *kept, *guided, "--skip-stage-2")
    small = make_small_or_large(release, tmp_path / "small", "--image_crf", 0, *kept, *guided, scale=1)
    other = make_small_or_large(release, tmp_path / "other", *two, *kept)

    assert torch.equal(early, small)
    prefix = torch.stack(
        [torch.from_numpy(resize_cover(frame, (2 * WIDTH, 2 * HEIGHT))) for frame in clip()[-9:]]
    )
    expected = encode(condition_pipe(release), pixels([frame.numpy() for frame in prefix]))
    assert_equal(made[:, :2], expected[0], "what is kept at full size")
    assert made.shape == other.shape
    assert (made[:, 2] - other[:, 2]).abs().max() > 1e-4


def test_keyframes_and_twice_the_frames_are_refused(
    release: TinyRelease, media: Path, tmp_path: Path
) -> None:
    write_upscaler(tmp_path / "up.safetensors", "frames")
    words = ["--sample_two_stage", "--temporal_upsampler_path", tmp_path / "up.safetensors", "--prompt", "a"]
    words += ["--keyframe", f"0:{media.as_posix()}/mask.png", "--save_path", "x", "--device", "cpu"]

    code, said = run_here("ltx2_generate_video.py", *release.words, *release.texts, *words, folder=tmp_path)

    assert_one_message(code, said, "the first stage has half of the frames")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--audio_prefix", "{0}/long.mp4", "--audio_prefix_seconds", 0.3], lambda starts: starts < 0.26),
        (
            ["--audio_inpaint_audio", "{0}/long.mp4", "--audio_inpaint_interval", "0.2,0.4"],
            lambda starts: (starts + 0.04 <= 0.2) | (starts >= 0.4),
        ),
        (["--drive_audio", "{0}/long.mp4"], lambda starts: starts > -1),
    ],
    ids=["prefix", "interval", "all"],
)
def test_kept_audio_stays_and_changes_the_rest(
    release: TinyRelease, tmp_path: Path, words: list[Any], kept: Callable[[Tensor], Tensor]
) -> None:
    write_media(tmp_path / "long.mp4", Track((0.1, 0.5), loud=0.9), frames=FRAMES, fps=24)
    typed = [str(word).format(tmp_path.as_posix()) for word in words]
    plain = ["--ltx2_mode", "av", *scale_words(SCALES, SCALES), "--stg_blocks", 1]

    made = generate(release, tmp_path / "a", *plain, *typed, frames=FRAMES)
    other = generate(release, tmp_path / "b", *plain, frames=FRAMES)

    starts = torch.arange(made[AUDIO_LATENTS].shape[1]) * 0.04 - 0.03
    is_kept = kept(starts)
    whole = generate(release, tmp_path / "c", *plain, "--drive_audio", tmp_path / "long.mp4", frames=FRAMES)
    if "--audio_prefix" not in words:  # which keeps the end of the file
        torch.testing.assert_close(made[AUDIO_LATENTS][:, is_kept], whole[AUDIO_LATENTS][:, is_kept])
    changed = (made[AUDIO_LATENTS] - other[AUDIO_LATENTS]).abs().amax((0, 2))
    assert changed[is_kept].min() > 0.01
    assert (made["latent"] - other["latent"]).abs().max() > 1e-4
    assert is_kept.all() or not torch.equal(
        made[AUDIO_LATENTS][:, ~is_kept], whole[AUDIO_LATENTS][:, ~is_kept]
    )


def expect_with_audio(pipe: Any, clean: Tensor, is_kept: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of diffusers' loop, in which only the mask of the audio is changed.

    clean: C T M. is_kept: T bool. The gates of attention between the streams follow the noise level of the
    clip, as in the released code.
    """
    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn(1, 16, *SHAPE, generator=generator)
    start = pipe._pack_audio_latents(torch.randn(1, *clean.shape, generator=generator))
    clean, kept = pipe._pack_audio_latents(clean[None]), is_kept.float().view(1, -1, 1)
    times: list[Tensor] = []
    to_velocity = pipe.convert_x0_to_velocity

    def change_times(_: Any, words: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        times[:] = [given["sigma"]]
        return words, {**given, "audio_timestep": given["audio_timestep"][:, None] * (1 - kept[..., 0])}

    def keep(sample: Tensor, made: Tensor, step: int, scheduler: Any) -> Tensor:
        if scheduler is not pipe.scheduler:  # that of the audio
            made = kept * clean + (1 - kept) * made
        velocity: Tensor = to_velocity(sample, made, step, scheduler)
        return velocity

    pipe.prepare_latents = lambda *_, **__: (
        pipe._pack_latents(image, 1, 1),
        torch.zeros(1, torch.Size(SHAPE).numel(), 1),
        torch.zeros(1, torch.Size(SHAPE).numel(), 16),
        None,
    )
    pipe.prepare_audio_latents = lambda *_, **__: kept * clean + (1 - kept) * start
    pipe.convert_x0_to_velocity = keep
    pipe.transformer.register_forward_pre_hook(change_times, with_kwargs=True)
    for gate in (
        pipe.transformer.av_cross_attn_video_a2v_gate,
        pipe.transformer.av_cross_attn_audio_v2a_gate,
    ):
        gate.register_forward_pre_hook(lambda *_: tuple(times))
    of_audio = {f"audio_{name}": scale for name, scale in SCALES.items()}
    latents, heard = call(pipe, use_cross_timestep=False, **of_audio)
    audio = pipe._normalize_audio_latents(
        pipe._pack_audio_latents(heard), pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std
    )
    audio = pipe._unpack_audio_latents(audio, heard.shape[2], heard.shape[3])
    vae = pipe.vae
    return pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0], audio[0]


@pytest.mark.slow
def test_kept_audio_changes_the_rest_as_in_diffusers(release: TinyRelease, tmp_path: Path) -> None:
    write_media(tmp_path / "long.mp4", Track((0.1, 0.5), loud=0.9), frames=FRAMES, fps=24)
    plain = ["--ltx2_mode", "av", *scale_words(SCALES, SCALES), "--stg_blocks", 1]
    words = ["--audio_inpaint_audio", tmp_path / "long.mp4", "--audio_inpaint_interval", "0.2,0.4"]

    made = generate(release, tmp_path / "a", *plain, *words, frames=FRAMES)
    whole = generate(release, tmp_path / "b", *plain, "--drive_audio", tmp_path / "long.mp4", frames=FRAMES)

    starts = torch.arange(made[AUDIO_LATENTS].shape[1]) * 0.04 - 0.03
    is_kept = (starts + 0.04 <= 0.2) | (starts >= 0.4)
    pipe: Any = LTX2ConditionPipeline(**theirs(release).components)
    pipe.set_progress_bar_config(disable=True)
    latents, audio = expect_with_audio(pipe, whole[AUDIO_LATENTS], is_kept)
    assert_equal(made["latent"], latents, "images")
    assert_equal(made[AUDIO_LATENTS], audio, "audio")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--outpaint_source {0}/clip --outpaint_region 0,0,200,64", "Pass a region inside of it"),
        ("--outpaint_source {0}/clip --outpaint_region 8,8,40,40", "it has no whole latent of 32 x 32"),
        ("--outpaint_source {0}/clip --outpaint_region 0,0,64", "pass X,Y,WIDTH,HEIGHT"),
        ("--outpaint_source {0}/clip", "--outpaint_region"),
        ("--inpaint_source {0}/clip", "pass --inpaint_mask or --retake"),
        ("--inpaint_mask {0}/mask.png", "pass --inpaint_source, the clip that it changes"),
        ("--inpaint_source {0}/clip --retake 2,1", "pass START,END in seconds"),
        ("--inpaint_source {0}/clip --retake 0,1 --inpaint_mask {0}/mask.png", "pass one of them"),
        ("--num_generated_keyframes 2", "LTX-2.3 has no embedding that marks them"),
        ("--num_generated_keyframes 2 --ltx2_mode audio", "audio alone has no images"),
        ("--extend_prefix {0}/clip", "cover all of it"),
        ("--extend_suffix {0}/mask.png", "at least 9 frames are needed"),
        ("--extend_prefix {0}/clip --extend_prefix_frames 99", "asks for 99"),
        ("--keyframe 17:{0}/mask.png", "it has the frames 0 to 16"),
        ("--keyframe 1:{0}/none.png", "none.png"),
        ("--keyframe {0}/mask.png", "use a number, a file and optionally its strength"),
        ("--keyframe 0:{0}/mask.png:2", "use a number, a file"),
        ("--latent_frame 3:{0}/mask.png", "the result has the latent frames 0 to 2"),
        ("--keyframe 0:{0}/mask.png --ltx2_mode audio", "--keyframe with --ltx2_mode audio"),
        (
            "--keyframe 0:{0}/mask.png --reference_video {0}/clip --reference_strength 0.5",
            "cannot be combined with given frames",
        ),
        ("--audio_prefix {0}/mask.png", "no audio is generated. Pass --ltx2_mode av"),
        ("--extend_prefix {0}/mask.png --ltx2_mode audio", "audio alone has no images"),
        ("--extend_prefix {0}/mask.png --drive_video {0}/clip --ltx2_mode av", "the video sets all frames"),
        ("--inpaint_source {0}/clip --inpaint_mask {0}/mask.png --inpaint_threshold 1", "it keeps nothing"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    release: TinyRelease, media: Path, tmp_path: Path, words: str, message: str
) -> None:
    command = [
        "ltx2_generate_video.py",
        *release.words,
        *release.texts,
        "--prompt",
        "a cat",
        "--device",
        "cpu",
    ]
    command += [
        "--video_size",
        HEIGHT,
        WIDTH,
        "--video_length",
        FRAMES,
        "--infer_steps",
        1,
        "--save_path",
        "x",
    ]

    code, said = run_here(*command, *words.format(media.as_posix()).split(), folder=tmp_path)

    assert_one_message(code, said, message)
