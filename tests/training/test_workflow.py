"""--save_workflow: what makes the samples in ComfyUI, next to each LoRA; which runs have none."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.writing import save_tensors
from downloads.catalogue import known_components
from modules.errors import OptionError, UserError
from protocols.family import Abilities
from protocols.requests import Request
from protocols.rules import ONE_EXPERT, Expert
from protocols.workflows import CLIP_LATENT, ComfyModel, shift_thousand
from tests.tiny.families import family_called
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import make_project
from tests.training import toy
from tests.training.comfy_nodes import check_workflow
from training.features.workflow_nodes import find_obstacle
from training.reports.history import History, Start, find_workflow
from training.reports.page import Standing, write_training_page

MODEL = ComfyModel(
    "vae.safetensors",
    ("text.safetensors",),
    "wan",
    latent=CLIP_LATENT,
    has_length=True,
    patches=shift_thousand,
)
LINE = "a (red) cat --w 32 --h 48 --d 7 --s 4 --l 3 --n dull"
TOKENS = 6  # of an image of this size
# logarithm of FLUX's shift, on the line through 0.5 for 256 tokens and 1.15 for 4096; Qwen-Image's shift, on
# that through 0.5 for 256 and 0.9 for 8192. Source: the released schedulers
FLUX_SHIFT = 0.5 + (TOKENS - 256) * 0.65 / 3840
QWEN_SHIFT = math.exp(0.5 + (TOKENS - 256) * 0.4 / 7936)
# family -> (names of nodes, values of some inputs of a workflow of this line)
EXPECTED: Mapping[str, tuple[set[str], dict[str, Any]]] = {
    "wan t2v-1.3B": (
        {"ModelSamplingSD3", "EmptyHunyuanLatentVideo", "SaveVideo"},
        {"shift": 3.0, "length": 5, "fps": 16.0, "sampler_name": "uni_pc_bh2", "text": r"a \(red\) cat"},
    ),
    "flux": (
        {"ModelSamplingFlux", "DualCLIPLoader", "FluxGuidance", "SaveImage"},
        {"guidance": 2.5, "max_shift": FLUX_SHIFT, "base_shift": FLUX_SHIFT, "text": r"a \(red\) cat"},
    ),
    "qwen_image": (
        {"ModelSamplingAuraFlow", "EmptySD3LatentImage"},
        {"shift": QWEN_SHIFT, "vae_name": "qwen_image_vae.safetensors", "text": "a (red) cat"},
    ),
    "z_image": (
        {"ModelSamplingAuraFlow", "CLIPLoader"},
        # its guidance counts from 0; the trained names are read only converted
        {"cfg": 4.0, "shift": 3.0, "text": "a (red) cat", "lora_name": "x_comfyui.safetensors"},
    ),
    "sdxl": (
        {"CheckpointLoaderSimple", "EmptyLatentImage"},
        {"sampler_name": "ddim", "scheduler": "ddim_uniform", "text": "a (red) cat"},
    ),
}


def read_workflow(path: Path) -> dict[str, Any]:
    """Read a workflow that is as ComfyUI takes it."""
    nodes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_workflow(nodes)
    return nodes


def values_of(nodes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """All values of inputs by name, in the order of the nodes."""
    values: dict[str, list[Any]] = {}
    for node in nodes.values():
        for name, value in node["inputs"].items():
            values.setdefault(name, []).append(value)
    return values


@pytest.mark.parametrize("name", EXPECTED)
def test_a_workflow_has_the_values_of_the_samples(name: str, tmp_path: Path) -> None:
    family = {one.name: one for one in FURTHER}.get(name) or family_called(name)
    project = make_project(family, tmp_path)
    line = f"{LINE} --f 5 --fs 3" if name.startswith("wan") else f"{LINE} --g 2.5 --fs 3"
    (tmp_path / "prompts.txt").write_text(f"{line}\n{line} --d 8\n", encoding="utf-8")
    words = ("--sample_prompts", "prompts.txt", "--save_workflow", "--max_train_steps", "1")
    project.train("out", *words)

    nodes = read_workflow(tmp_path / "out/x.workflow.json")
    names, expected = EXPECTED[name]
    classes = [node["class_type"] for node in nodes.values()]
    assert names <= set(classes)
    assert classes.count("KSampler") == 2
    assert classes.count("LoraLoader") == 1  # the samples share it
    values = values_of(nodes)
    common = {"steps": 4, "cfg": 3.0, "width": 32, "lora_name": "x.safetensors", "strength_model": 1.0}
    for key, value in {**common, **expected}.items():
        assert values[key][0] == pytest.approx(value) if isinstance(value, float) else values[key][0] == value
    assert values["seed"] == [7, 8]
    assert "dull" in values["text"]
    model = values["ckpt_name" if name == "sdxl" else "unet_name"]
    assert model == ["dit.safetensors"]


def test_files_are_called_as_in_the_catalogue() -> None:
    from flux.workflow import FLUX
    from qwen_image.workflow import TEXT_TO_IMAGE
    from wan.workflow import TEXT_TO_VIDEO
    from z_image.workflow import Z_IMAGE_NODES

    known = {Path(file.file).name for component in known_components().values() for file in component.files}
    named = [model.vae for model in (FLUX, TEXT_TO_IMAGE, Z_IMAGE_NODES)]
    for model in (FLUX, TEXT_TO_IMAGE, TEXT_TO_VIDEO, Z_IMAGE_NODES):
        named += model.text_encoders
    assert set(named) <= known


@dataclass(frozen=True)
class DrawnFamily(toy.ToyFamily):
    """The toy, with nodes."""

    abilities: Abilities = Abilities(has_comfy_nodes=True)
    files: tuple[Path, ...] = ()

    @property
    def dit_files(self) -> tuple[Path, ...]:
        return self.files

    def comfy_model(self) -> ComfyModel:
        return MODEL


def write_files(folder: Path, experts: tuple[Expert, ...] = ONE_EXPERT) -> tuple[Path, ...]:
    """Write a file for each transformer, whose names are all that is read of them."""
    paths = tuple(folder / f"toy{expert.name}.safetensors" for expert in experts)
    for path in paths:
        save_tensors(path, {"weight": torch.zeros(1)})
    return paths


def train(folder: Path, *words: object, experts: tuple[Expert, ...] = ONE_EXPERT, line: str = LINE) -> Path:
    toy.write_caches(folder)
    prompts = toy.write_prompts(folder, f"{line}\n")
    family = DrawnFamily(experts=experts, files=write_files(folder, experts))
    toy.train_toy(folder, "--sample_prompts", prompts, "--save_workflow", *words, family=family)
    return folder / "output"


def test_two_transformers_divide_the_steps_as_the_samples_do(tmp_path: Path) -> None:
    words = ("--lora_per_expert", "--max_train_steps", 2)
    output = train(tmp_path, *words, experts=toy.TWO_EXPERTS, line=f"{LINE} --s 5 --fs 1 --f 5")

    nodes = read_workflow(output / "x.workflow.json")
    high, low = [node["inputs"] for node in nodes.values() if node["class_type"] == "KSamplerAdvanced"]
    # levels 1, 0.8, 0.6 are from 600 on
    assert (high["start_at_step"], high["end_at_step"], low["start_at_step"], low["end_at_step"]) == (
        0,
        3,
        3,
        5,
    )
    assert (high["add_noise"], low["add_noise"]) == ("enable", "disable")
    assert (high["return_with_leftover_noise"], low["return_with_leftover_noise"]) == ("enable", "disable")

    def chain(inputs: Mapping[str, Any]) -> list[str]:
        shift = nodes[inputs["model"][0]]["inputs"]
        lora = nodes[shift["model"][0]]["inputs"]
        return [lora["lora_name"], nodes[lora["model"][0]]["inputs"]["unet_name"]]

    assert chain(high) == ["x_high_noise.safetensors", "toyhigh_noise.safetensors"]
    assert chain(low) == ["x_low_noise.safetensors", "toylow_noise.safetensors"]
    assert find_workflow(output, "x_high_noise.safetensors") == "x.workflow.json"


def test_workflows_come_and_go_with_their_loras(tmp_path: Path) -> None:
    words = ("--save_every_n_steps", 2, "--save_last_n_steps", 2, "--ema_decay", 0.9)
    output = train(tmp_path, *words)

    loras = {path.name.removesuffix(".safetensors") for path in output.glob("*.safetensors")}
    assert loras == {path.name.removesuffix(".workflow.json") for path in output.glob("*.workflow.json")}
    assert "x-step00000002" not in loras
    assert values_of(read_workflow(output / "x-ema.workflow.json"))["lora_name"] == ["x-ema.safetensors"]

    train(tmp_path)  # a new run sets aside what the earlier one has written
    (aside,) = output.glob("x.before-*")
    assert (aside / "x-ema.workflow.json").is_file()
    assert not (output / "x-ema.workflow.json").exists()


def test_edited_prompts_are_in_later_workflows(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    prompts = toy.write_prompts(tmp_path, f"{LINE}\n")

    def watch(passes: int) -> None:
        texts = {4: f"{LINE} --d 9\n", 6: "a cat --d\n"}  # the last one is faulty, so the one before stays
        if passes in texts:
            prompts.write_text(texts[passes], encoding="utf-8")

    words = ("--sample_prompts", prompts, "--save_workflow", "--save_every_n_steps", 3)
    toy.train_toy(tmp_path, *words, family=DrawnFamily(watch=watch, files=write_files(tmp_path)))
    seeds = [
        values_of(read_workflow(tmp_path / "output" / f"{name}.workflow.json"))["seed"]
        for name in ("x-step00000003", "x-step00000006", "x")
    ]
    assert seeds == [[7], [9], [9]]


def test_what_a_workflow_cannot_have_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = f"{LINE}\n{LINE} --cs 1-3"
    output = train(tmp_path, line=line)
    assert values_of(read_workflow(output / "x.workflow.json"))["filename_prefix"] == ["x_00"]
    assert "prompt 2 is not in the workflow: its nodes have no cfg_schedule" in caplog.text

    with pytest.raises(UserError, match="no sample of .* can be in it: its nodes have no cfg_schedule"):
        train(tmp_path, line=line.split("\n")[1])


def test_texts_as_they_were_typed_are_no_obstacle(tmp_path: Path) -> None:
    request = Request("a cat", 7, typed_texts={"prompt": "a __pet__"})
    prepared = DrawnFamily(files=write_files(tmp_path)).prepare(request)

    assert find_obstacle(MODEL, prepared) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "pass --sample_prompts"),
        (("--sample_prompts", "prompts.txt", "--base_weights", "x.safetensors"), "with --base_weights"),
    ],
)
def test_options_that_do_not_go_with_it(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in ("prompts.txt", "x.safetensors"):
        (tmp_path / name).write_text(LINE, encoding="utf-8")
    typed = [str(tmp_path / word) if "." in word else word for word in words]
    with pytest.raises(OptionError, match=said):
        toy.toy_options(tmp_path, "--save_workflow", *typed).features  # noqa: B018


def test_models_whose_nodes_are_not_known_have_none(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ("--save_workflow", "--sample_prompts", toy.write_prompts(tmp_path))
    with pytest.raises(OptionError, match="not known which ComfyUI nodes generate the samples of toy"):
        toy.train_toy(tmp_path, *words)
    from wan.configs import TASKS
    from wan.workflow import find_comfy_model

    for task in TASKS.values():
        if task.name not in {"t2v-14B", "t2v-1.3B", "t2i-14B", "t2v-A14B"}:
            with pytest.raises(OptionError, match=f"{task.name} also takes images here"):
                find_comfy_model(task, takes_images=False)


def test_a_network_that_comfyui_does_not_read_has_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--save_workflow: ComfyUI cannot read an OFT of this form"):
        train(tmp_path, "--network_module", "networks.oft", "--network_dim", 4)


def test_a_dora_is_converted_with_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    output = train(tmp_path, "--network_args", "dora_wd=True")
    assert values_of(read_workflow(output / "x.workflow.json"))["lora_name"] == ["x_comfyui.safetensors"]
    assert "--target comfyui --dit MODEL" in caplog.text


def test_the_page_links_the_workflow(tmp_path: Path) -> None:
    history = History(tmp_path / "x-history.jsonl", 1)
    for name in ("x.safetensors", "x-step00000004.safetensors"):
        history.add(4, saved=name)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "x.workflow.json").write_text("{}", encoding="utf-8")
    page = tmp_path / "x.html"
    write_training_page(page, history.path, history.run_history, Standing(Start("toy", 8), 4))
    text = page.read_text(encoding="utf-8")
    assert text.count("workflow for ComfyUI") == 1
    assert 'href="./x.workflow.json"' in text
