"""A trained whole transformer has the tensor names of its source, also those that no network here has."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.dits import DitFormat, bare_names
from checkpoints.opening import open_checkpoint
from protocols.families import with_scripts
from protocols.loading import Placement
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, OUTPUT, TinyFamily
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import make_project
from training.trainable import prepare_dit

OF_DIT = ("--dit", "--pretrained_model_name_or_path", "--ltx2_checkpoint")
ALL = {family.train_full: family for family in reversed((*FAMILIES, *FURTHER)) if family.train_full}
DAILY = ("lumina_train.py", "minimax_h3_train.py", "ltx2_train.py")
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in ALL]
MODULES = ("files", "checkpoints", "dit_checkpoints")


def find_format(family: TinyFamily) -> DitFormat[Any, Any]:
    """The description of files of a family, in its folder or in that of the family that its files are of."""
    (room,) = {
        entry.room for entry in with_scripts().values() if f"{entry.training_script}.py" == family.train[0]
    }
    for folder in (room, room.partition(".")[0]):
        for name in MODULES:
            if (Path(*folder.split(".")) / f"{name}.py").exists():
                found = vars(importlib.import_module(f"{folder}.{name}")).get("FORMAT")
                if isinstance(found, DitFormat):
                    return found
    raise AssertionError(room)


def add_unused(path: Path, ignore: tuple[str, ...]) -> None:
    """Write a tensor for each pattern of tensors that the network does not have, where there is none."""
    state = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    with open_checkpoint(path) as checkpoint:
        bare = bare_names(checkpoint)
        some = next(name for name in bare.tensors)
        prefix = bare.stored_name(some).removesuffix(some)
    further: dict[str, Tensor] = {}
    for pattern in ignore:
        name = prefix + pattern.replace("*", "x")
        if name not in state:
            further[name] = torch.full((3,), 7.0)
    save_file({**state, **further}, path, metadata)


@pytest.mark.parametrize("script", CASES)
def test_the_written_file_has_the_names_of_its_source(script: str, tmp_path: Path) -> None:
    family = ALL[script]
    family.prepare(tmp_path)
    dit_format = find_format(family)
    words = family.train
    path = tmp_path / next(words[words.index(flag) + 1] for flag in OF_DIT if flag in words)
    add_unused(path, dit_format.ignore)
    with open_checkpoint(path) as checkpoint:
        bare = bare_names(checkpoint)
        expected = {name: bare.read(name) for name in bare.tensors}

    dit = dit_format.load(path, Placement(torch.device("cpu")))
    writes = prepare_dit(dit, 1e-3).written_files[""].write
    writes(tmp_path / "written.safetensors", None, {})

    written = load_file(tmp_path / "written.safetensors")
    assert written.keys() == expected.keys()
    own = dit.state_dict().keys()
    unused = expected.keys() - own
    assert len(unused) >= len(dit_format.ignore)
    for name in unused:
        assert torch.equal(written[name], expected[name])
        assert written[name].dtype == expected[name].dtype
    writes(tmp_path / "narrow.safetensors", torch.float16, {})
    assert load_file(tmp_path / "narrow.safetensors").keys() == expected.keys()


def test_a_training_by_command_keeps_what_lumina_does_not_use(tmp_path: Path) -> None:
    family = ALL["lumina_train.py"]
    make_project(family, tmp_path)
    path = tmp_path / "model" / "dit.safetensors"
    add_unused(path, ("norm_final.weight",))
    models = family.train[1 : family.train.index("--network_module")]

    succeed_here(family.train_full, *models, *OUTPUT, "--max_train_steps", "1", folder=tmp_path)

    saved = load_file(tmp_path / "output" / "lora.safetensors")
    assert saved.keys() == load_file(path).keys()
    assert saved["norm_final.weight"].tolist() == [7, 7, 7]
