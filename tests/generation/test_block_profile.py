"""tools/profile_blocks.py: what is lost without each block, against networks that have the others merged."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from generation.block_profile import NUM_LEVELS, select_steps
from generation.network_setup import dit_loader, expert_loras
from generation.options import GenerationOptions
from generation.run import generate
from modules.errors import CheckpointError, OptionError
from modules.installation import import_own
from networks.rewriting_blocks import BlockOptions, rewrite_blocks
from protocols.data import Conditions
from protocols.steps import Overrides
from tests.emulated_cuda.pairs import run_on_device
from tests.tiny.families import family_called, write_deep
from tests.tiny.loras import write_lora_of_blocks
from tests.tiny.project import write_lora
from tests.tiny.wan import write_tiny_wan
from tools import profile_blocks

SIZE = ("--infer_steps", "6", "--device", "cpu", "--seed", "7", "--prompt", "a cat")
WAN = "wan t2v-1.3B"
LAYERS = r"blocks\.\d+\.(self_attn\.q|ffn\.0)"
UNGUIDED = {"z_image": "0"}  # the scale without guidance


@dataclass
class Recording:
    """A family that notes what its network is called with."""

    family: Any
    calls: list[tuple[Tensor, Tensor, Conditions, Overrides]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, overrides: Overrides
    ) -> Tensor:
        self.calls.append((noisy, timesteps, cond, overrides))
        return self.family.predict(dit, noisy, timesteps, cond, overrides)


def list_options(name: str) -> list[str]:
    return [*SIZE, "--guidance_scale", UNGUIDED.get(name, "1"), "--video_size", "32", "32"]


def use(name: str, folder: Path, make: Callable[[Any, GenerationOptions], None], *more: object) -> None:
    """Call `make` with the family and the options that the generation script of a tiny family reads."""
    script, *words = family_called(name).generate
    words += [*list_options(name), "--save_path", "made", "--output_type", "latent"]
    with contextlib.chdir(folder):
        import_own(script.removesuffix(".py")).main([*words, *map(str, more)], make)


def predict_all(name: str, folder: Path, calls: Recording, *lora: object) -> list[Tensor]:
    """Return what the network predicts at each recorded call, with a LoRA merged into its weights."""
    predictions: list[Tensor] = []

    @torch.no_grad()
    def make(family: Any, options: GenerationOptions) -> None:
        dit = dit_loader(family, expert_loras(family, options), torch.device("cpu"), options)(0)
        predictions.extend(family.predict(dit, *call).float() for call in calls.calls)

    use(name, folder, make, *lora)
    return predictions


def profile(name: str, folder: Path, *more: object) -> Mapping[str, Any]:
    """Return the JSON of a profile."""
    words = [*family_called(name).generate[1:], *list_options(name), "--lora", "a.safetensors"]
    with contextlib.chdir(folder):
        profile_blocks.main([*words, "--json", "profile.json", *map(str, more)])
    content: Mapping[str, Any] = json.loads((folder / "profile.json").read_text("utf-8"))
    return content


@pytest.mark.slow_cases("flux")
@pytest.mark.parametrize(
    ("name", "model", "layers"),
    [
        (WAN, "wan", LAYERS),
        ("flux", "flux", r"(double_blocks\.\d+\.img_attn\.qkv|single_blocks\.\d+\.linear1)"),
        ("z_image", "z_image", r"layers\.\d+\.(attention\.qkv|feed_forward\.w1)"),
    ],
    ids=["wan", "flux", "z_image"],
)
def test_shares_are_those_of_networks_without_each_block(
    name: str, model: str, layers: str, tmp_path: Path
) -> None:
    family_called(name).prepare(tmp_path)
    dit = next(path for path in (tmp_path / "model").glob("dit*"))
    write_lora_of_blocks(tmp_path / "a.safetensors", dit, layers)
    calls = Recording(None)

    def record(family: Any, options: GenerationOptions) -> None:
        calls.family = family
        generate(calls, options)  # type: ignore[arg-type]

    use(name, tmp_path, record, "--lora_weight", "a.safetensors")
    assert len(calls.calls) == NUM_LEVELS
    base = predict_all(name, tmp_path, calls)
    whole = predict_all(name, tmp_path, calls, "--lora_weight", "a.safetensors")

    found = profile(name, tmp_path, "--family", model)

    assert found["prompts"] == ["a cat"]
    for index in range(NUM_LEVELS):
        change = (whole[index] - base[index]).norm() / base[index].norm()
        assert found["changes"][index] == pytest.approx(float(change), rel=1e-3)
    assert len(found["blocks"]) >= 2
    for row in found["blocks"]:
        block_list, _, number = row["block"].rpartition("_")
        written = tmp_path / f"without {row['block']}.safetensors"
        text = f"{block_list}:{number}=0"
        rewrite_blocks(BlockOptions(model=tmp_path / "a.safetensors", lora_blocks=text, output=written))
        without = predict_all(name, tmp_path, calls, "--lora_weight", written)
        lost = [full - less for full, less in zip(whole, without, strict=True)]
        effect = [full - none for full, none in zip(whole, base, strict=True)]
        shares = [float(a.norm() / b.norm()) for a, b in zip(lost, effect, strict=True)]
        assert row["shares"] == pytest.approx(shares, rel=5e-3)
        if found["frames"]:
            frames = range(lost[0].shape[2])
            by_frame = [
                float(torch.stack(lost)[:, :, :, frame].norm() / torch.stack(effect)[:, :, :, frame].norm())
                for frame in frames
            ]
            assert found["frames"] == list(frames)
            assert row["shares_of_frames"] == pytest.approx(by_frame, rel=5e-3)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Wan and a LoRA for it."""
    folder = tmp_path_factory.mktemp("wan")
    family_called(WAN).prepare(folder)
    write_lora_of_blocks(folder / "a.safetensors", folder / "model/dit.safetensors", LAYERS)
    return folder


