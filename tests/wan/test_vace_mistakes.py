"""What newcomers to VACE do wrong: each is answered by one message, before anything is made or learned."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit

ASK = ["--prompt", "a cat", "--seed", 1, "--infer_steps", 1, "--video_size", 32, 48, "--video_length", 5]
MODELS = ["--vae", "models/vae.safetensors", "--t5", "models/t5.safetensors"]
FULL, BASE = ["--dit", "models/dit.safetensors"], ["--dit", "t2v.safetensors"]
CLIP = ["--src_video", "clips/a.mp4"]
TABLE = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
resolution = [48, 32]
target_frames = [5]
caption_extension = ".txt"
"""
CONTROL = 'control_directory = "control"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a clip with a control clip, and pictures that are wrong somehow."""
    made = tmp_path_factory.mktemp("mistakes")
    write_tiny_wan(made / "models", "vace")
    state = load_file(made / "models" / "dit.safetensors")
    module = {name: tensor for name, tensor in state.items() if name.startswith("vace_")}
    write_dit(made, {name: one for name, one in state.items() if name not in module}, name="t2v")
    write_dit(made, module, name="module")
    (made / "said").mkdir()
    write_dit(made / "said", module, name="module")
    said = json.dumps({"num_layers": 4, "vace_layers": [1, 3]})
    (made / "said" / "config.json").write_text(said, encoding="utf-8")
    wide = tiny_state("vace", dim=256)
    write_dit(made, {name: one for name, one in wide.items() if name.startswith("vace_")}, name="wide")
    random = numpy.random.default_rng(2)
    for name in ("clips", "control"):
        (made / name).mkdir()
        write_video(made / name / "a.mp4", random.integers(0, 256, (5, 32, 48, 3), dtype=numpy.uint8), fps=16)
    write_video(made / "short.mp4", random.integers(0, 256, (1, 32, 48, 3), dtype=numpy.uint8), fps=16)
    (made / "clips" / "a.txt").write_text("a cat", encoding="utf-8")
    white = numpy.full((32, 48, 3), 255, numpy.uint8)
    write_png(made / "white.png", white)
    write_png(made / "black.png", 0 * white)
    write_png(made / "tall.png", white.transpose(1, 0, 2))
    write_png(made / "dot.png", white[:1, :1])
    (made / "empty.png").touch()
    (made / "masks").mkdir()
    write_png(made / "masks" / "a.png", white)
    return made


