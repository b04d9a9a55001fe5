"""wan_generate_video.py with two experts: equal however loaded, their LoRAs, and features with both."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_generate_video
from generation.network_setup import expert_loras
from generation.options import ExpertOptions
from modules.errors import CheckpointError, OptionError
from modules.media.reading import read_tags
from modules.media.writing import write_video
from networks.apply import LoraPatch
from networks.loading import WeightedLora, read_lora
from networks.merging import merge_into_file
from networks.use_options import LoraOptions, LoraPatternOptions
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.rules import ONE_EXPERT, Expert
from tests.generation.guided import Script, is_finite
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


def test_no_expert_is_loaded_twice(
    tmp_path: Path, files: TinyWan, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    script.run(tmp_path, "--sheet", "guidance_scale_high_noise=2,3", "--output_type", "both")
    scales = [
        safe_open(path, "pt").metadata()["bt_guidance_scale_high_noise"]
        for path in tmp_path.rglob("*_latent.safetensors")
    ]
    assert sorted(scales) == ["2.0", "3.0"]
    for model in (files.dit, files.dit_high_noise):
        assert caplog.text.count(f"Loading {model}:") == 1


def test_each_expert_has_its_own_loras(
    tmp_path: Path, files: TinyWan, script: Script, plain: torch.Tensor
) -> None:
    assert files.dit_high_noise is not None
    merged = tmp_path / "merged.safetensors"
    lora = read_lora(files.dit.parent / "high.safetensors")
    merge_into_file(files.dit_high_noise, [WeightedLora(lora, 0.5)], merged, torch.device("cpu"))
    expected = script.latents(tmp_path / "merged", "--dit_high_noise", merged)
    asked = [*loras(files, "high"), "--lora_multiplier_high_noise", "0.5"]
    assert torch.equal(script.latents(tmp_path / "high", *asked), expected)
    assert not torch.equal(expected, plain)
    low = script.latents(tmp_path / "low", *loras(files, "low"))
    assert not torch.equal(low, plain)
    # its alpha in the header, as other programs have it
    tensors = load_file(files.dit.parent / "low.safetensors")
    (alpha,) = {float(tensors.pop(name)) for name in [*tensors] if name.endswith(".alpha")}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_alpha": str(4 * alpha)})
    quarter = "--lora_weight", tmp_path / "x.safetensors", "--lora_multiplier", "0.25"
    assert torch.equal(script.latents(tmp_path / "header", *quarter), low)
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
    assert found["parameters"].startswith("a cat\nNegative prompt: dull\n")  # for other viewers


MAG = ("--magcache_mag_ratios", "1", "1", "1", "1", "--magcache_retention_ratio", "0", "--magcache_threshold")
TEA = ("--teacache_coefficients", "1", "0", "--teacache_threshold")
FEATURES = {  # what is said of an expert or kept by it: with a value that changes nothing, and one that does
    "guidance of high noise": (("--guidance_scale_high_noise", "4"), ("--guidance_scale_high_noise", "2")),
    "boundary": (("--timestep_boundary", "0.875"), ("--timestep_boundary", "0.95")),
    "nag": (("--nag_scale", "1"), ("--nag_scale", "4")),
    "magcache": ((*MAG, "0"), (*MAG, "1")),
    "teacache": (("--teacache_threshold", "0"), (*TEA, "9")),
    "late video": (None, ("--video_path", "{folder}/clip.mp4", "--v2v_denoise", "0.5")),
}


@pytest.mark.slow_cases("guidance of high noise", "magcache", "nag")
@pytest.mark.parametrize("name", FEATURES)
def test_features_act_with_two_experts_and_neutral_values_change_no_bit(
    tmp_path: Path, files: TinyWan, script: Script, plain: torch.Tensor, name: str
) -> None:
    neutral, real = FEATURES[name]
    if neutral is not None:
        assert torch.equal(script.latents(tmp_path / "neutral", *neutral), plain)
    changed = script.latents(tmp_path / "real", *(word.format(folder=files.dit.parent) for word in real))
    assert is_finite({1: changed})
    assert float((changed - plain).abs().max()) > 1e-4


def test_the_transformer_for_much_noise_alone_makes_no_video(tmp_path: Path, files: TinyWan) -> None:
    words = ["--save_path", tmp_path, "--task", "t2v-A14B", "--prompt", "a cat"]
    with pytest.raises(OptionError, match="--dit is missing"):
        wan_generate_video.main([str(word) for word in (*words, "--dit_high_noise", files.dit_high_noise)])


def test_a_lora_is_added_beside_the_layers_of_a_file_in_fp8(
    tmp_path: Path, files: TinyWan, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the experts that share the device, and come to it in turns."""
    caplog.set_level(logging.INFO)
    low = write_dit(tmp_path, tiny_state("t2v"), "fp8_scaled")
    words = [*replace(files, dit=low).models, *LENGTH]
    without = Script(wan_generate_video.main, words).latents(tmp_path / "without", "--fp8")
    expected = Script(wan_generate_video.main, [*words, *loras(files, "low")]).latents(tmp_path / "merged")
    assert "linear layers stay in fp8" in caplog.text
    caplog.clear()
    found = Script(wan_generate_video.main, [*words, *loras(files, "low")]).latents(
        tmp_path / "beside", "--fp8"
    )
    assert "linear layers stay in fp8" in caplog.text
    assert float((found - expected).abs().max()) < 0.2 * float((without - expected).abs().max())


