"""Folders given to --ckpt_dir, and transformers whose names contradict their options."""

import json
import logging
import re
from pathlib import Path

import pytest

from generation.options import read_generation
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, expert_of_file
from modules.errors import CheckpointError, OptionError
from networks.names.video import WAN
from wan.files import WanFiles, add_release, check_names, files_and_boundary, read_release
from wan.options import WanGenerationOptions
from wan.spec import LATENT, LATENT_5B
from wan_generate_video import DEFAULTS


def make(folder: Path, *names: str) -> Path:
    """Empty files, and folders for names that end in a slash."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return folder


OFFICIAL = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/")


def test_a_release_of_a14b_has_both_transformers(tmp_path: Path) -> None:
    folder = make(tmp_path, *OFFICIAL, "Wan2.1_VAE.pth", "low_noise_model/", "high_noise_model/")

    files, boundary = read_release(folder, LATENT)

    assert boundary is None, "the task's"
    assert files == {
        "dit": folder / "low_noise_model",
        "dit_high_noise": folder / "high_noise_model",
        "vae": folder / "Wan2.1_VAE.pth",
        "t5": folder / OFFICIAL[0],
        "t5_tokenizer": folder / "google/umt5-xxl",
    }


def test_a_release_of_5b_has_its_own_vae_and_one_transformer(tmp_path: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    folder = make(tmp_path, *OFFICIAL, *shards, "Wan2.2_VAE.pth")

    files, _ = read_release(folder, LATENT_5B)

    assert files["dit"] == folder
    assert files["vae"] == folder / "Wan2.2_VAE.pth"
    assert "dit_high_noise" not in files


@pytest.mark.parametrize("has_experts", [True, False])
def test_the_second_transformer_of_a_pipeline_is_for_little_noise(tmp_path: Path, has_experts: bool) -> None:
    parts = ("vae/", "text_encoder/", "tokenizer/", "transformer/")
    folder = make(tmp_path, *parts, *(("transformer_2/",) if has_experts else ()))
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.7}), encoding="utf-8")

    files, boundary = read_release(folder, LATENT)

    assert boundary == (700.0 if has_experts else None)
    assert files == dict(
        dit=folder / ("transformer_2" if has_experts else "transformer"),
        **({"dit_high_noise": folder / "transformer"} if has_experts else {}),
        vae=folder / "vae",
        t5=folder / "text_encoder",
        t5_tokenizer=folder / "tokenizer",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"boundary_ratio": 875}', "boundary_ratio .* is 875, not a share"),
        ('{"boundary_ratio": "__import__"}', "boundary_ratio .* is '__import__', not a share"),
        ('{"boundary_ratio": true}', "boundary_ratio .* is True, not a share"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    (make(tmp_path, "transformer_2/") / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"--ckpt_dir: .*{message}"):
        read_release(tmp_path, LATENT)


def test_files_that_are_given_go_first_and_dit_alone_stays_alone() -> None:
    release = {"dit": Path("low"), "dit_high_noise": Path("high")}
    release |= {"vae": Path("release/vae"), "t5": Path("release/t5")}
    assert add_release(WanFiles(vae=Path("mine")), release) == WanFiles(
        dit=Path("low"), dit_high_noise=Path("high"), vae=Path("mine"), t5=Path("release/t5")
    )
    assert add_release(WanFiles(dit=Path("one")), release).dit_high_noise is None
    both = add_release(WanFiles(dit_high_noise=Path("mine")), release)
    assert (both.dit, both.dit_high_noise) == (Path("low"), Path("mine"))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", HIGH_NOISE),
        ("wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors", LOW_NOISE),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled.safetensors", HIGH_NOISE),
        ("low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", LOW_NOISE),
        ("HighNoise.safetensors", HIGH_NOISE),
        ("highres-lowlight.safetensors", None),
        ("high_and_low.safetensors", None),
        ("transformer", None),
        ("pipeline/transformer", HIGH_NOISE),
        ("pipeline/transformer_2", LOW_NOISE),
    ],
)
def test_a_name_says_which_expert_a_file_is(tmp_path: Path, name: str, expert: str | None) -> None:
    make(tmp_path, "pipeline/transformer/", "pipeline/transformer_2/", "transformer/")
    assert expert_of_file(tmp_path / name, dict(WAN.experts)) == expert


def test_swapped_files_are_refused() -> None:
    with pytest.raises(OptionError, match="swap the two"):
        check_names(Path("a_high_noise.safetensors"), Path("a_low_noise.safetensors"))


@pytest.mark.parametrize(
    ("dit", "high", "message"),
    [
        ("a_high_noise.st", None, "--dit a_high_noise.st is used for all noise levels, but .* much noise"),
        (
            None,
            "a_low_noise.st",
            "--dit_high_noise a_low_noise.st is used for much noise, but .* little noise",
        ),
        ("a_high_noise.st", "b.st", "--dit a_high_noise.st is used for little noise"),
        ("a.st", "a.st", "are the same file"),
        ("a_low_noise.st", "a_high_noise.st", None),
        ("a_low_noise.st", None, None),
    ],
)
def test_one_name_that_contradicts_its_option_is_a_warning(
    caplog: pytest.LogCaptureFixture, dit: str | None, high: str | None, message: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        check_names(None if dit is None else Path(dit), None if high is None else Path(high))
    if message is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert re.search(message, record.message)


def test_a_boundary_without_a_second_transformer_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where --ckpt_dir might have had one."""
    words = ["--save_path", "made", "--task", "t2v-A14B", "--dit", "one.st", "--timestep_boundary", "0.5"]
    words += ["--prompt", "a cat"]
    with caplog.at_level(logging.WARNING):
        _, options = read_generation(None, DEFAULTS, WanGenerationOptions, words)
        assert not caplog.records  # the folder is not looked at yet
        files_and_boundary(options)
    assert caplog.text.count("--timestep_boundary is ignored because there is no --dit_high_noise") == 1
    assert caplog.text.count("is ignored") == 1
