"""Damaged caches, clips that cannot be read, and texts that never end, are huge, nested too deeply or hold
what no text can.
"""

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.batches.finding import find_items
from dataset.batches.reading import read_batch
from dataset.config import load_dataset_config
from modules.errors import CacheError
from modules.media.writing import write_video
from protocols.data import Batch
from tests.commands import run_script
from tests.faults.damage import (
    Damage,
    empty,
    flip_any_bit,
    flipped_data,
    list_of_clips,
    one_byte_short,
    pickled_code,
    proof_of,
    truncated,
)
from tests.faults.messages import assert_one_message, run_here
from tests.faults.runs import WAN, as_bytes, copy_data
from tests.faults.test_bad_inputs import GENERATE, SHORT_TRAINING
from tests.tiny.project import moving_square
from wan.spec import LATENT

LATENTS, TEXT = "clip 1_00000-005_0032x0032_wan.safetensors", "clip 1_wan_te.safetensors"
FAMILIES = (WAN,)  # what is wrong here is found before a family is asked
CACHE_LATENTS, CACHE_TEXTS = WAN.cache_latents, WAN.cache_texts


def other_cache(good: Path, bad: Path) -> None:
    """The text cache where latents belong and the reverse."""
    shutil.copy(good.with_name(TEXT if good.name == LATENTS else LATENTS), bad)