def test_blocks_that_do_nothing_have_no_share(wan: Path) -> None:
    tensors = load_file(wan / "a.safetensors")
    for name, tensor in tensors.items():
        if "blocks_1" in name and "lora_up" in name:
            tensor.zero_()
    save_file(tensors, wan / "one.safetensors")
    content = profile(WAN, wan, "--family", "wan", "--lora", "one.safetensors", "--fp8_scaled")
    first, second = content["blocks"]
    assert first["shares"] == pytest.approx([1] * NUM_LEVELS)  # all of the effect is lost without it
    assert second["shares"] == [0] * NUM_LEVELS
    assert (second["norm"], first["norm"] > 1) == (0, True)
    assert content["sigmas"][0] == pytest.approx(1, abs=1e-3)
    assert content["sigmas"] == sorted(content["sigmas"], reverse=True)


def test_steps_are_spread_over_the_schedule() -> None:
    assert select_steps(20) == [0, 4, 8, 11, 15, 19]
    assert select_steps(6) == [0, 1, 2, 3, 4, 5]
    assert select_steps(3) == [0, 1, 2]
    assert select_steps(1) == [0]


def test_the_table_and_the_chart_show_each_block(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    content = profile(WAN, wan, "--family", "wan", "--lora_multiplier", "0.5", "--chart", "a chart ü.svg")
    printed = capsys.readouterr().out
    chart = ElementTree.parse(wan / "a chart ü.svg")  # noqa: S314 (ours)
    texts = [element.text or "" for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a.safetensors x 0.5"
    for row in content["blocks"]:
        share = f"{row['shares'][0]:.1%}"
        assert re.search(rf"{row['block']} +{row['norm']:.4g} +{re.escape(share)}", printed)
        assert share in texts
    # half the strength: half the change of the weights
    full = profile(WAN, wan, "--family", "wan")
    assert content["blocks"][0]["norm"] == pytest.approx(full["blocks"][0]["norm"] / 2)


def test_first_frames_that_are_given_have_no_share(tmp_path: Path) -> None:
    family_called("wan ti2v-5B").prepare(tmp_path)
    write_lora_of_blocks(tmp_path / "a.safetensors", tmp_path / "model/dit.safetensors", LAYERS)
    content = profile("wan ti2v-5B", tmp_path, "--family", "wan", "--video_length", "9")
    assert content["frames"] == [1, 2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--include_patterns", "q"], "--include_patterns has no meaning for a profile of blocks"),
        (["--compile"], "--compile has no meaning for a profile of blocks"),
        (["--teacache_threshold", "0.1"], "a step cache has no meaning"),
        (["--lora", "other.safetensors"], "no known model has modules of these names"),
        (["--lora", "texts.safetensors"], "changes only text encoders"),
        (["--lora", "dora.safetensors"], "which depends on the weights it was made for"),
    ],
)
def test_what_cannot_be_measured_is_refused(wan: Path, more: list[str], words: str) -> None:
    write_lora(wan / "dora.safetensors", wan / "model/dit.safetensors", kind="DoRA")
    other = {
        name.replace("blocks", "double_blocks"): t for name, t in load_file(wan / "a.safetensors").items()
    }
    save_file(other, wan / "other.safetensors")
    texts = {
        name.replace("unet_blocks_0", "te1_text_model_encoder_layers_0"): t
        for name, t in load_file(wan / "a.safetensors").items()
    }
    save_file({name: t for name, t in texts.items() if "te1" in name}, wan / "texts.safetensors")
    with pytest.raises((OptionError, CheckpointError), match=re.escape(words)):
        profile(WAN, wan, "--family", "wan", *more)


def test_the_folder_to_write_into_and_other_loras_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("--save_path", "--lora_weight"):
        with pytest.raises(SystemExit):
            profile_blocks.main(["--lora", __file__, "--family", "wan", name, "x"])
        assert f"{name} has no meaning for a profile" in capsys.readouterr().err


@pytest.mark.slow
def test_swapped_blocks_on_a_device_have_the_same_shares(tmp_path: Path) -> None:
    family = family_called(WAN)
    write_deep(family, tmp_path)
    write_lora_of_blocks(tmp_path / "a.safetensors", tmp_path / "model/dit.safetensors", LAYERS)
    here = profile(WAN, tmp_path, "--family", "wan", "--cpu_noise")
    words = [
        *family.generate[1:],
        *list_options(WAN),
        "--family",
        "wan",
        "--lora",
        "a.safetensors",
        "--cpu_noise",
    ]
    words = [word for word in words if word not in ("--device", "cpu")]
    swapped = ["--blocks_to_swap", "2", "--json", "there.json"]
    run_on_device(["tools/profile_blocks.py", *words, *swapped], folder=tmp_path)
    there = json.loads((tmp_path / "there.json").read_text("utf-8"))
    assert len(here["blocks"]) == 4
    for ours, theirs in zip(here["blocks"], there["blocks"], strict=True):
        assert theirs["shares"] == pytest.approx(ours["shares"], rel=0.02)


@pytest.mark.slow
def test_loras_of_two_experts_are_measured_at_their_own_noise_levels(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", experts=2)
    low = write_lora_of_blocks(tmp_path / "low.safetensors", files.dit, r"blocks\.0\.self_attn\.q")
    high = write_lora_of_blocks(tmp_path / "high.safetensors", files.dit, r"blocks\.1\.self_attn\.q")
    words = [*files.models, *SIZE, "--task", "t2v-A14B", "--video_size", "32", "32", "--video_length", "5"]
    words += ["--family", "wan", "--lora", low, "--lora_high_noise", high, "--flow_shift", "1"]
    profile_blocks.main([*map(str, words), "--json", str(tmp_path / "profile.json")])
    content = json.loads((tmp_path / "profile.json").read_text("utf-8"))
    first, second = content["blocks"]
    is_high = [sigma >= 0.875 for sigma in content["sigmas"]]
    assert {True, False} == set(is_high)
    assert [share > 0.99 for share in second["shares"]] == is_high
    assert [share > 0.99 for share in first["shares"]] == [not high for high in is_high]
