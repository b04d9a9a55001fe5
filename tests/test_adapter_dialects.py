"""One training adapter in every spelling that trainers write, through the commands that users type."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.test_frozen_model import train
from tests.tiny.families import FAMILIES as TINY
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import TinyProject, make_project

# the families whose published adapters the pages name
FAMILIES = ["z_image", "krea2", "qwen_image_21", "minimax_h3", "flux"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    family = next(one for one in (*TINY, *FURTHER) if one.name == request.param)
    made = make_project(family, tmp_path_factory.mktemp("a project"))
    made.train("known", "--learning_rate", "1", "--network_dim", "4", "--network_alpha", "4")
    return made


def write_dialects(project: TinyProject) -> dict[str, Path]:
    """Write the adapter as kohya's trainers, ai-toolkit, diffusers and those with lora_down do."""
    paths = {"kohya": Path("known/x.safetensors")}
    for target in ("comfyui", "diffusers"):
        paths[target] = Path(f"{target}.safetensors")
        words = ("--input", str(paths["kohya"]), "--output", str(paths[target]), "--target", target)
        project.run("convert_lora.py", *words)
    renamed = {}
    for name, tensor in load_file(project.folder / paths["comfyui"]).items():
        renamed[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor
    paths["down and up"] = Path("down.safetensors")
    save_file(renamed, project.folder / paths["down and up"])
    return paths


def test_losses_are_equal_in_all_spellings(project: TinyProject) -> None:
    plain = train(project, "plain")
    losses = {}
    for name, path in write_dialects(project).items():
        tensors = load_file(project.folder / path)
        assert any(key.endswith("alpha") for key in tensors) == (name == "kohya")
        losses[name] = train(project, f"with {name}", "--training_adapter", str(path))

    assert losses["kohya"] != pytest.approx(plain, rel=1e-3)
    for name in ("comfyui", "diffusers", "down and up"):
        # alpha is the rank, so that factors are the same; joined layers are summed in another order
        assert losses[name] == pytest.approx(losses["kohya"], rel=1e-5), name