def lora(good: Path, bad: Path) -> None:
    save_file({"lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.0)}, bad)


def without_record(good: Path, bad: Path) -> None:
    """As another program wrote it, but of another size or kind."""
    latents, text = {"latents_3x4x4_float32": torch.zeros(16, 3, 4, 4)}, {"llama_float32": torch.zeros(4, 8)}
    save_file(latents if good.name == LATENTS else text, bad)


BAD_CACHES: dict[str, Damage] = {
    "truncated": truncated,
    "one byte short": one_byte_short,
    "empty": empty,
    "with a flipped bit": flipped_data,
    "code in a pickle": pickled_code,
    "the other kind": other_cache,
    "a LoRA": lora,
    "of another size or family": without_record,
}


@pytest.mark.slow_cases("wan-clip 1_00000-005_0032x0032_wan.safetensors-truncated")
@pytest.mark.parametrize(
    ("name", "damage"),
    [(LATENTS, damage) for damage in BAD_CACHES]
    + [(TEXT, damage) for damage in ("with a flipped bit", "the other kind", "of another size or family")],
)
def test_training_refuses_a_bad_cache_with_the_command_that_mends_it(
    name: str, damage: str, project: Path, tmp_path: Path
) -> None:
    config = copy_data(project, tmp_path, cached=True)
    bad = tmp_path / "cache" / name
    BAD_CACHES[damage](project / "cache" / name, bad)

    code, said = run_here(
        *SHORT_TRAINING, "--dataset_config", config, "--output_dir", tmp_path / "out", folder=project
    )

    command = "python wan_cache_latents.py" if name == LATENTS else "python wan_cache_text_encoder_outputs.py"
    assert_one_message(code, said, name, command)
    assert not proof_of(bad).exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_flipped_bit_never_changes_what_is_trained_on(project: Path, tmp_path: Path) -> None:
    config, dice = load_dataset_config(copy_data(project, tmp_path, cached=True)), random.Random(4)
    item = next(item for item in find_items(config, "wan", LATENT).items if item.source_stem == "clip 1")
    full = told(read_batch((item,), LATENT))
    for number in range(200):
        name = (LATENTS, TEXT)[number % 2]
        shutil.copy(project / "cache" / name, tmp_path / "cache" / name)
        flip_any_bit(tmp_path / "cache" / name, dice)
        try:
            read = told(read_batch((item,), LATENT))
        except CacheError:
            read = full
        assert read == full
        shutil.copy(project / "cache" / name, tmp_path / "cache" / name)


def told(batch: Batch) -> tuple[object, ...]:
    """All that a batch of one says."""
    tensors = {
        name: as_bytes(value if isinstance(value, torch.Tensor) else value[0])
        for name, value in batch.tensors.items()
    }
    return tensors, batch.captions, batch.keys


# --- clips and captions


def cut_matroska(good: Path, bad: Path) -> None:
    """Its beginning is whole, and it says how long it should be."""
    full = bad.with_suffix(".mkv")
    write_video(full, moving_square(60, 64, 64, 1), fps=16)
    content = full.read_bytes()
    bad.unlink()
    full.write_bytes(content[: len(content) // 2])


BAD_CLIPS: dict[str, tuple[Damage, str, str]] = {
    "zero bytes": (empty, "clip 1.mp4", "empty (0 bytes)"),
    "cut, Matroska": (cut_matroska, "clip 1.mkv", "cut short"),
    "a list of other clips": (
        lambda good, bad: list_of_clips(good.with_name("clip 2.mp4"), bad),
        "clip 1.mp4",
        "a list of other files",
    ),
}


@pytest.mark.parametrize("fault", BAD_CLIPS)
def test_a_clip_that_cannot_be_read_is_reported_and_all_others_are_cached(
    fault: str, project: Path, tmp_path: Path
) -> None:
    damage, name, reason = BAD_CLIPS[fault]
    config = copy_data(project, tmp_path, cached=False)
    if fault == "cut, Matroska":  # the beginning would be enough for `head`
        config.write_text(config.read_text(encoding="utf-8").replace('"head"', '"full"'), encoding="utf-8")
    damage(project / "clips" / "clip 1.mp4", tmp_path / "clips" / "clip 1.mp4")

    code, said = run_here(*CACHE_LATENTS, "--dataset_config", config, folder=project)

    assert code == 1
    assert_one_message(code, said, name, reason)
    assert [path.name.split("_")[0] for path in sorted((tmp_path / "cache").glob("*.safetensors"))] == [
        f"clip {n}" for n in (0, 2, 3, 4, 5)
    ]
    for path in (tmp_path / "cache").glob("*.safetensors"):
        load_file(path)


@pytest.mark.parametrize(("gone", "makes_latents"), [("*", True), ("*_te.safetensors", False)])
def test_missing_caches_are_answered_with_the_commands_that_make_them(
    gone: str, makes_latents: bool, project: Path, tmp_path: Path
) -> None:
    config = copy_data(project, tmp_path, cached=True)
    for path in (tmp_path / "cache").glob(gone):
        path.unlink()

    code, said = run_here(
        *SHORT_TRAINING, "--dataset_config", config, "--output_dir", tmp_path / "out", folder=project
    )

    message = assert_one_message(code, said, "python wan_cache_text_encoder_outputs.py")
    assert "model/t5.safetensors" in message
    assert ("python wan_cache_latents.py" in message) == makes_latents
    assert ("model/vae.safetensors" in message) == makes_latents


@pytest.mark.parametrize("more", [(), ("--check",)])
def test_control_codes_in_names_reach_no_terminal(
    more: tuple[str, ...], project: Path, tmp_path: Path
) -> None:
    """In a process of its own: what counts is how it prints."""
    config = copy_data(project, tmp_path, cached=False)
    shutil.copy(tmp_path / "clips" / "clip 1.mp4", tmp_path / "clips" / "clip \x1b[31m\u202e.mp4")

    done = run_script(*CACHE_TEXTS, "--dataset_config", config, *more, folder=project, check=False)

    assert done.returncode == 1, done.stderr
    said = done.stdout + done.stderr
    assert r"\x1b[31m\u202e.mp4" in said
    assert not {"\x1b", "\u202e"} & set(said)


with_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")


# commands whose last word is an option that names a file, and how the file is named
PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "dataset": ((*WAN.cache_latents, "--dataset_config"), ".toml"),
    "dataset in JSON": ((*WAN.cache_texts, "--dataset_config"), ".json"),
    "options": ((*SHORT_TRAINING, "--config_file"), ".toml"),
    "trackers": (
        (*SHORT_TRAINING, "--log_with", "tensorboard", "--logging_dir", "logs", "--log_tracker_config"),
        ".toml",
    ),
    "samples": ((*SHORT_TRAINING, "--sample_at_first", "--sample_prompts"), ".txt"),
    "prompts": ((*GENERATE, "--from_file"), ".txt"),
}
MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "dit": ((*GENERATE, "--dit"), ".safetensors"),
    "vae": ((*WAN.cache_latents, "--vae"), ".pth"),
    "lora": ((*GENERATE, "--lora_weight"), ".safetensors"),
    "tokenizer": ((*WAN.cache_texts, "--t5_tokenizer"), ".json"),
}


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "named pipe"


def endless(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "device"


def huge(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(10 << 30)  # takes no room on the disk
    return "larger than 16 MiB"


def deep(path: Path) -> str:
    path.write_text("[" * 100_000 if path.suffix == ".json" else "a = " + "[" * 100_000, encoding="ascii")
    return "64 levels"


def long_number(path: Path) -> str:
    path.write_text(
        "[1" + "0" * 5000 + "]" if path.suffix == ".json" else "a = 1" + "0" * 5000, encoding="ascii"
    )
    return "4300"


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Fail rather than wait for ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still waiting after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# all faults at one place, and a pipe at each of the others, which read by the same functions
@with_pipes
@pytest.mark.parametrize(
    ("place", "make"),
    [(place, make) for place in ("dataset", "dataset in JSON") for make in (endless, huge, deep, long_number)]
    + [(place, pipe) for place in (*PLACES, *MODELS)]
    + [("dit", endless)],
)
def test_a_file_that_cannot_be_read_is_one_message(
    place: str, make: Callable[[Path], str], project: Path, tmp_path: Path
) -> None:
    command, suffix = {**PLACES, **MODELS}[place]
    bad = tmp_path / f"bad{suffix}"
    reason = make(bad)

    with seconds(60):
        code, said = run_here(*command, bad, folder=project)

    assert_one_message(code, said, bad.name, reason, remedy=place in MODELS)


def in_place_of_caption(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / "clips" / "clip 1.txt").unlink()
        make(folder / "clips" / "clip 1.txt")

    return replace


def as_list(line: str) -> Callable[[Path], None]:
    """Turn the dataset into a list with one good line and this one; CLIP stands for the path of a clip."""

    def write(folder: Path) -> None:
        config, clips = folder / "dataset.toml", (folder / "clips").as_posix()
        text = config.read_text(encoding="utf-8").replace("video_directory", "video_jsonl_file")
        config.write_text(text.replace(f'"{clips}"', f'"{clips}/list.jsonl"'), encoding="utf-8")
        good = f'{{"video_path": "{clips}/clip 0.mp4", "caption": "a square"}}\n'
        bad = line.replace("CLIP", f"{clips}/clip 1.mp4")
        (folder / "clips" / "list.jsonl").write_text(good + bad, encoding="utf-8")

    return write


def name_of_bytes(folder: Path) -> None:
    (folder / "clips" / "clip 1.mp4").rename(os.fsdecode(os.fsencode(folder / "clips") + b"/clip \xff.mp4"))


BAD_DATA: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "caption of gigabytes": (in_place_of_caption(huge), ("clip 1.txt", "larger than 1 MiB")),
    "caption that is a pipe": (in_place_of_caption(pipe), ("clip 1.txt", "named pipe")),
    "caption with NUL": (
        in_place_of_caption(lambda path: path.write_bytes(b"a\0 cat")),
        ("clip 1.txt", "NUL"),
    ),
    "list with NUL in a path": (as_list('{"video_path": "a\\u0000.mp4"}'), ("list.jsonl, line 2", "NUL")),
    "list with half a character in a caption": (
        as_list('{"video_path": "CLIP", "caption": "\\udc00"}'),
        ("line 2: caption", "\\udc00"),
    ),
    "a clip with a name in bytes": (name_of_bytes, ("not UTF-8", "rename", "udcff")),
}


@with_pipes
@pytest.mark.parametrize("fault", BAD_DATA)
def test_a_dataset_that_holds_what_no_text_can_is_one_message(
    fault: str, project: Path, tmp_path: Path
) -> None:
    make, words = BAD_DATA[fault]
    config = copy_data(project, tmp_path, cached=False)
    make(tmp_path)

    with seconds(60):
        code, said = run_here(*WAN.cache_texts, "--dataset_config", config, folder=project)

    assert_one_message(code, said, *words, remedy=False)