BOTH = (Expert(LOW_NOISE, 0.0, 875.0), Expert(HIGH_NOISE, 875.0))


def write_factors(path: Path, seed: int, *starts: str, width: int = 128) -> Path:
    """A LoRA of one module, or one below each of `starts`."""
    tensors: dict[str, Tensor] = {}
    for number, start in enumerate(starts or ("transformer.",)):
        made = torch.Generator().manual_seed(seed + number)
        name = f"{start}blocks.0.attn1.to_q.lora_"
        tensors[f"{name}A.weight"] = torch.randn(2, width, generator=made)
        tensors[f"{name}B.weight"] = torch.randn(width, 2, generator=made)
    save_file(tensors, path)
    return path


def uses_of(experts: tuple[Expert, ...], low: list[Path], high: list[Path]) -> list[tuple[WeightedLora, ...]]:
    """What each expert gets of the LoRAs of both options."""
    options = SimpleNamespace(
        lora=LoraOptions.from_defaults(lora_weight=tuple(low) or None),
        lora_patterns=LoraPatternOptions.from_defaults(),
        experts=ExpertOptions.from_defaults(lora_weight_high_noise=tuple(high) or None),
        latent_path=None,
    )
    return list(expert_loras(SimpleNamespace(experts=experts), options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["low", "high", "both"])
def test_a_file_for_both_is_used_in_both_once(tmp_path: Path, options: str) -> None:
    path = write_factors(tmp_path / "x.safetensors", 1, "transformer.", "transformer_2.")

    low, high = uses_of(BOTH, [path] if options != "high" else [], [path] if options != "low" else [])

    full = read_lora(path, by_expert=True)
    assert [use.lora.tensors.keys() for use in low] == [full.loras_by_expert[LOW_NOISE].tensors.keys()]
    for (use,), expert in ((low, LOW_NOISE), (high, HIGH_NOISE)):
        wanted = full.loras_by_expert[expert].tensors
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in use.lora.tensors.items())
        assert use.lora.expert == expert


def test_loras_for_an_expert_that_is_not_given_are_refused(tmp_path: Path) -> None:
    path = write_factors(tmp_path / "x.safetensors", 1)
    two = write_factors(tmp_path / "two.safetensors", 1, "transformer.", "transformer_2.")

    with pytest.raises(OptionError, match="--lora_weight_high_noise is for --dit_high_noise"):
        uses_of(ONE_EXPERT, [], [path])
    with pytest.raises(OptionError, match="use --lora_weight_high_noise"):
        uses_of(BOTH[1:], [path], [])
    with pytest.raises(CheckpointError, match="contains two LoRAs"):
        uses_of(ONE_EXPERT, [two], [])


@pytest.mark.parametrize(("said", "hints"), [("both", 1), ("low", 0)])
def test_a_lora_that_was_trained_in_both_is_not_put_into_one_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str, hints: int
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = load_file(write_factors(tmp_path / "y.safetensors", 1))
    save_file(tensors, path, {"ss_wan_expert": said})

    low, high = uses_of(BOTH, [path], [])

    assert (len(low), len(high)) == (1, 0)
    assert caplog.text.count("pass it to --lora_weight_high_noise too") == hints
    uses_of(BOTH, [path], [path])
    assert caplog.text.count("was trained for both experts") == hints


def merge(files: TinyWan, output: Path, *more: object) -> None:
    models = [*files.models, "--task", "t2v-A14B", "--save_path", output.parent, "--device", "cpu"]
    wan_generate_video.main([str(each) for each in (*models, "--save_merged_model", output, *more)])


def merged_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("m*"))


@pytest.mark.parametrize("is_one_file", [False, True])
def test_the_file_of_each_expert_has_its_own_loras(
    tmp_path: Path, is_one_file: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_tiny_wan(tmp_path, experts=2)
    both = ("both", "transformer.", "transformer_2.")
    names = [both, both] if is_one_file else [("low", "transformer."), ("high", "transformer.")]
    low, high = (
        write_factors(tmp_path / f"{name}.safetensors", len(name), *starts) for name, *starts in names
    )

    merge(files, tmp_path / "m.safetensors", "--lora_weight", low, "--lora_weight_high_noise", high)

    assert merged_files(tmp_path) == ["m_high_noise.safetensors", "m_low_noise.safetensors"]
    for model, lora, expert in ((files.dit, low, LOW_NOISE), (files.dit_high_noise, high, HIGH_NOISE)):
        assert model is not None
        patch = LoraPatch([WeightedLora(read_lora(lora, by_expert=True)).for_expert(expert)])
        found = load_file(tmp_path / f"m_{expert}.safetensors")
        for name, tensor in load_file(model).items():
            assert torch.equal(found[name], patch(name, tensor)), name
    assert "is loaded into the" not in caplog.text


def test_nothing_is_written_if_one_expert_cannot_be(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path, experts=2)
    fits = write_factors(tmp_path / "a.safetensors", 1)
    wide = write_factors(tmp_path / "w.safetensors", 1, width=64)

    with pytest.raises(CheckpointError, match="does not fit"):
        merge(files, tmp_path / "m.safetensors", "--lora_weight", fits, "--lora_weight_high_noise", wide)
    with pytest.raises(OptionError, match="nothing to merge"):
        merge(files, tmp_path / "m.safetensors")
    assert not merged_files(tmp_path)
