"""Samples of a FramePack training: they are what the generation script makes of the LoRA, and say what they
cannot be.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from frame_pack.family import FramePack
from frame_pack.files import FramePackFiles
from modules.contract.loading import Placement
from tests.frame_pack.projects import CPU, ProjectOf, sample_latents
from tests.tiny.loras import make_lora

NEAR = 1e-4  # of the largest value, float32: the LoRA is beside the weights in one, in them in the other


@pytest.fixture(scope="module")
def lora(project_of: ProjectOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with an effect; the transformers of all variants are the same."""
    family = FramePack(FramePackFiles(project_of("framepack")[1] / "model" / "dit.safetensors"))
    network = make_lora("lora_framepack", 4, 4.0, family.load_dit(Placement(CPU)))
    generator = torch.Generator().manual_seed(3)
    drawn = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if tensor.ndim == 2 else tensor
        for name, tensor in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(drawn, path)
    return path


SLOW = pytest.mark.slow  # a training and a generation each; one of them goes with every change


@pytest.mark.parametrize("name", ["framepack one frame"])
def test_a_line_without_of_is_a_picture_by_default(
    name: str, project_of: ProjectOf, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, folder = project_of(name)
    monkeypatch.chdir(folder)
    Image.new("RGBA", (32, 32), (200, 100, 50, 0)).save(tmp_path / "nothing.png")
    line = "a cat --w 32 --h 32 --d 7 --s 1 --i start.png"
    controls = f"--ci start.png --ci {tmp_path / 'nothing.png'}"

    silent, default, other, transparent, black = sample_latents(
        family,
        lora,
        "\n".join(
            [
                f"{line} --ci start.png",
                f"{line} --ci start.png --of default",
                f"{line} --ci start.png --of target_index=5",
                f"{line} {controls} --of no_post,control_index=0;2",
                f"{line} --ci start.png --of default",
            ]
        ),
        tmp_path,
    )

    assert silent.shape == (1, 16, 1, 4, 4)
    assert torch.equal(silent, default)
    assert not torch.equal(silent, other)
    # a control without anything that is seen is the black frame that stands behind the controls by default,
    # at window + 1
    assert torch.equal(transparent, black)
