"""tools/merge_models.py: whole checkpoints and their weighted sum."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.stable_diffusion import write_sd1, write_sdxl

LAYER = "model.diffusion_model.out.2.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SCRIPT = "tools/merge_models.py"


def write(path: Path, value: float, channels: int = 4, more: Mapping[str, Tensor] | None = None) -> Path:
    tensors = {
        LAYER: torch.full((2, 3), value, dtype=torch.float16),
        TEXT: torch.full((3,), float(value)),
        FIRST: torch.full((2, channels, 1, 1), float(value)),
        POSITIONS: torch.arange(3) + int(value),
    }
    save_file(
        {**tensors, **(more or {})}, path, {"modelspec.title": path.stem, "modelspec.hash_sha256": "old"}
    )
    return path


def merge(folder: Path, *words: object) -> tuple[dict[str, Tensor], str]:
    said = succeed_here(SCRIPT, "--output", "sum.safetensors", *words, folder=folder)
    return load_file(folder / "sum.safetensors"), said


def test_models_are_added_by_their_ratios(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", 1)
    write(tmp_path / "b.safetensors", 5)

    merged, _ = merge(tmp_path, "--models", "a.safetensors", "b.safetensors", "--ratios", 0.75, 0.25)

    torch.testing.assert_close(merged[LAYER], torch.full((2, 3), 2.0))  # float, also of a model in fp16
    torch.testing.assert_close(merged[TEXT], torch.full((3,), 2.0))
    assert merged[POSITIONS].tolist() == [1, 2, 3]  # integers are the first model's
    with safe_open(tmp_path / "sum.safetensors", "pt") as file:
        assert file.metadata() == {
            "modelspec.title": "a",
            "modelspec.merged_from": "a.safetensors, b.safetensors",
        }


def test_equal_shares_and_the_type_of_the_numbers(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{value}.safetensors", value).name for value in (1, 2, 6)]
    merged, _ = merge(tmp_path, "--models", *names, "--saving_precision", "bf16")
    assert merged[LAYER].dtype == torch.bfloat16
    torch.testing.assert_close(merged[LAYER].float(), torch.full((2, 3), 3.0))


def test_the_difference_of_two_models_is_added_to_a_third(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{value}.safetensors", value).name for value in (10, 7, 5)]
    merged, _ = merge(tmp_path, "--models", *names, "--ratios", 1, 1, -1)
    torch.testing.assert_close(merged[TEXT], torch.full((3,), 12.0))


def test_the_channels_of_an_inpainting_model_stay_while_another_is_added(tmp_path: Path) -> None:
    write(tmp_path / "inpainting.safetensors", 10, channels=9)
    write(tmp_path / "own.safetensors", 7)
    write(tmp_path / "base.safetensors", 5)
    models = [f"{name}.safetensors" for name in ("inpainting", "own", "base")]

    merged, _ = merge(tmp_path, "--models", *models, "--ratios", 1, 1, -1)

    assert merged[FIRST][0, :, 0, 0].tolist() == [12.0] * 4 + [10.0] * 5
    code, said = run_here(SCRIPT, "--output", "x.safetensors", "--models", *models[::-1], folder=tmp_path)
    assert_one_message(code, said, "1 tensor has other sizes")
    assert_one_message(code, said, "inpainting.safetensors is an inpainting model: pass it as the first")


def test_text_encoders_stay_with_unet_only(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{value}.safetensors", value).name for value in (1, 3)]
    merged, _ = merge(tmp_path, "--models", *names, "--unet_only")
    torch.testing.assert_close(merged[LAYER], torch.full((2, 3), 2.0))
    torch.testing.assert_close(merged[TEXT], torch.ones(3))


def test_tensors_of_one_model_alone_are_named(tmp_path: Path) -> None:
    few = {"model_ema.x": torch.ones(1), "only_a": torch.full((1,), 4.0)}
    write(tmp_path / "a.safetensors", 1, more=few)
    write(tmp_path / "b.safetensors", 3, more={f"only_b{number}": torch.ones(1) for number in range(9)})

    merged, said = merge(tmp_path, "--models", "a.safetensors", "b.safetensors", "--show_skipped")

    assert merged["only_a"].tolist() == [4.0]
    assert not any(name.startswith(("only_b", "model_ema")) for name in merged)
    assert "9 tensors not in a.safetensors, and skipped: only_b0" in said
    assert "only_b8" in said
    assert "b.safetensors lacks 1 tensor, for which a.safetensors gets its share too: only_a" in said
    assert "1 average of a.safetensors is left out" in said


def test_whole_checkpoints_are_merged(tmp_path: Path) -> None:
    write_sd1(tmp_path)
    state = load_file(tmp_path / "sd1.safetensors")
    moved = {name: value * 3 if value.is_floating_point() else value for name, value in state.items()}
    save_file(moved, tmp_path / "tuned ü.safetensors")

    merged, _ = merge(tmp_path, "--models", "sd1.safetensors", "tuned ü.safetensors")

    assert merged.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(merged[name], value * 2 if value.is_floating_point() else value)


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["--models", "a.safetensors"], ["names only one file", "use at least two"]),
        (["--models", "a.safetensors", "b.safetensors", "--save_precision", "fp16"], ["--saving_precision"]),
        (["--models", "a.safetensors", "b.safetensors", "--ratios", "1"], ["1 numbers for 2 files"]),
        (
            ["--models", "a.safetensors", "b.safetensors", "--ratios", "1", "1"],
            ["add up to 2", "sum is 1"],
        ),
        (["--models", "a.safetensors", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--models", "a.safetensors", "sdxl.safetensors"], ["does not fit", "different models"]),
        (["--models", "a.safetensors", "other.safetensors"], ["in common"]),
        (["--models", "lora.safetensors", "lora.safetensors"], ["is a LoRA", "svd_merge_lora.py"]),
        (["--models", "a.safetensors", "nan.safetensors"], ["NaN or infinite"]),
        (["--models", "a.safetensors", "x.safetensors"], ["would be lost", "new name"]),
        (["--models", "a.safetensors", "b.safetensors", "--ratios", "nan", "1"], ["--ratios"]),
        (["--models", "a.safetensors", "b.safetensors", "--device", "cuda:7"], ["cuda:7"]),
    ],
)
def test_what_cannot_be_merged_is_refused(words: list[str], reasons: list[str], tmp_path: Path) -> None:
    write_sd1(tmp_path, name="a.safetensors")
    write(tmp_path / "b.safetensors", 1)
    write(tmp_path / "x.safetensors", 1)
    write_sdxl(tmp_path)
    state = load_file(tmp_path / "a.safetensors")
    name = next(name for name in state if name.startswith("model.diffusion_model"))
    save_file(state | {name: torch.full_like(state[name], torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    save_file({"x": torch.ones(1, 1)}, tmp_path / "other.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()

    code, said = run_here(SCRIPT, *words, "--output", "x.safetensors", folder=tmp_path)

    assert_one_message(code, said, *reasons)
    assert (tmp_path / "x.safetensors").read_bytes() == before
