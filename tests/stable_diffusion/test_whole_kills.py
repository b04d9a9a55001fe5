"""A training of a whole checkpoint that is killed inside a save leaves whole files and ends as without it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import ROOT, run_python
from tests.faults.runs import DYING
from tests.faults.test_kill_and_resume import KILLED
from tests.stable_diffusion.test_whole_training import folder, words
from tests.tiny.stable_diffusion import WRITERS
from training.saving.files import INDEX
from training.saving.states import SavedState, read_state

__all__ = ["folder"]  # a fixture
RUN = ("--stop_text_encoder_training", "-1", "--learning_rate", "1e-3", "--cache_latents")
SAVES = ("--save_every_n_steps", "1", "--save_state", "--resume", "latest")
FOLDER = ("--save_model_as", "diffusers")


def saved_models(output: Path, as_folder: bool) -> list[Path]:
    """The files of the U-Net below final names."""
    if as_folder:
        return [
            path.parent / "unet" / "diffusion_pytorch_model.safetensors"
            for path in output.glob(f"last*/{INDEX}")
        ]
    return [*output.glob("last*.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), FOLDER], ids=["file", "folder"])
def test_a_kill_inside_a_save_leaves_the_one_before_it_whole(folder: Path, form: tuple[str, ...]) -> None:
    """In the second of four saves, when half of a tensor is written."""
    model = WRITERS["sd1"](folder)
    as_folder = bool(form)
    run = [ROOT / "train_db.py", *words(model.name, *RUN, *SAVES, *form, steps=3)]
    run_python(DYING, "count", "passed.json", *run, "--output_dir", "whole", folder=folder)
    passes = json.loads((folder / "passed.json").read_text(encoding="utf-8"))["mid_write"]

    killed = run_python(DYING, "mid_write", passes * 27 // 100, *run, folder=folder, check=False)

    output = folder / "output"
    assert killed.returncode == KILLED, killed.stderr[-3000:]
    left = saved_models(output, as_folder)
    assert len(left) == 1
    assert load_file(left[0])
    assert any(path.name.endswith(".tmp") for path in output.iterdir())  # what was being written
    (state,) = output.glob("last*-state")
    assert isinstance(read_state(state), SavedState)
    run_python(*run, folder=folder)
    ends = [saved_models(folder / name, as_folder) for name in ("whole", "output")]
    assert len(ends[0]) == len(ends[1]) > 2
    for full, resumed in zip(*map(sorted, ends), strict=True):
        assert load_file(full).keys() == load_file(resumed).keys()
        for name, tensor in load_file(full).items():
            assert tensor.equal(load_file(resumed)[name])
    assert not any(path.name.endswith(".tmp") for path in output.iterdir())
