"""Edits with Krea 2: what caches hold, and one message for each input that cannot be used."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.commands import run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import OUTPUT, family_called, write_references
from tests.tiny.project import write_image

FAMILY = family_called("krea2")
TRAIN = (*FAMILY.train, *OUTPUT, "--max_train_steps", "1")
AGAIN = "krea2_cache_text_encoder_outputs.py --dataset_config dataset.toml --text_encoder model/text_encoder"
START = ("--control_image_path", "start.png")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    FAMILY.prepare(tmp_path)
    write_references(tmp_path)
    return tmp_path


def reject(folder: Path, script: str, *words: object, told: Sequence[object]) -> None:
    assert_one_message(*run_here(script, *words, folder=folder), *told)


def test_captions_without_pictures_and_tables_with_them_are_refused(project: Path) -> None:
    """Cached before there were references; cached for text to image, under the name of an edit's."""
    dataset, cache = project / "dataset.toml", project / "cache"
    with_references = dataset.read_text(encoding="utf-8")
    dataset.write_text(with_references.partition("control_directory")[0], encoding="utf-8")
    succeed_here(*FAMILY.cache_texts, "--edit", folder=project)
    succeed_here(*FAMILY.cache_texts, folder=project)
    dataset.write_text(with_references, encoding="utf-8")
    reject(project, *FAMILY.cache_latents, told=["has control images", "pass --edit to caching"])
    succeed_here(*FAMILY.cache_latents, "--edit", folder=project)
    reject(project, *TRAIN, told=["no latent cache"])
    told = [f"python {AGAIN} --edit", "its caption was encoded with 0 of its 1 reference image"]
    reject(project, *TRAIN, "--edit", told=told)
    code, said = run_here(*TRAIN, "--edit", "--check", folder=project)
    assert code == 1
    for path in cache.glob("*_kr2_te.safetensors"):
        path.replace(path.with_name(path.name.replace("_kr2_te", "_kr2e_te")))
    dataset.write_text(with_references.partition("control_directory")[0], encoding="utf-8")
    succeed_here(*FAMILY.cache_latents, "--edit", folder=project)
    reject(project, *TRAIN, "--edit", told=["was encoded without images", "outputs.py with --edit"])


