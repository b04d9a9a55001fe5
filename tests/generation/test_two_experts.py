"""wan_generate_video.py with two experts: equal numbers however they are loaded, and features with both."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import wan_generate_video
from modules.errors import CheckpointError, OptionError
from modules.media.reading import read_tags
from modules.media.writing import write_video
from networks.loading import LoraUse, read_lora
from networks.merging import merge_into_file
from tests.generation.guided import STEPS, Script, is_finite
from tests.tiny.project import moving_square, write_lora
from tests.tiny.wan import TinyWan, write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

# two steps of each expert
LENGTH = ("--task", "t2v-A14B", "--video_length", "5", "--flow_shift", "5")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    folder = tmp_path_factory.mktemp("experts")
    files = write_tiny_wan(folder, experts=2)
    for number, name in enumerate(("low", "high"), 2):
        write_lora(folder / f"{name}.safetensors", files.dit, number)
    write_video(folder / "clip.mp4", moving_square(9, 32, 32, seed=0), 16)
    return files


@pytest.fixture(scope="module")
def script(files: TinyWan) -> Script:
    return Script(wan_generate_video.main, [*files.models, *LENGTH])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, script: Script) -> torch.Tensor:
    return script.latents(tmp_path_factory.mktemp("plain"))


def loras(files: TinyWan, *names: str) -> list[str]:
    options = {"low": "--lora_weight", "high": "--lora_weight_high_noise"}
    return [word for name in names for word in (options[name], str(files.dit.parent / f"{name}.safetensors"))]


def loads(caplog: pytest.LogCaptureFixture, files: TinyWan) -> tuple[int, int]:
    """How often the experts were loaded: for low noise, for high noise."""
    return caplog.text.count(f"Loading {files.dit}:"), caplog.text.count(f"Loading {files.dit_high_noise}:")


def test_latents_are_equal_to_the_bit_however_the_experts_are_loaded(
    tmp_path: Path, files: TinyWan, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked = [*loras(files, "low", "high"), "--fp8_scaled", "--blocks_to_swap", "1"]
    ahead = script.latents(tmp_path / "ahead", *asked)
    assert (
        "low-noise transformer is read into host memory while the high-noise transformer works" in caplog.text
    )
    assert torch.equal(script.latents(tmp_path / "lazy", *asked, "--lazy_loading"), ahead)
    assert "as --lazy_loading asks" in caplog.text
    assert torch.equal(script.latents(tmp_path / "alone", *asked, "--offload_inactive_dit"), ahead)


@pytest.mark.parametrize(
    ("options", "videos"),
    [
        pytest.param(("--num_videos", "2"), 2, marks=pytest.mark.slow),
        (("--sheet", "guidance_scale_high_noise=2,3", "--output_type", "both"), 2),
    ],
    ids=["several videos", "sheet"],
)
def test_no_expert_is_loaded_twice(
    tmp_path: Path,
    files: TinyWan,
    script: Script,
    options: tuple[str, ...],
    videos: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    script.run(tmp_path, *options)
    paths = list(tmp_path.rglob("*_latent.safetensors"))
    assert len(paths) == videos
    assert loads(caplog, files) == (1, 1)
    if "--sheet" in options:
        scales = [safe_open(path, "pt").metadata()["bt_guidance_scale_high_noise"] for path in paths]
        assert sorted(scales) == ["2.0", "3.0"]


def test_each_expert_has_its_own_loras(
    tmp_path: Path, files: TinyWan, script: Script, plain: torch.Tensor
) -> None:
    assert files.dit_high_noise is not None
    merged = tmp_path / "merged.safetensors"
    lora = read_lora(files.dit.parent / "high.safetensors")
    merge_into_file(files.dit_high_noise, [LoraUse(lora, 0.5)], merged, torch.device("cpu"))
    expected = script.latents(tmp_path / "merged", "--dit_high_noise", merged)
    asked = [*loras(files, "high"), "--lora_multiplier_high_noise", "0.5"]
    assert torch.equal(script.latents(tmp_path / "high", *asked), expected)
    assert not torch.equal(expected, plain)
    low = script.latents(tmp_path / "low", *loras(files, "low"))
    assert not torch.equal(low, plain)
    # patterns count over the files of both
    one = script.latents(
        tmp_path / "one", *loras(files, "low", "high"), "--include_patterns", ".", "no such tensor"
    )
    assert torch.equal(one, low)


def test_the_metadata_tells_the_experts_apart(tmp_path: Path, files: TinyWan, script: Script) -> None:
    script.run(tmp_path, *loras(files, "low", "high"), "--output_type", "video", "--video_length", "1")
    (path,) = tmp_path.rglob("*.png")
    found = read_tags(path)
    expected = {
        "bt_guidance_scale": "3.0",
        "bt_guidance_scale_high_noise": "4.0",
        "bt_timestep_boundary": "875",
        "bt_dit_high_noise": "dit_high.safetensors",
        "bt_lora_0": "low.safetensors: 1.0",
        "bt_lora_high_noise_0": "high.safetensors: 1.0",
    }
    assert {name: found[name] for name in expected} == expected


SLG = ("--slg_layers", "1", "--slg_end", "1", "--slg_mode", "original", "--slg_scale")
MAG = ("--magcache_mag_ratios", "1", "1", "1", "1", "--magcache_retention_ratio", "0", "--magcache_threshold")
FEATURES = {  # options with a value that changes nothing, and with one that does
    "guidance of high noise": (("--guidance_scale_high_noise", "4"), ("--guidance_scale_high_noise", "2")),
    "boundary": (("--timestep_boundary", "0.875"), ("--timestep_boundary", "0.95")),
    "schedule": (("--cfg_schedule", f"1-{STEPS}"), ("--cfg_schedule", "1-3:4")),
    "slg": ((*SLG, "0"), (*SLG, "2")),
    "zero star": (("--cfgzerostar_init_steps", "0"), ("--cfgzerostar_scaling",)),
    "nag": (("--nag_scale", "1"), ("--nag_scale", "4")),
    "riflex": (("--riflex_index", "0"), ("--riflex_index", "1", "--rope_func", "comfy")),
    "magcache": ((*MAG, "0"), (*MAG, "1")),
    "teacache": (
        ("--teacache_threshold", "0"),
        ("--teacache_threshold", "9", "--teacache_coefficients", "1", "0"),
    ),
    "preview": (("--preview_latent_every", "1"), None),
    "video": (None, ("--video_path", "{folder}/clip.mp4", "--v2v_denoise", "0.75")),
    "late video": (None, ("--video_path", "{folder}/clip.mp4", "--v2v_denoise", "0.5")),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_act_with_two_experts_and_neutral_values_change_no_bit(
    tmp_path: Path, files: TinyWan, script: Script, plain: torch.Tensor, name: str
) -> None:
    neutral, real = FEATURES[name]
    if neutral is not None:
        assert torch.equal(script.latents(tmp_path / "neutral", *neutral), plain)
    if real is not None:
        words = [word.format(folder=files.dit.parent) for word in real]
        changed = script.latents(tmp_path / "real", *words)
        assert is_finite({1: changed})
        assert float((changed - plain).abs().max()) > 1e-4


def test_the_transformer_for_much_noise_alone_makes_no_video(tmp_path: Path, files: TinyWan) -> None:
    words = ["--save_path", tmp_path, "--task", "t2v-A14B", "--prompt", "a cat"]
    with pytest.raises(OptionError, match="--dit is missing"):
        wan_generate_video.main([str(word) for word in (*words, "--dit_high_noise", files.dit_high_noise)])


def test_a_lora_for_a_file_in_fp8_that_works_late_is_refused_before_anything_loads(
    tmp_path: Path, files: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    low = write_dit(tmp_path, tiny_state("t2v"), "fp8_scaled")
    words = [*replace(files, dit=low).models, *LENGTH, *loras(files, "low")]
    with pytest.raises(CheckpointError, match="too coarse to add a LoRA"):
        Script(wan_generate_video.main, words).run(tmp_path, "--fp8")
    assert "Loading" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: [*words, "--lora_weight_high_noise", words[1]], "which is not given"),
        (lambda words: [*words, "--include_patterns", "a"], "1 patterns for 0 LoRA files"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_loads(
    tmp_path: Path,
    files: TinyWan,
    change: Callable[[list[str]], list[str]],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    words = ["--dit", str(files.dit.parent / "high.safetensors")]
    words += ["--vae", str(files.vae), "--t5", str(files.t5)]
    single = Script(wan_generate_video.main, [*change(words), *LENGTH, "--dit", str(files.dit)])
    with pytest.raises(OptionError, match=message):
        single.run(tmp_path)
    assert "Loading" not in caplog.text
