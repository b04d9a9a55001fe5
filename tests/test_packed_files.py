"""Files as they are distributed: what is generated from packed weights is what their values give."""

import logging
from pathlib import Path

import pytest

from tests.packing import FORMS, GGUF_KINDS, gguf_file, pack_file
from tests.tiny.families import FAMILIES
from tests.tiny.runs import TinyProject, make_project

pytest.importorskip("comfy_kitchen")
pytest.importorskip("gguf")
pytest.importorskip("bitsandbytes")

CHOSEN = {family.name: family for family in FAMILIES}
SAY = ("--prompt", "a cat", "--seed", "1", "--dit_dtype", "float32")


OTHERS = ("wan t2v-1.3B", "z_image", "flux_2")


def project_of(name: str, folder: Path) -> TinyProject:
    CHOSEN[name].prepare(folder)
    return TinyProject(CHOSEN[name], folder)


def compare(project: TinyProject, packed: Path, most: float = 1e-4, *more: object) -> None:
    """Generate from the unpacked file and from the packed one in its place."""
    dit = project.folder / "model" / "dit.safetensors"
    (plain,) = project.generate("plain", *SAY, *more)
    packed.replace(dit)
    (found,) = project.generate("packed", *SAY, *more)
    for name, latents in plain.items():
        difference = float((found[name] - latents).abs().max() / latents.abs().max())
        assert difference <= most


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("qwen_image", form) for form in (*FORMS, *GGUF_KINDS)),
        *(
            (name, form)
            for name in ("wan t2v-1.3B", "z_image", "flux_2")
            for form in ("convrot", "nvfp4", "Q4_0")
        ),
    ],
)
def test_generation_is_that_of_the_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, form: str
) -> None:
    project = project_of(name, tmp_path)
    dit = tmp_path / "model" / "dit.safetensors"
    packed = gguf_file(dit, form) if form in GGUF_KINDS else pack_file(dit, form, header=name == "qwen_image")

    with caplog.at_level(logging.INFO):
        # products in int8 round what goes into a layer: 0.3 % of a product, here of three steps of two blocks
        compare(project, packed, 3e-2 if form in {"int8", "convrot"} else 1e-4)

    assert form == "BF16" or "as the file has them" in caplog.text


def test_a_lora_learns_on_a_gguf_file_as_on_its_values(tmp_path: Path) -> None:
    project = make_project(CHOSEN["z_image"], tmp_path)
    dit = tmp_path / "model" / "dit.safetensors"
    packed = gguf_file(dit, "Q8_0")
    plain = project.train("plain", "--mixed_precision", "no")
    packed.replace(dit)

    found = project.train("packed", "--mixed_precision", "no")

    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max().clamp_min(1e-9)