@pytest.mark.slow
def test_a_check_tells_what_captions_take(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are encoded; 12 states of each token. The rest of a file is its header."""
    monkeypatch.setenv("COLUMNS", "300")
    script, *words = (*FAMILY.cache_texts, "--check")
    said = run_script(script, *words, folder=project).stdout
    found = re.search(r"text caches of vl: about \S+ MB, that of the longest caption (\S+) kB", said)
    assert found is not None
    assert "more with what it sees of references" not in said
    assert (
        "more with what it sees of references" in run_script(script, *words, "--edit", folder=project).stdout
    )
    succeed_here(*FAMILY.cache_texts, folder=project)
    sizes = [path.stat().st_size / 1000 for path in (project / "cache").glob("*_kr2_te.safetensors")]
    assert float(found[1]) == pytest.approx(max(sizes), rel=0.05)


@pytest.mark.slow_cases("target")
@pytest.mark.parametrize(
    ("words", "size"), [((), (64, 32)), (("--match_target_res",), (48, 32))], ids=["megapixel", "target"]
)
def test_references_keep_their_shape_up_to_an_area(
    project: Path, words: Sequence[str], size: tuple[int, int]
) -> None:
    """70 x 44 pixels are cut around their middle, or before reduced to as many as 48 x 48: 60 x 38."""
    for path in (project / "control").iterdir():
        write_image(path, 70, 44)
    succeed_here(*FAMILY.cache_latents, "--edit", *words, folder=project)
    found = load_file(project / "cache" / "picture 0_0048x0048_kr2e.safetensors")
    width, height = size
    assert found[f"latents_control_0_1x{height // 8}x{width // 8}_float32"].shape[-2:] == (
        height // 8,
        width // 8,
    )
    said = succeed_here(*FAMILY.cache_latents, "--edit", *words, folder=project)
    assert "0 written, 4 kept" in said
    other = () if words else ("--match_target_res",)
    assert "4 written" in succeed_here(*FAMILY.cache_latents, "--edit", *other, folder=project)


def test_references_that_cannot_be_used_are_refused(project: Path) -> None:
    write_image(project / "point.png", 1, 1)
    Image.new("1", (20000, 10000)).save(project / "huge.png")
    for name, told in (("point.png", "1 x 1 pixels are too few"), ("huge.png", "million")):
        reject(
            project, *FAMILY.generate, "--prompt", "x", "--save_path", "o", START[0], name, told=[name, told]
        )
    for name, told in (("point.png", "1x1 pixels"), ("huge.png", "million")):
        (project / name).replace(project / "control" / "picture 0.png")
        reject(project, *FAMILY.cache_latents, "--edit", told=["picture 0.png", told])
        reject(project, *FAMILY.cache_texts, "--edit", told=["picture 0.png", told])


def test_messages_name_options_as_they_are_typed(project: Path) -> None:
    make = (*FAMILY.generate, "--prompt", "x", "--save_path", "o")
    for words in (("--num-images", "0"), ("--num-images=0",), ("--num_videos", "0")):
        name = words[0].removesuffix("=0")
        message = assert_one_message(*run_here(*make, *words, folder=project), f"{name} 0")
        assert ("--num_videos" in message) is (name == "--num_videos")


def test_an_encoder_without_its_tower_makes_pictures_but_no_edits(project: Path) -> None:
    path = project / "model" / "text_encoder" / "model.safetensors"
    save_file({name: one for name, one in load_file(path).items() if "visual.patch" not in name}, path)
    make = (*FAMILY.generate, "--prompt", "x", "--save_path", "o", "--image_size", "32", "32", "--steps", "1")
    said = succeed_here(*make, "--kv_cache", "--match_target_res", "--edit", folder=project)
    assert "--edit is not needed: --control_image_path alone makes it an edit" in said
    assert "edits images" not in said
    reject(project, *make, *START, told=["has no vision tower", "--text_encoder"])


def test_loras_of_the_other_form_are_refused(project: Path) -> None:
    lora = {f"diffusion_model.blocks.0.attn.wq.lora_{side}.weight": torch.ones(64, 1) for side in "AB"}
    lora["diffusion_model.blocks.0.attn.wq.lora_A.weight"] = torch.ones(1, 64)
    make = (*FAMILY.generate, "--prompt", "x", "--save_path", "o", "--image_size", "32", "32", "--steps", "1")
    make = (*make, "--lora_weight", "lora.safetensors")
    trainer = {"ss_base_model_version": "krea2_edit", "software": '{"name": "ai-toolkit"}'}
    for metadata in ({"name": "krea2_identity_edit_v1_2"}, trainer):
        save_file(lora, project / "lora.safetensors", metadata)
        reject(project, *make, told=["lora.safetensors", "identity edit", "not supported"])
    save_file(lora, project / "lora.safetensors", {**trainer, "ss_network_module": "networks.lora_krea2"})
    succeed_here(*make, folder=project)


@pytest.mark.slow
def test_a_lora_that_was_trained_with_other_references_is_warned_of(project: Path) -> None:
    """Its metadata is that which a training writes."""
    save = ("--edit", "--overwrite")
    for cached in (FAMILY.cache_latents, FAMILY.cache_texts):
        succeed_here(*cached, "--edit", folder=project)
    make = (*FAMILY.generate, "--prompt", "x", "--save_path", "o", "--image_size", "32", "32", "--steps", "1")
    make = (*make, *START, "--lora_weight", "output/lora.safetensors")
    for trained, how in (((), "without"), (("--kv_cache",), "with")):
        succeed_here(*TRAIN, *save, *trained, folder=project)
        told = f"lora.safetensors was trained {how} --kv_cache, as its metadata says"
        for given in ((), ("--kv_cache",)):
            assert (told in succeed_here(*make, *given, folder=project)) == (given != trained)
