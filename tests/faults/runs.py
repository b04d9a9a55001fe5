"""The commands that tests of faults run, and how their results are judged: is everything whole, and is it the
same?
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset.cache import commands
from modules.media.reading import read_image, video_frames
from tests.commands import ROOT
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.project import write_clips, write_dataset, write_image
from tests.tiny.wan import write_tiny_wan
from tests.waiting import wait_for
from training.saving.states import CHECKSUM, FILE, SavedState, read_state

SAMPLES = """a cat --w 32 --h 32 --f 5 --d 7 --s 2 --fs 5 --l 3 --n dull
a dog --w 32 --h 32 --f 1 --d 8 --s 1 --fs 5
"""
PROMPTS = """a cat --w 32 --h 32 --f 5 --d 1 --s 2
a dog --w 32 --h 32 --f 1 --d 2 --s 2
two dogs --w 32 --h 48 --f 5 --d 3 --s 2
"""


TRAINING = """--dataset_config dataset.toml --sdpa --seed 7 --learning_rate 1e-2 --lr_scheduler cosine
--lr_warmup_steps 2 --timestep_sampling shift --discrete_flow_shift 3 --num_timestep_buckets 5
--gradient_accumulation_steps 2 --gradient_checkpointing --max_train_epochs 4 --validation_split 0.2
--save_state --save_every_n_steps 3 --save_last_n_steps 2 --save_every_n_epochs 2 --resume latest
--max_data_loader_n_workers 0 --output_name x"""
SAMPLING = "--validate_every_n_steps 3 --sample_prompts samples.txt --sample_every_n_steps 3"


def write_clip_dataset(folder: Path) -> None:
    """Clips of 5 frames with captions, and dataset.toml."""
    write_clips(folder / "clips", count=6)
    write_dataset(folder, frames="5", batch_size=2)


@dataclass(frozen=True)
class Scripts:
    """The commands of one family; they are run in a folder written by `write_project`."""

    name: str
    tag: str  # at the end of cache file names
    write_models: Callable[[Path], object]
    models: tuple[str, ...]
    cache_latents: tuple[str, ...]
    cache_texts: tuple[str, ...]
    train_script: str
    learner: tuple[str, ...]  # the options of what learns
    generate_script: str
    write_data: Callable[[Path], None] = write_clip_dataset
    samples: str = SAMPLES
    prompts: str = PROMPTS
    length: tuple[str, ...] = ("--video_length", "5")  # of a generation
    longer: tuple[str, ...] = ("--video_length", "9")

    @property
    def train_only(self) -> tuple[str, ...]:
        """Training without samples: 5 items to train on and 1 to validate: 3 batches an epoch, thus 2 steps,
        the second of one micro-batch; 8 steps in all.
        """
        return (self.train_script, *self.models, *self.learner, *TRAINING.split())

    @property
    def train(self) -> tuple[str, ...]:
        return (*self.train_only, *SAMPLING.split())

    @property
    def generate(self) -> tuple[str, ...]:
        return (self.generate_script, *self.models, "--from_file", "prompts.txt", "--output_type", "both")


def _lora(module: str) -> tuple[str, ...]:
    return (
        *("--network_module", module, "--network_dim", "4", "--network_alpha", "2"),
        *("--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.05"),
    )


_VAE = ("--vae", "model/vae.safetensors")
_DATASET = ("--dataset_config", "dataset.toml")
_T5 = ("--t5", "model/t5.safetensors")
_ENCODERS = ("--text_encoder1", "model/text_encoder", "--text_encoder2", "model/text_encoder_2")
WAN = Scripts(
    name="wan",
    tag="wan",
    write_models=write_tiny_wan,
    models=("--task", "t2v-1.3B", "--dit", "model/dit.safetensors", *_VAE, *_T5),
    cache_latents=("wan_cache_latents.py", *_DATASET, *_VAE, "--vae_dtype", "float32"),
    cache_texts=("wan_cache_text_encoder_outputs.py", *_DATASET, *_T5),
    train_script="wan_train_network.py",
    learner=_lora("networks.lora_wan"),
    generate_script="wan_generate_video.py",
)
HUNYUAN_VIDEO = Scripts(
    name="hunyuan_video",
    tag="hv",
    write_models=write_tiny_hunyuan,
    models=("--dit", "model/dit.safetensors", *_VAE, "--vae_dtype", "float32", *_ENCODERS),
    cache_latents=("cache_latents.py", *_DATASET, *_VAE, "--vae_dtype", "float32"),
    cache_texts=("cache_text_encoder_outputs.py", *_DATASET, *_ENCODERS),
    train_script="hv_train_network.py",
    learner=_lora("networks.lora"),
    generate_script="hv_generate_video.py",
)


def write_sections(folder: Path) -> None:
    """Clips of a single section, one latent frame long, and a start image."""
    write_clips(folder / "clips", count=6)
    write_dataset(folder, frames="5", batch_size=2, more="fp_latent_window_size = 1")
    write_image(folder / "start.png", 32, 32)


_IMAGE_ENCODER = ("--image_encoder", "model/siglip.safetensors")
FRAMEPACK = Scripts(
    name="framepack",
    tag="fp",
    write_models=write_tiny_framepack,
    models=(
        *("--dit", "model/dit.safetensors", *_VAE, *_ENCODERS, *_IMAGE_ENCODER),
        *("--latent_window_size", "1"),
    ),
    cache_latents=("fpack_cache_latents.py", *_DATASET, *_VAE, *_IMAGE_ENCODER),
    cache_texts=("fpack_cache_text_encoder_outputs.py", *_DATASET, *_ENCODERS),
    train_script="fpack_train_network.py",
    learner=_lora("networks.lora_framepack"),
    generate_script="fpack_generate_video.py",
    write_data=write_sections,
    samples="""a cat --w 32 --h 32 --f 9 --d 7 --s 2 --l 3 --n dull --i start.png
