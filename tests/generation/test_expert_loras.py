"""Which LoRAs each expert of Wan2.2 gets, and merging them into the files of both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_generate_video
from generation.dressing import expert_loras
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, ONE_EXPERT, Expert
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from networks.options import LoraOptions, LoraPatternOptions
from tests.tiny.wan import TinyWan, write_tiny_wan

BOTH = (Expert(LOW_NOISE, 0.0), Expert(HIGH_NOISE, 875.0))


def write_lora(path: Path, seed: int, *starts: str, width: int = 128) -> Path:
    """A LoRA of one module, or one below each of `starts`."""
    tensors: dict[str, Tensor] = {}
    for number, start in enumerate(starts or ("transformer.",)):
        made = torch.Generator().manual_seed(seed + number)
        name = f"{start}blocks.0.attn1.to_q.lora_"
        tensors[f"{name}A.weight"] = torch.randn(2, width, generator=made)
        tensors[f"{name}B.weight"] = torch.randn(width, 2, generator=made)
    save_file(tensors, path)
    return path


class Given:
    """The options that `expert_loras` reads."""

    def __init__(self, low: list[Path], high: list[Path], *patterns: str) -> None:
        self.lora = LoraOptions.usual(lora_weight=tuple(low) or None, lora_multiplier=(0.5,))
        self.lora_patterns = LoraPatternOptions.usual(include_patterns=tuple(patterns) or None)
        self.experts: Any = type(
            "Experts",
            (),
            {"loras": LoraOptions.usual(lora_weight=tuple(high) or None, lora_multiplier=(2.0,))},
        )


def names(uses: tuple[LoraUse, ...]) -> list[tuple[str, float]]:
    return [(use.lora.path.stem, use.multiplier) for use in uses]


def test_each_option_is_for_its_expert(tmp_path: Path) -> None:
    low, high = write_lora(tmp_path / "a.safetensors", 1), write_lora(tmp_path / "b.safetensors", 2)

    found = expert_loras(BOTH, Given([low, high], [high], "q", "k", "v"))  # type: ignore[arg-type]

    assert list(map(names, found)) == [[("a", 0.5), ("b", 1.0)], [("b", 2.0)]]
    assert [[use.include for use in uses] for uses in found] == [
        ["q", "k"],
        ["v"],
    ]  # they count over all files


@pytest.mark.parametrize("options", ["low", "high", "both"])
def test_a_file_for_both_is_used_in_both_once(tmp_path: Path, options: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", 1, "transformer.", "transformer_2.")
    given = Given([path] if options != "high" else [], [path] if options != "low" else [])

    low, high = expert_loras(BOTH, given)  # type: ignore[arg-type]

    whole = read_lora(path, by_expert=True)
    assert [use.lora.tensors.keys() for use in low] == [whole.parts[LOW_NOISE].tensors.keys()]
    for (use,), expert in ((low, LOW_NOISE), (high, HIGH_NOISE)):
        wanted = whole.parts[expert].tensors
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in use.lora.tensors.items())
        assert use.lora.expert == expert


def test_loras_for_an_expert_that_is_not_given_are_refused(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", 1)
    two = write_lora(tmp_path / "two.safetensors", 1, "transformer.", "transformer_2.")

    with pytest.raises(OptionError, match="--lora_weight_high_noise is for --dit_high_noise"):
        expert_loras(ONE_EXPERT, Given([], [path]))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="use --lora_weight_high_noise"):
        expert_loras(BOTH[1:], Given([path], []))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds two LoRAs"):
        expert_loras(ONE_EXPERT, Given([two], []))  # type: ignore[arg-type]


@pytest.mark.parametrize(("said", "hints"), [("both", 1), ("low", 0)])
def test_a_lora_that_was_trained_in_both_is_not_put_into_one_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str, hints: int
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = load_file(write_lora(tmp_path / "y.safetensors", 1))
    save_file(tensors, path, {"ss_wan_expert": said})

    low, high = expert_loras(BOTH, Given([path], []))  # type: ignore[arg-type]

    assert (len(low), len(high)) == (1, 0)
    assert caplog.text.count("give it to --lora_weight_high_noise too") == hints
    expert_loras(BOTH, Given([path], [path]))  # type: ignore[arg-type]
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
    low, high = (write_lora(tmp_path / f"{name}.safetensors", len(name), *starts) for name, *starts in names)

    merge(files, tmp_path / "m.safetensors", "--lora_weight", low, "--lora_weight_high_noise", high)

    assert merged_files(tmp_path) == ["m_high_noise.safetensors", "m_low_noise.safetensors"]
    for model, lora, expert in ((files.dit, low, LOW_NOISE), (files.dit_high_noise, high, HIGH_NOISE)):
        assert model is not None
        patch = LoraPatch([LoraUse(read_lora(lora, by_expert=True)).for_expert(expert)])
        found = load_file(tmp_path / f"m_{expert}.safetensors")
        for name, tensor in load_file(model).items():
            assert torch.equal(found[name], patch(name, tensor)), name
    assert "is loaded into the" not in caplog.text


def test_nothing_is_written_if_one_expert_cannot_be(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path, experts=2)
    fits = write_lora(tmp_path / "a.safetensors", 1)
    wide = write_lora(tmp_path / "w.safetensors", 1, width=64)

    with pytest.raises(CheckpointError, match="does not fit"):
        merge(files, tmp_path / "m.safetensors", "--lora_weight", fits, "--lora_weight_high_noise", wide)
    with pytest.raises(OptionError, match="nothing to merge"):
        merge(files, tmp_path / "m.safetensors")
    assert not merged_files(tmp_path)
