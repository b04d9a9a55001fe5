"""LTX-2's own options: what follows from them, names of the known tuner's scripts, and refusals."""

import json
import re
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from dataset.batches.example import ExampleItem
from dataset.table import Guide
from generation.options import read_generation
from generation.outputs import name_job
from generation.sample_lines import parse_sample_line
from ltx2_generate_video import DEFAULTS, settle
from ltx_2.given_media_options import Ltx2GivenMedia
from ltx_2.model_options import CHECKPOINT, GEMMA, Ltx2GuidanceOptions
from ltx_2.options import (
    Ltx2GenerationOptions,
    Ltx2LatentCachingOptions,
    Ltx2TextCachingOptions,
    Ltx2TrainingOptions,
    caching_options,
    generation_options,
    log_ignored,
    resolve_generation,
)
from ltx_2.reference_options import Ltx2ReferenceOptions
from modules.errors import OptionError
from modules.option_values import missing_words, option_argv
from modules.options import Options, read_options
from modules.parser import Parser, add_options, reject_unsupported
from modules.speed_options import GENERATION_VALUES
from tests.training.toy import ToyFamily
from training.samples import sample_request

DATA = Path(__file__).parent.parent / "data" / "cli"
OWN: dict[str, type[Options]] = {
    "ltx2_cache_latents": Ltx2LatentCachingOptions,
    "ltx2_cache_text_encoder_outputs": Ltx2TextCachingOptions,
    "ltx2_train_network": Ltx2TrainingOptions,
    "ltx2_generate_video": Ltx2GenerationOptions,
}


def read_own(script: str, *words: str) -> Any:
    """The family's own record for a command."""
    parser = Parser()
    add_options(parser, OWN[script])
    args = parser.parse_args(words)
    reject_unsupported(parser, args)
    return read_options(OWN[script], args)


def test_streams_follow_from_the_mode() -> None:
    for typed, streams in (("v", ("video",)), ("va", ("video", "audio"))):
        for flag in ("--ltx2_mode", "--ltx_mode"):
            assert read_own("ltx2_cache_latents", flag, typed).model.streams == streams
    assert read_own("ltx2_generate_video").model.streams == ("video",)
    words = ("--ltx2_mode", "av", "--lora_target_preset", "audio")  # refused without sound
    assert read_own("ltx2_train_network", *words).lora_target_preset == "audio"


def test_gemma_is_one_file_or_a_folder(tmp_path: Path) -> None:
    text = read_own("ltx2_cache_text_encoder_outputs").text
    assert (text.gemma, text.tokenizer) == (GEMMA, None)
    words = ("--gemma_safetensors", "gemma.safetensors")
    text = read_own("ltx2_cache_text_encoder_outputs", *words).text
    assert (text.gemma, text.tokenizer) == (Path("gemma.safetensors"), None)
    text = read_own("ltx2_cache_text_encoder_outputs", *words, "--gemma_root", str(tmp_path)).text
    assert text.tokenizer == tmp_path