a dog --w 32 --h 32 --of no_2x --ci start.png --d 8 --s 1 --i start.png
""",
    prompts="""a cat --w 32 --h 32 --vs 2 --d 1 --s 2 --i start.png
a dog --w 32 --h 32 --of no_4x --ci start.png --d 2 --s 2 --i start.png
two dogs --w 32 --h 48 --vs 1 --d 3 --s 2 --i start.png
""",
    length=("--video_sections", "1", "--image_path", "start.png"),
    longer=("--video_sections", "2", "--image_path", "start.png"),
)


# given, so that none is looked for on the hub
TOKENIZERS = {
    WAN.name: ("--t5_tokenizer", "model/google/umt5-xxl"),
    HUNYUAN_VIDEO.name: (
        *("--text_encoder1_tokenizer", "model/text_encoder"),
        *("--text_encoder2_tokenizer", "model/text_encoder_2"),
    ),
}
TOKENIZERS[FRAMEPACK.name] = TOKENIZERS[HUNYUAN_VIDEO.name]


FAMILIES = (WAN, HUNYUAN_VIDEO, FRAMEPACK)
DYING = ROOT / "tests" / "faults" / "run_and_die.py"
_TIME = re.compile(r"\d{14}|\d{8}-\d{6}")


@dataclass(frozen=True)
class Undisturbed:
    """A training that nothing happened to, and how often it passed each point of run_and_die.py."""

    output: Path
    passed: dict[str, int]
    seconds: float


def write_project(folder: Path, scripts: Scripts) -> None:
    """Models, clips with captions, dataset.toml, prompts; no caches."""
    scripts.write_models(folder / "model")
    scripts.write_data(folder)
    (folder / "samples.txt").write_text(scripts.samples, encoding="utf-8")
    (folder / "prompts.txt").write_text(scripts.prompts, encoding="utf-8")


def copy_data(project: Path, folder: Path, *, cached: bool) -> Path:
    """The project's clips, and its caches, once more below `folder`.

    Returns the dataset configuration that names them.
    """
    for name in ("clips", "control"):
        if (project / name).exists():
            shutil.copytree(project / name, folder / name)
    if cached:
        shutil.copytree(project / "cache", folder / "cache")
    text = (
        (project / "dataset.toml").read_text(encoding="utf-8").replace(project.as_posix(), folder.as_posix())
    )
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    return folder / "dataset.toml"


def assert_same_caches(folder: Path, undisturbed: Path) -> None:
    """Two cache folders hold the same files with equal tensors, and nothing else but how they were made."""
    found, expected = (
        sorted(path.name for path in each.iterdir() if path.name != commands.NAME)
        for each in (folder, undisturbed)
    )
    assert found == expected
    for name in found:
        if name != "index.jsonl":  # it has the times of the sources
            assert_same_tensors(folder / name, undisturbed / name)


def assert_whole(folder: Path) -> None:
    """Everything below `folder` that has a final name can be read to its end."""
    for path in visible_files(folder):
        # a text cache waits for further encoders as .part, whole too
        if path.suffix in {".safetensors", ".part"}:
            load_file(path)
        elif path.suffix == ".mp4":
            # what sections have shown so far may be any part of a video
            frames = len(list(video_frames(path)))
            assert frames in {5, 9} or (frames and path.stem.endswith("_progress")), path
        elif path.suffix == ".png":
            read_image(path)
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>"), path
        elif path.name.endswith("-history.jsonl"):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a kill may cut the last one
                json.loads(line)
        elif path.name == "index.jsonl":  # of caches: written at once
            assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        else:
            assert path.name in {FILE, CHECKSUM}, f"{path} is not a finished file"
    for state in folder.glob("x*-state"):
        assert isinstance(read_state(state), SavedState)


def visible_files(folder: Path) -> list[Path]:
    """All files that are not below a hidden name."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def assert_same_tensors(file: Path, other: Path) -> None:
    """Two files hold equal tensors, to the byte."""
    one, two = load_file(file), load_file(other)
    assert one.keys() == two.keys()
    different = [name for name in one if as_bytes(one[name]) != as_bytes(two[name])]
    assert not different, (
        f"{file.name}: {len(different)} of {len(one)} tensors differ, such as {different[:3]}"
    )


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bf16


