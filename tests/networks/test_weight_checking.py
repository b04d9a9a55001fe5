"""networks/check_lora_weights.py, and networks/merge_lora.py as sd-scripts' users type it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from networks import check_lora_weights, merge_lora, sdxl_merge_lora
from tests.faults.messages import run_here

NAME = "lora_unet_mid_block_attn"


def test_the_weights_of_a_lora_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        f"{NAME}.lora_down.weight": torch.tensor([[1.0, -3.0]]),
        f"{NAME}.lora_up.weight": torch.tensor([[0.5], [0.0]]),
        f"{NAME}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")

    check_lora_weights.main([str(tmp_path / "lora.safetensors")])
    matrices = capsys.readouterr().out.splitlines()
    check_lora_weights.main([str(tmp_path / "lora.safetensors"), "-s"])
    everything = capsys.readouterr().out.splitlines()

    assert matrices == [
        "1 LoRA module",
        f"{NAME}.lora_down.weight: 1 x 2, mean |x| 2, least |x| 1",
        f"{NAME}.lora_up.weight: 2 x 1, mean |x| 0.25, least |x| 0",
    ]
    assert {*everything} - {*matrices} == {f"{NAME}.alpha: one number, mean |x| 1, least |x| 1"}


def test_weights_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    save_file({f"{NAME}.lora_up.weight": torch.tensor([[torch.nan]])}, tmp_path / "lora.safetensors")

    code, said = run_here("networks/check_lora_weights.py", "lora.safetensors", folder=tmp_path)

    assert code != 0
    assert "1 tensor with values that are NaN or infinite" in said
    assert "Traceback" not in said


def test_the_other_name_merges_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for script in (merge_lora, sdxl_merge_lora):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        helps.append(capsys.readouterr().out.partition("options:")[2])
    assert helps[0] == helps[1] != ""
