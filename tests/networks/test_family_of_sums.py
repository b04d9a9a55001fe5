"""Of which model a sum of LoRAs is, in networks/sdxl_merge_lora.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks import sdxl_merge_lora

# a convolution of Stable Diffusion 1, 2 and XL, with the same sizes
OURS, ITS_ALIAS = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_middle_block_0_in_layers_2"


def merge(folder: Path, *words: str) -> tuple[set[str], str]:
    """Merge a file with itself; the names of the result's modules, and the model that it names."""
    tensors = {
        f"{OURS}.lora_down.weight": torch.ones(1, 1280, 3, 3),
        f"{OURS}.lora_up.weight": torch.ones(1280, 1, 1, 1),
    }
    save_file(tensors, folder / "lora.safetensors")
    lora, output = str(folder / "lora.safetensors"), str(folder / "sum.safetensors")
    sdxl_merge_lora.main(["--models", lora, lora, "--ratios", "0.5", "0.25", "--save_to", output, *words])
    with open_checkpoint(Path(output)) as opened:
        names = {name.partition(".")[0] for name in opened.tensors}
        return names, opened.metadata["ss_base_model_version"]


@pytest.mark.parametrize(
    ("family", "module", "version"),
    [("sd1", OURS, "sd_v1"), ("sd2", OURS, "sd_v2"), ("sdxl", ITS_ALIAS, "sdxl_base_v1-0")],
)
def test_the_family_names_the_modules(tmp_path: Path, family: str, module: str, version: str) -> None:
    assert merge(tmp_path, "--family", family) == ({module}, version)


def test_what_fits_several_models_asks_for_the_family(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"can be for sd1 or sdxl or sd2: .*\n  Say which one, such as --f"
    ):
        merge(tmp_path)
    assert not (tmp_path / "sum.safetensors").exists()