def assert_same_training(output: Path, undisturbed: Path) -> None:
    """A training that was killed has left what the undisturbed one did: weights, states, samples, and nothing
    else.
    """
    # the processes that draw the page go on a little after their trainings, and then leave nothing hidden
    wait_for(lambda: not [*output.glob(".x.html.*")], lambda: [*output.glob(".*")])
    assert_whole(output)
    different = _names(output) ^ _names(undisturbed)
    assert not different, sorted(different)
    assert_same_end(output, undisturbed)


def assert_same_end(output: Path, undisturbed: Path) -> None:
    """What was trained, the final state and the samples are those of the undisturbed training."""
    assert_same_tensors(output / "x.safetensors", undisturbed / "x.safetensors")
    assert told(output / "x-state") == told(undisturbed / "x-state")
    assert _reported(output) == _reported(undisturbed)
    expected = {timeless(path): path for path in (undisturbed / "sample").iterdir()}
    found = {timeless(path): path for path in (output / "sample").iterdir() if not path.name.startswith(".")}
    assert found.keys() == expected.keys()
    for name, path in found.items():
        assert_same_pixels(path, expected[name])


def assert_same_pixels(one: Path, two: Path) -> None:
    """Two images are equal; two videos show the same, as x264 itself does not always make the same of equal
    frames.
    """
    first, second = (
        np.stack(list(video_frames(path)) if path.suffix == ".mp4" else [read_image(path)])
        for path in (one, two)
    )
    difference = np.abs(first.astype(int) - second.astype(int))
    shows_video = one.suffix == ".mp4" or one.stem.endswith("_sheet")
    is_same = difference.mean() < 2 if shows_video else not difference.any()
    assert is_same, f"{one.name} shows something else than {two.name}: {difference.mean()} on average"


def timeless(path: Path) -> str:
    """A file's name without the time in it."""
    return _TIME.sub("TIME", path.name)


def _names(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if ".before-" not in str(path.relative_to(folder))]
    return {timeless(path) for path in paths}  # what was set aside was saved before the first state


def _reported(output: Path) -> dict[tuple[int, str], object]:
    """What the history says of each step: its loss, its validation, its samples, without their times."""
    lines = (output / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "step" in row and "started" not in row]
    kinds = ("loss", "validation", "samples", "saved")
    return {(row["step"], kind): row[kind] for row in rows for kind in kinds if kind in row}


def told(folder: Path) -> object:
    """All that a state says, but when its run began."""
    state = read_state(folder)
    assert isinstance(state, SavedState)
    progress = {**vars(state.progress), "session_id": 0, "started_at": 0}
    return _comparable({**vars(state), "folder": "", "progress": progress})


def _comparable(value: object) -> object:
    """A value with the bytes of its tensors."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), as_bytes(value)
    if isinstance(value, dict):
        return {name: _comparable(each) for name, each in value.items()}
    return [_comparable(each) for each in value] if isinstance(value, (list, tuple)) else value