def test_the_dtype_of_texts_has_two_names() -> None:
    script = "ltx2_cache_text_encoder_outputs"
    assert read_own(script).text_dtype is None
    assert read_own(script, "--mixed_precision", "bf16").text_dtype == "bfloat16"
    assert read_own(script, "--text_encoder_dtype", "float16").text_dtype == "float16"
    with pytest.raises(OptionError, match="mean the same"):
        read_own(script, "--mixed_precision", "bf16", "--text_encoder_dtype", "float16")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("ltx2_cache_latents", ("--ltx2_audio_dtype", "bfloat16"), "cached in float32"),
        ("ltx2_train_network", ("--video_loss_weight", "0", "--audio_loss_weight", "0"), "nothing would be"),
        *(
            ("ltx2_train_network", words, "without audio .*--ltx2_mode av")
            for words in (
                ("--lora_target_preset", "audio"),
                ("--lora_target_preset", "audio_v2a", "--ltx2_mode", "video"),
                ("--ltx2_train_direction", "v2a"),
                ("--video_loss_weight", "0"),
            )
        ),
        ("ltx2_train_network", ("--ltx2_first_frame_conditioning_p", "2"), "from 0 to 1"),
        ("ltx2_train_network", ("--ltx2_remote_stage",), "--shard_base"),
        (
            "ltx2_train_network",
            ("--no-sample_i2v_token_timestep_mask",),
            "first frame that is given has time 0",
        ),
        ("ltx2_generate_video", ("--distilled-lora", "a.safetensors", "0.5"), "no such file"),
        ("ltx2_train_network", ("--sample_two_stage",), "pass --spatial_upsampler_path"),
        ("ltx2_generate_video", ("--video-conditioning", "a.mp4"), "a file and its strength"),
        ("ltx2_generate_video", ("--video-conditioning", "a.mp4", "2"), "from 0 to 1"),
        (
            "ltx2_generate_video",
            ("--video-conditioning", "a.mp4", "1", "--video-conditioning", "b.mp4", "0.5"),
            "strength 0.5 and 1",
        ),
        ("ltx2_generate_video", ("--duration-head-path", "a"), "Pass --video_length"),
        ("ltx2_generate_video", ("--output_name", "a/b"), "it contains a folder"),
        ("ltx2_generate_video", ("--height", "512"), "pass both"),
        ("ltx2_generate_video", ("--ltx2_mode", "v", "--drive_video", "."), "no audio is generated"),
        ("ltx2_generate_video", ("--ltx_mode", "a", "--sample_disable_audio"), "nothing would be generated"),
        (
            "ltx2_train_network",
            ("--ltx2_mode", "a", "--lora_target_preset", "v2v"),
            "without images nothing",
        ),
        ("ltx2_generate_video", ("--conditioning-attention-mask", "a.mp4"), "a strength from 0 to 1"),
        ("ltx2_generate_video", ("--conditioning-attention-mask", "a.mp4", "2"), "a strength from 0 to 1"),
        (
            "ltx2_train_network",
            ("--ic_lora_strategy", "none", "--ic_lora_ref_probability", "0.5"),
            "pass one of them",
        ),
    ],
)
def test_wrong_values_are_one_message(script: str, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_own(script, *words)


@pytest.mark.parametrize("name", ["--lora_target_preset", "--ic_lora_strategy"])
def test_references_of_sound_need_its_mode(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} av_ic: without audio .* Pass --ltx2_mode av"):
        read_own("ltx2_train_network", name, "av_ic")


def generated(*words: str) -> Any:
    """The shared record of a command that generates, with what LTX-2 calls otherwise."""
    argv = ["--save_path", "out", "--prompt", "a", *words]
    return resolve_generation(*read_generation(None, DEFAULTS, Ltx2GenerationOptions, argv))[0]


def own_of(*words: str) -> Any:
    return resolve_generation(generated(), read_own("ltx2_generate_video", *words))[1]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--audio_lr 1e-5", "network_reg_lrs=audio=1e-5"),
        ("--audio_dim 16", "network_reg_dims=audio=16"),
        ("--frozen_network_weights a.safetensors", "--base_weights FILE"),
        ("--blank_preservation", "--blank_prior_weight 1"),
        ("--dop", "--blank_prior_weight 1"),
        ("--dop_args class=person multiplier=0.5", "prior_loss_weight"),
        ("--tread_args start_layer_idx=3", "--tread_blocks 3 -4"),
        ("--huber_delta 0.5", "--huber_c"),
        ("--caption_dropout_rate 0.05", "a key of the tables"),
    ],
)
def test_what_has_another_name_here_is_refused_with_it(words: str, remedy: str) -> None:
    with pytest.raises(OptionError, match=re.escape(remedy)):
        read_own("ltx2_train_network", *words.split())


