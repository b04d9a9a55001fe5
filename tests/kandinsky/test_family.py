"""What Kandinsky 5 settles for a request and a training, and what it refuses before a network is loaded."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Kandinsky5I2VPipeline
from safetensors.torch import save_file

from kandinsky.configs import T2I, TASKS, guess_task
from kandinsky.family import Kandinsky, family_for_generation, family_for_training
from kandinsky.files import KandinskyFiles, select_task
from kandinsky.first_frame import match_first_frames, size_like_image
from kandinsky.options import KandinskyGenerationOptions, KandinskyTrainingOptions
from kandinsky.spec import NOISE
from kandinsky.text_encoders import CLIP_SETTINGS, IMAGE_SETTINGS
from modules.errors import CacheError, CheckpointError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import Batch, CacheOrigin
from protocols.families import list_same_latents
from protocols.requests import Prepared, Request
from tests.faults.messages import assert_one_message, run_here
from tests.manifests import tensor_list, write_hollow
from tests.parity.running import latents_in
from tests.tiny.families import family_called
from tests.tiny.kandinsky import TinyKandinsky, tiny_state, write_dit, write_tiny_kandinsky
from tests.tiny.project import write_image


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyKandinsky:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> TinyKandinsky:
    return write_tiny_kandinsky(tmp_path_factory.mktemp("models"), "image")


def describe(files: TinyKandinsky, task: str) -> Kandinsky:
    return Kandinsky(
        KandinskyFiles(
            files.dit,
            vae=files.vae,
            task=TASKS[task],
            text_encoder_qwen=files.qwen,
            text_encoder_clip=files.clip,
        )
    )


def prepare(family: Kandinsky, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("k5-lite-t2v-5s-sd", (768, 512, 121, 50, 5.0, 10.0)),
        ("k5-lite-t2v-10s-sd", (768, 512, 241, 50, 5.0, 10.0)),
        ("k5-pro-t2v-5s-hd", (1280, 768, 121, 50, 5.0, 10.0)),
        ("k5-lite-t2i-hd", (1024, 1024, 1, 50, 3.5, 3.0)),
    ],
)
def test_what_is_not_said_is_as_the_maker_has_it(
    files: TinyKandinsky, image_files: TinyKandinsky, task: str, expected: tuple[float, ...]
) -> None:
    prepared = prepare(describe(image_files if "t2i" in task else files, task))

    assert (
        *(prepared.width, prepared.height, prepared.frames, prepared.steps),
        *(prepared.guidance_scale[0], prepared.flow_shift),
    ) == expected
    assert prepared.negative_prompt.startswith("Static, 2D cartoon") == ("t2i" not in task)


def test_templates_have_the_maker_s_spelling_and_length() -> None:
    """It is the spelling that the weights were trained with; no turn of the assistant follows."""
    for settings, tokens in ((CLIP_SETTINGS, 129), (IMAGE_SETTINGS, 41)):
        assert settings.template.startswith("<|im_start|>system\nYou are a promt engineer. Describe the ")
        assert settings.template.endswith("<|im_end|>\n<|im_start|>user\n{}<|im_end|>")
        assert settings.num_dropped_tokens == tokens
        assert (settings.states, settings.max_length) == ((-1,), 512)
    assert CLIP_SETTINGS.template.count("\n") == 9


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("shift", [3.0, 10.0])
def test_noise_levels_are_the_maker_s(steps: int, shift: float) -> None:
    even = torch.linspace(1, 0, steps + 1)

    sigmas = solver_for("euler", steps, shift).schedule.sigmas

    torch.testing.assert_close(sigmas, shift * even / (1 + (shift - 1) * even), rtol=1e-6, atol=1e-7)


def test_a_training_learns_noise_less_clip_at_1000_times_the_share_of_noise() -> None:
    latents, noise = torch.zeros(1, 2), torch.ones(1, 2)
    assert (NOISE.training_offset, NOISE.output_sign) == (0, 1)
    assert torch.equal(NOISE.velocity(latents, noise, torch.ones(1)), noise - latents)


@pytest.mark.parametrize(
    ("name", "dim", "task"),
    [
        ("kandinsky5lite_t2v_sft_5s.safetensors", 1792, "k5-lite-t2v-5s-sd"),
        ("kandinsky5lite_t2v_pretrain_10s.safetensors", 1792, "k5-lite-t2v-10s-sd"),
        ("kandinsky5lite_i2v_5s.safetensors", 1792, "k5-lite-i2v-5s-sd"),
        ("Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers transformer x", 4096, "k5-pro-i2v-5s-sd"),
        ("kandinsky5pro_t2v_sft_10s.safetensors", 4096, "k5-pro-t2v-10s-sd"),
        ("kandinsky5pro_t2v_sft_5s_hd.safetensors", 4096, "k5-pro-t2v-5s-hd"),
        ("my_tune.safetensors", 1792, "k5-lite-t2v-5s-sd"),
    ],
)
def test_a_name_says_the_task(name: str, dim: int, task: str) -> None:
    assert guess_task(name, dim, kind="video").name == task
    assert guess_task(name, 2560, kind=T2I).name == "k5-lite-t2i-hd"


def test_files_say_the_task(
    files: TinyKandinsky, image_files: TinyKandinsky, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert select_task(None, image_files.dit).name == "k5-lite-t2i-hd"
    assert "--task is k5-lite-t2i-hd" in caplog.text
    assert select_task(None, files.dit).name == "k5-lite-t2v-5s-sd"
    assert select_task(None, None, image_files.vae).name == "k5-lite-t2i-hd"
    assert select_task(None, None, files.vae).name == "k5-lite-t2v-5s-sd"
    assert select_task(None, Path("kandinsky5pro_i2v_sft_5s.safetensors")).name == "k5-pro-i2v-5s-sd"


def test_a_name_that_says_otherwise_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    select_task("k5-lite-t2v-5s-sd", Path("kandinsky5lite_i2v_5s.safetensors"))

    assert "is named as a file that starts from an image" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kandinsky5lite_t2v_sft_5s", (50, 5.0)),
        ("kandinsky5lite_t2v_nocfg_5s", (50, 1.0)),
        ("kandinsky5lite_t2v_distilled16steps_5s", (16, 1.0)),
    ],
)
def test_a_name_says_whether_there_is_guidance(
    files: TinyKandinsky, name: str, expected: tuple[int, float]
) -> None:
    family = describe(files, "k5-lite-t2v-5s-sd")
    path = files.dit.with_name(f"{name}.safetensors")

    default = replace(family, files=replace(family.files, dit=path)).defaults

    assert (default.steps, default.guidance_scale) == expected


def test_a_task_for_another_file_is_refused(files: TinyKandinsky, image_files: TinyKandinsky) -> None:
    with pytest.raises(OptionError, match=r"makes clips .*Use --task k5-lite-t2v-5s-sd"):
        prepare(describe(files, "k5-lite-t2i-hd"))
    with pytest.raises(OptionError, match=r"makes images\. Use --task k5-lite-t2i-hd"):
        prepare(describe(image_files, "k5-lite-i2v-5s-sd"))


@pytest.mark.parametrize(
    ("manifest", "task", "remedy"),
    [
        ("kandinsky5-lite-dit", "k5-pro-i2v-5s-hd", "k5-lite-i2v-5s-sd"),
        ("kandinsky5-pro-dit", "k5-lite-t2v-10s-sd", "k5-pro-t2v-10s-sd"),
    ],
)
def test_a_task_of_another_size_is_refused(
    tmp_path: Path, files: TinyKandinsky, manifest: str, task: str, remedy: str
) -> None:
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list(manifest))

    with pytest.raises(OptionError, match=rf"is of the size .*Use --task {remedy}"):
        prepare(describe(replace(files, dit=path), task))
    KandinskyFiles(path, task=TASKS[remedy]).check_task()


def test_requests_that_a_task_cannot_fulfil_are_refused(
    files: TinyKandinsky, image_files: TinyKandinsky, tmp_path: Path
) -> None:
    i2v = describe(files, "k5-lite-i2v-5s-sd")
    write_image(tmp_path / "start.png", 32, 32)
    with pytest.raises(OptionError, match=r"--image_path is missing"):
        prepare(i2v)
    with pytest.raises(OptionError, match=r"the video has only one"):
        prepare(i2v, image_path=tmp_path / "start.png", frames=1)
    with pytest.raises(OptionError, match=r"makes one image"):
        prepare(describe(image_files, "k5-lite-t2i-hd"), frames=5)
    with pytest.raises(OptionError, match=r"must be multiples of 16"):
        prepare(describe(files, "k5-lite-t2v-5s-sd"), width=40, height=32)


def test_frames_are_rounded_down(files: TinyKandinsky, caplog: pytest.LogCaptureFixture) -> None:
    assert prepare(describe(files, "k5-lite-t2v-5s-sd"), frames=23).frames == 21
    assert "4n + 1" in caplog.text


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1536, 1024), (768, 512)), ((512, 768), (512, 768)), ((300, 300), (624, 624))],
)
def test_a_clip_has_the_shape_of_its_first_image(
    files: TinyKandinsky, tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    path = tmp_path / "start.png"
    write_image(path, *size)

    prepared = prepare(describe(files, "k5-lite-i2v-5s-sd"), image_path=path)

    assert (prepared.width, prepared.height) == expected == size_like_image(path, 512 * 768)
    asked = prepare(describe(files, "k5-lite-i2v-5s-sd"), image_path=path, width=64, height=32)
    assert (asked.width, asked.height) == (64, 32)


@pytest.mark.parametrize("frames", [5, 7, 31])
def test_first_frames_are_corrected_as_in_diffusers(frames: int) -> None:
    latents = torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(1)) * 1.7 + 0.3
    latents[:, :, :4] = latents[:, :, :4] * 1.6 - 0.4
    pipe = object.__new__(Kandinsky5I2VPipeline)

    theirs = pipe.normalize_first_frame(latents.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    torch.testing.assert_close(match_first_frames(latents), theirs, rtol=1e-5, atol=1e-5)


def test_fewer_frames_are_not_corrected() -> None:
    """diffusers gives NaN, as there is nothing to compare with."""
    latents = torch.randn(1, 16, 4, 4, 6)

    assert torch.equal(match_first_frames(latents), latents)


def make_batch(**changes: Any) -> Batch:
    tensors: dict[str, Any] = {
        "latents": torch.zeros(1, 16, 1, 4, 4),
        "text_embeds": [torch.zeros(3, 64)],
        "pooled_embed": torch.zeros(1, 64),
        **changes,
    }
    return Batch({name: value for name, value in tensors.items() if value is not None}, ("a",), ("a.png",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embeds": None}, "has no text_embeds"),
        ({"pooled_embed": None}, "has no pooled_embed"),
        ({"text_embeds": [torch.zeros(3, 8)]}, "has width 8"),
        ({"pooled_embed": torch.zeros(1, 8)}, "has width 8"),
    ],
)
def test_a_text_cache_of_another_encoder_is_refused(
    files: TinyKandinsky, changes: dict[str, Any], message: str
) -> None:
    batch = make_batch(**changes)

    with pytest.raises(CacheError, match=rf"{message}(.|\n)*kandinsky_cache_text_encoder_outputs\.py"):
        describe(files, "k5-lite-t2v-5s-sd").batch_conditions(torch.zeros(1, 16, 1, 4, 4), batch)


def test_a_caption_in_the_template_of_images_is_refused_for_clips(files: TinyKandinsky) -> None:
    origin = CacheOrigin(Path("a_te.safetensors"), "qwen", {"qwen_template": IMAGE_SETTINGS.fingerprint})
    batch = replace(make_batch(), cache_origins=(origin,))

    with pytest.raises(CacheError, match=r"template for another task than k5-lite-t2v-5s-sd"):
        describe(files, "k5-lite-t2v-5s-sd").batch_conditions(torch.zeros(1, 16, 1, 4, 4), batch)


def test_latents_are_not_those_of_other_families() -> None:
    assert list_same_latents("kandinsky") == {"kandinsky", "kandinsky_6"}


@pytest.mark.parametrize(
    ("task", "probability", "expected"),
    [
        ("k5-lite-t2v-5s-sd", None, 0.0),
        ("k5-lite-i2v-5s-sd", None, 1.0),
        ("k5-lite-t2v-5s-sd", 0.25, 0.25),
        ("k5-lite-t2i-hd", None, 0.0),
    ],
)
def test_the_first_frame_is_given_as_the_task_says(
    files: TinyKandinsky, task: str, probability: float | None, expected: float
) -> None:
    options = KandinskyTrainingOptions(task=task, dit=files.dit, first_frame_probability=probability)

    family = family_for_training(options)

    assert family.noise.first_frame_probability == expected
    assert family.options.first_frame_probability == expected


def test_images_have_no_first_frame() -> None:
    with pytest.raises(OptionError, match=r"--first_frame_probability 0\.5: .*makes images"):
        KandinskyTrainingOptions(task="k5-lite-t2i-hd", first_frame_probability=0.5)


def test_a_vae_of_the_other_kind_is_refused(files: TinyKandinsky, image_files: TinyKandinsky) -> None:
    with pytest.raises(CheckpointError, match="HunyuanVideo"):
        replace(describe(files, "k5-lite-t2v-5s-sd").files, vae=image_files.vae).check()
    with pytest.raises(CheckpointError, match="FLUX"):
        replace(describe(image_files, "k5-lite-t2i-hd").files, vae=files.vae).check()


def test_an_encoder_of_another_width_is_refused(files: TinyKandinsky, tmp_path: Path) -> None:
    wide = write_dit(tmp_path, tiny_state(text_dim=96), name="wide")
    with pytest.raises(CheckpointError, match=r"width 64(.|\n)*takes width 96"):
        replace(describe(files, "k5-lite-t2v-5s-sd").files, dit=wide).check()
    pooled = write_dit(tmp_path, tiny_state(pooled_dim=96), name="pooled")
    with pytest.raises(CheckpointError, match=r"width 64(.|\n)*takes width 96"):
        replace(describe(files, "k5-lite-t2v-5s-sd").files, dit=pooled).check()


def test_a_network_that_enlarges_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "kandinsky6 sr.safetensors"
    tensor = "time_embeddings.timestep_embedder.linear_1.weight"
    save_file({**tiny_state(), tensor: torch.zeros(2, 2)}, path)

    with pytest.raises(CheckpointError, match="upscaling transformer of Kandinsky 6"):
        family_for_generation(KandinskyGenerationOptions(task="k5-lite-t2v-5s-sd", dit=path)).check_files(
            False
        )


def test_musubi_tuner_s_spellings_are_read(tmp_path: Path) -> None:
    """Of its sparse attention nothing is needed, as attention is always full."""
    family = family_called("kandinsky")
    family.prepare(tmp_path)
    models = family.generate[: family.generate.index("--negative_prompt")]
    request = "--prompt cat --seed 3 --steps 2 --guidance 3 --frames 5 --width 48 --height 32"
    request += " --scheduler_scale 5 --output made --force_nabla_attention --nabla_P 0.9 --i2v_mode first"
    usual = "--prompt cat --seed 3 --infer_steps 2 --guidance_scale 3 --video_length 5 --video_size 32 48"
    usual += " --flow_shift 5 --save_path usual"

    for words in (request, usual):
        code, said = run_here(*models, *words.split(), "--output_type", "latent", folder=tmp_path)
        assert code == 0, said

    assert torch.equal(latents_in(tmp_path / "made"), latents_in(tmp_path / "usual"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--i2v_mode first_last", "ends freely"),
        ("--width 48", "pass both --height and --width"),
        ("--width 48 --height 32 --video_size 64 64", "pass one of them"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path: Path, words: str, message: str) -> None:
    family = family_called("kandinsky")
    more = ["--prompt", "a cat", "--save_path", "out"]

    code, said = run_here(*family.generate, *more, *words.split(), folder=tmp_path)

    assert message in assert_one_message(code, said)


@pytest.mark.parametrize("task", ["k5-lite-i2i-hd", "k7-lite"])
def test_a_task_that_is_not_built_is_refused_in_one_message(tmp_path: Path, task: str) -> None:
    family = family_called("kandinsky")
    words = [task if word == "k5-lite-t2v-5s-sd" else word for word in family.generate]

    code, said = run_here(*words, "--prompt", "a cat", "--save_path", "out", folder=tmp_path)

    assert task in assert_one_message(code, said)


def test_metadata_name_model_and_task(files: TinyKandinsky) -> None:
    metadata = describe(files, "k5-lite-i2v-5s-sd").metadata

    assert (metadata["model_type"], metadata["task"]) == ("kandinsky5", "k5-lite-i2v-5s-sd")
    assert metadata["sd_model_name"] == "dit.safetensors"