GENERATION = {
    "a mask of another shape": ([*FULL, *CLIP, "--src_mask", "tall.png"], "32 x 48 pixels"),
    "a mask without a clip": ([*FULL, "--src_mask", "white.png"], "Pass --src_video"),
    "a mask that is black": ([*FULL, *CLIP, "--src_mask", "black.png"], "black.png: it is black"),
    "a mask of no bytes": ([*FULL, *CLIP, "--src_mask", "empty.png"], "empty.png is empty"),
    "a reference of one pixel": ([*FULL, "--src_ref_images", "dot.png"], "dot.png"),
    "text to video as VACE": ([*BASE, *CLIP], "given to --vace"),
    "VACE as text to video": ([*FULL, "--task", "t2v-1.3B"], "Use --task vace-1.3B"),
    "blocks of another width": ([*BASE, "--vace", "wide.safetensors"], "2 blocks of width 256"),
    "blocks beside a model that has them": ([*FULL, "--vace", "module.safetensors"], "omit --vace"),
    "another file as blocks": ([*BASE, "--vace", "models/t5.safetensors"], "looks like an umT5 encoder"),
    "blocks that stand elsewhere": (
        [*BASE, "--vace", "said/module.safetensors"],
        "vace_layers are [1, 3]",
    ),
    "blocks as a model": (["--dit", "module.safetensors"], "the blocks of VACE alone"),
    "too many strengths": ([*FULL, *CLIP, "--vace_scale", 1, 0.5, 1], "VACE has 2 layers"),
    "a first image": (
        [*FULL, "--image_path", "white.png"],
        "--image_path white.png: VACE has no such input",
    ),
    "a last image": ([*FULL, "--end_image_path", "white.png"], "--src_video a clip that has it, gray"),
    "a clip that is too short": (
        [*FULL, "--src_video", "short.mp4"],
        "--src_video short.mp4: it has 1 frame",
    ),
    "a clip by its other name": ([*FULL, "--vace_video", "short.mp4"], "--vace_video short.mp4: it has"),
    "a mask that is too short": (
        [*FULL, *CLIP, "--src_mask", "short.mp4"],
        "--src_mask short.mp4: it has 1 frame",
    ),
    "a clip that is not there": ([*FULL, "--src_video", "none.mp4"], "--src_video none.mp4: no such file"),
    "a clip that is none": (
        [*FULL, "--src_video", "models/vae.safetensors"],
        "vae.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("case", GENERATION)
def test_a_request_that_cannot_be_meant(folder: Path, case: str) -> None:
    words, message = GENERATION[case]
    task = [] if "--task" in words else ["--task", "vace-1.3B"]

    code, said = run_here(
        "wan_generate_video.py", *MODELS, *task, *words, *ASK, "--save_path", "made", folder=folder
    )

    assert_one_message(code, said, message)
    assert not list(folder.glob("made/*"))


CACHING = {
    "nothing to learn from": ("", "--vace needs control media or references"),
    "masks without control": ('control_mask_directory = "masks"\n', "Set control_directory"),
}


@pytest.mark.parametrize("case", CACHING)
def test_a_table_that_vace_cannot_learn_from(folder: Path, case: str) -> None:
    keys, message = CACHING[case]
    (folder / "data.toml").write_text(TABLE + keys, encoding="utf-8")

    told = ["--dataset_config", "data.toml", *MODELS[:2], "--vace", "--device", "cpu"]
    code, said = run_here("wan_cache_latents.py", *told, folder=folder)

    assert_one_message(code, said, message)


def test_references_alone_are_enough_for_a_check_too(folder: Path) -> None:
    table = TABLE.replace('"cache"', '"to_check"')
    (folder / "data.toml").write_text(f'{table}reference_directory = "masks"\n', encoding="utf-8")

    told = ["--dataset_config", "data.toml", *MODELS[:2], "--vace", "--device", "cpu", "--check"]
    succeed_here("wan_cache_latents.py", *told, folder=folder)


@pytest.fixture(scope="module")
def cached(folder: Path) -> Path:
    (folder / "control.toml").write_text(TABLE + CONTROL, encoding="utf-8")
    data = ["--dataset_config", "control.toml", "--device", "cpu"]
    succeed_here(
        "wan_cache_latents.py", *data, *MODELS[:2], "--vae_dtype", "float32", "--vace", folder=folder
    )
    succeed_here("wan_cache_text_encoder_outputs.py", *data, *MODELS[2:], folder=folder)
    return folder


def rewrite(path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """As caches of other tools, which hold no checksums."""
    with safe_open(path, "pt") as file:
        metadata = {"architecture": file.metadata()["architecture"], "format_version": "1.0.1"}
    save_file({name: change(name, one).contiguous() for name, one in load_file(path).items()}, path, metadata)


def for_fun_control(path: Path) -> None:
    """One half of the control, which is all of it where --vace is left out."""
    rewrite(path, lambda name, one: one[:16] if "control" in name else one)


def widen(path: Path) -> None:
    rewrite(path, lambda _, one: one.repeat(1, 2))


TRAINING: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "latents for Fun-Control": (
        "*_wan.safetensors",
        for_fun_control,
        "16 channels in the cache, but VACE takes 32",
    ),
    "captions of another encoder": ("*_te.safetensors", widen, "t5 in its cache has width 64"),
    "no captions": ("*_te.safetensors", Path.unlink, "wan_cache_text_encoder_outputs.py"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_caches_that_were_made_for_something_else(cached: Path, case: str) -> None:
    files, change, message = TRAINING[case]
    shutil.copytree(cached / "cache", cached / case)
    for path in (cached / case).glob(files):
        change(path)
    (cached / "of_case.toml").write_text((TABLE + CONTROL).replace('"cache"', f'"{case}"'), encoding="utf-8")
    told = ["--task", "vace-1.3B", *FULL, "--dataset_config", "of_case.toml", "--sdpa"]
    told += ["--network_module", "networks.lora_wan", "--max_train_steps", 1, "--learning_rate", "1e-3"]

    code, said = run_here(
        "wan_train_network.py", *told, "--output_dir", "out", "--output_name", "x", folder=cached
    )

    assert_one_message(code, said, message)