def test_known_names_of_shared_options_are_ours() -> None:
    size = ("--height", "320", "--width", "640", "--sample_num_frames", "17", "--frame_rate", "25")
    words = ("--sample_steps", "9", "--cfg_scale", "2.5", "--reference_image", "a.png")
    request = generated(*size, *words).request
    assert (request.video_size, request.video_length, request.fps) == ((320, 640), 17, 25)
    assert (request.infer_steps, request.guidance_scale, request.image_path) == (9, 2.5, Path("a.png"))
    request = generated("--video_length", "17", "--frame_count", "17").request
    assert (request.video_length, request.fps, request.video_size) == (17, 24, (512, 768))
    with pytest.raises(OptionError, match="--video_length 17 and --frame_count 25 mean the same"):
        generated("--video_length", "17", "--frame_count", "25")
    shared = generated("--discrete_flow_shift", "3.5", "--output_name", "cat")
    assert (shared.request.flow_shift, name_job(shared.output, datetime(2026, 1, 2), 7, "a")) == (
        3.5,
        "cat_20260102-000000_7",
    )
    assert own_of("--mixed_precision", "fp16").dit_dtype == "float16"
    assert own_of("--mixed_precision", "no").dit_dtype is None
    with pytest.raises(OptionError, match="mean the same"):
        own_of("--mixed_precision", "fp16", "--dit_dtype", "bfloat16")


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("", "sdpa"),
        ("--sage_attn", "sage"),
        ("--attn_mode flash2 --flash_attn", "flash"),
        ("--optimized --xformers", "xformers"),
        ("--attn_mode torch --flash_attn", ""),
        ("--flash3 --sage_attn", ""),
    ],
)
def test_kernels_and_fp8_by_their_known_names_are_ours_and_recorded(words: str, mode: str) -> None:
    if not mode:
        with pytest.raises(OptionError, match="choose different kernels: pass one"):
            generated(*words.split())
        return
    shared = generated("--fp8_base", *words.split())
    assert (shared.speed.fp8.fp8, shared.speed.attention.choice.mode) == (True, mode)
    recorded = shared.settings.get("attn_mode") or "torch"
    assert (shared.settings["fp8"], GENERATION_VALUES[recorded]) == (True, mode)


def test_fp8_by_its_known_name_is_multiplied_in_fp8(caplog: pytest.LogCaptureFixture) -> None:
    assert generated("--fp8_base", "--fp8_fast").speed.fp8.quantization.fp8_matmul
    assert "ignored" not in caplog.text


def test_the_folder_of_results_has_the_name_of_the_known_script() -> None:
    options, _ = read_generation(
        None, DEFAULTS, Ltx2GenerationOptions, ["--output_dir", "a", "--prompt", "b"]
    )
    assert options.output.save_path == Path("a")


@pytest.mark.parametrize("script", OWN)
def test_what_is_not_built_can_be_turned_off(script: str) -> None:
    text = (DATA / f"{script}.json").read_text(encoding="utf-8")
    flags = [flag for option in json.loads(text)["options"] for flag in option["flags"]]
    off = [flag for flag in flags if flag.startswith("--no-") and "i2v_token" not in flag]
    read_own(script, *off)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("--transformer-path", "a"), "model.ltx2_checkpoint"),
        (("--text-encoder-path", "a"), "text.ltx2_text_encoder_checkpoint"),
        (("--ltx2_video_vae", "a"), "vae.file.vae"),
        (("--video-vae-path", "a"), "vae.file.vae"),
        (("--ltx2_audio_vae", "a"), "vae.audio_vae"),
        (("--audio-vae-path", "a"), "vae.audio_vae"),
    ],
)
def test_spellings_of_the_official_scripts_are_ours(words: tuple[str, ...], path: str) -> None:
    assert attrgetter(path)(read_own("ltx2_generate_video", *words)) == Path("a")


def test_commands_that_follow_from_a_training_are_read_again() -> None:
    words = "--ltx2_mode av --dit dit.safetensors --gemma_load_in_8bit --stg_blocks 3 5 --audio_cfg_scale 6"
    words += " --gemma_root gemma"
    own = read_own("ltx2_train_network", *words.split())
    latents, texts = map(option_argv, caching_options(own))

    assert read_own("ltx2_cache_latents", *latents).model == own.model
    assert read_own("ltx2_cache_text_encoder_outputs", *texts).text == own.text
    made = read_own("ltx2_generate_video", *option_argv(generation_options(own, {})))
    assert (made.dit_file, made.guidance, made.text) == (Path("dit.safetensors"), own.guidance, own.text)
    assert read_own("ltx2_generate_video").dit_file == CHECKPOINT
    assert made.guidance.rescaling("audio") is None


def made_as_sample(line: str) -> tuple[Any, Ltx2GenerationOptions]:
    """The shared and the own record of the command that makes the sample of a line again."""
    sample = vars(sample_request(parse_sample_line(line), ToyFamily()))
    words = option_argv(generation_options(read_own("ltx2_train_network"), sample))
    argv = ["--save_path", "out", "--prompt", "a cat", *words]
    return resolve_generation(*read_generation(None, DEFAULTS, Ltx2GenerationOptions, argv))


def test_the_printed_command_gives_the_parts_that_a_sample_gives(tmp_path: Path) -> None:
    mask = tmp_path / "m.png"
    mask.touch()
    line = f"a cat --gk 0:a.png --gk 48:b.png:0.5 --gl 2:c.png --im {mask} --ii 1 --it 0.25"

    assert made_as_sample(line)[1].given == Ltx2GivenMedia(
        keyframe=("0:a.png", "48:b.png:0.5"),
        latent_frame=("2:c.png",),
        inpaint_mask=mask,
        inpaint_invert=True,
        inpaint_threshold=0.25,
    )
    assert made_as_sample("a cat")[1].given == Ltx2GivenMedia()


@pytest.mark.parametrize(("line", "fps"), [("a cat --fps 25", 25.0), ("a cat", 24.0)])
def test_the_printed_command_has_the_frame_rate_of_the_sample(line: str, fps: float) -> None:
    """It decides the positions of frames in time, and how long the audio is."""
    assert made_as_sample(line)[0].request.fps == fps


@pytest.mark.parametrize("count", [1, 2])
def test_the_printed_command_has_all_references_of_the_sample(tmp_path: Path, count: int) -> None:
    references = tuple(tmp_path / f"{index}.mp4" for index in range(count))
    for path in references:
        path.touch()
    line = " --rv ".join(["a cat", *map(str, references)])

    assert made_as_sample(line)[1].references.paths == references
    example = ExampleItem(references=references)
    words = generation_options(read_own("ltx2_train_network"), {"example": example})
    assert read_own("ltx2_generate_video", *option_argv(words)).references.paths == references


LEARNED = [
    (
        "--ltx2_extend_prefix_frames 8",
        "--extend_prefix CLIP_FILE --extend_prefix_frames 57 --video_length 129",
    ),
    (
        "--ltx2_extend_suffix_frames 8 --ltx2_extend_p 0.5",
        "--extend_suffix LATER_CLIP_FILE --extend_suffix_frames 65 --video_length 129",
    ),
    ("--ltx2_extend_suffix_frames 8 --ltx2_extend_suffix_p 0", ""),
    (
        "--ltx2_spatial_crop --ltx2_spatial_crop_p 1",
        "--outpaint_source SOURCE_FILE --outpaint_region 64,32,128,64",
    ),
    (
        "--ltx2_inpaint_mask --ltx2_inpaint_mask_p 1 --ltx2_inpaint_mask_invert",
        "--inpaint_source SOURCE_FILE --inpaint_mask MASK_FILE --inpaint_invert",
    ),
    ("--ltx2_first_frame_conditioning_p 1", "--image_path IMAGE_FILE"),
    ("--video_anchor_training", "--latent_frame 0:IMAGE_FILE"),
    ("--keyframe_endpoint_training", "--keyframe 0:IMAGE_FILE"),
    ("--ltx2_mode av --ltx2_train_direction a2v", "--drive_audio AUDIO_FILE"),
    (
        "--ltx2_mode av --ltx2_audio_extend_prefix_frames 50",
        "--audio_prefix AUDIO_FILE --audio_prefix_seconds 2.0",
    ),
    (
        "--ltx2_mode av --ltx2_audio_inpaint_mask --ltx2_audio_inpaint_mask_p 1",
        "--audio_inpaint_audio AUDIO_FILE --audio_inpaint_interval START,END",
    ),
]


@pytest.mark.parametrize(("trained", "printed"), LEARNED)
def test_the_printed_command_is_given_what_the_training_gave(
    trained: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = read_own("ltx2_train_network", *trained.split())
    example = ExampleItem(spatial_crop_region=(32, 64, 96, 192))

    words = option_argv(generation_options(own, {"example": example}))
    without = option_argv(generation_options(read_own("ltx2_train_network"), {"example": example}))

    added = [word for word in words if word not in without]
    assert {*added} - {"--ltx2_mode", "av"} == {*printed.split()}
    assert {*missing_words(words)} >= {word for word in printed.split() if word.endswith("_FILE")}
    monkeypatch.chdir(tmp_path)
    for name in ("CLIP", "LATER_CLIP", "SOURCE", "MASK", "AUDIO", "IMAGE"):
        (tmp_path / f"{name}_FILE").touch()
    argv = ["--save_path", "out", "--prompt", "a cat", *(word.replace("START,END", "1,2") for word in words)]
    resolve_generation(*read_generation(None, DEFAULTS, Ltx2GenerationOptions, argv))


def test_guides_of_a_table_are_given_to_the_printed_command() -> None:
    guides = (Guide(Path("a"), -1, 1.0), Guide(Path("b"), 48, 0.5), Guide(Path("c"), 2, 1, is_keyframe=False))

    words = option_argv(
        generation_options(read_own("ltx2_train_network"), {"example": ExampleItem(guides=guides)})
    )

    text = " ".join(words)
    assert "--keyframe=-1:GUIDE_FILE:1 --keyframe 48:GUIDE_FILE:0.5 --latent_frame 2:GUIDE_FILE:1" in text


def test_a_sample_of_a_line_is_repeated_unless_the_lora_always_got_more() -> None:
    words = "--ltx2_extend_prefix_frames 8 --ltx2_extend_p"
    for share, has_clip in (("0.5", False), ("1", True)):
        own = read_own("ltx2_train_network", *words.split(), share)
        assert ("--extend_prefix" in generation_options(own, {"frames": 129})) == has_clip


def test_options_of_a_stream_that_is_not_made_are_told(caplog: pytest.LogCaptureFixture) -> None:
    guidance = Ltx2GuidanceOptions(video_cfg_scale=5.0, audio_cfg_scale=3.0)
    records = guidance, Ltx2ReferenceOptions(reference_downscale=2)
    log_ignored(["video", "audio"], *records)
    assert not caplog.messages

    log_ignored(["audio"], *records)
    log_ignored(["video"], *records)

    assert caplog.messages == [
        "--video_cfg_scale, --reference_downscale: ignored, because audio alone has no images",
        "--audio_cfg_scale: ignored, because images alone have no audio",
    ]
    caplog.clear()
    log_ignored(["video"], read_own("ltx2_train_network", "--video_loss_weight", "5"))
    read_own("ltx2_train_network", "--ltx_version_check_mode", "error")
    assert caplog.messages == [
        "--video_loss_weight: ignored, because images alone have no audio",
        "--ltx_version_check_mode error is ignored because --ltx_version is not given",
    ]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--flash_attn",), {"--attn_mode flash": "--flash_attn"}),
        (("--sage_attn",), {"--attn_mode sageattn": "--sage_attn"}),
        (("--sample_audio_only",), {"--ltx2_mode audio": "--sample_audio_only"}),
        (("--attn_mode", "flash"), {}),
    ],
)
def test_messages_name_what_was_typed_for_an_option_and_its_value(
    words: tuple[str, ...], names: dict[str, str]
) -> None:
    argv = ["--save_path", "out", "--prompt", "a", *words]
    options, _ = resolve_generation(*read_generation(None, DEFAULTS, Ltx2GenerationOptions, argv))
    assert {name: shown for name, shown in options.typed_names.items() if " " in name} == names


@pytest.mark.parametrize(
    "words", [("--codec", "h265"), ("--container", "mkv"), ("--keep_pngs",), ("--save_last_frame",)]
)
def test_options_of_video_files_are_refused_where_sound_is_alone(words: tuple[str, ...]) -> None:
    argv = ["--save_path", "out", "--prompt", "a", "--ltx2_mode", "audio", *words]
    with pytest.raises(OptionError, match=f"^{words[0]}: audio alone has no images"):
        settle(*read_generation(None, DEFAULTS, Ltx2GenerationOptions, argv))
