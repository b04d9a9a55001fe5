"""Files that are damaged, of another kind, or hold code: one clear message, and nothing is lost."""

import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.model_files import load_latents
from networks.loading import read_lora
from tests.faults.damage import (
    Damage,
    Harmful,
    empty,
    flip_any_bit,
    flipped_data,
    flipped_header,
    old_pickled_code,
    pickled_code,
    proof_of,
    read_or_reject,
    truncated,
    web_page,
)
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.faults.runs import (
    TOKENIZERS,
    WAN,
    Undisturbed,
    as_bytes,
    assert_same_tensors,
    told,
)
from training.saving.states import CHECKSUM, FILE

# of tests that do not choose themselves: what is wrong there is found by code that all share
FAMILIES = (WAN,)
TOKENIZER = TOKENIZERS[WAN.name]
SMALL = ("--video_size", "32", "32", "--infer_steps", "1", "--prompt", "a cat", "--save_path", "made")


GENERATE = (WAN.generate_script, *WAN.models, *WAN.length, *SMALL, *TOKENIZER)
SHORT_TRAINING = (*WAN.train_only, "--output_dir", "made", "--max_train_epochs", "1", *TOKENIZER)
DAMAGES: dict[str, tuple[str, Damage]] = {
    "truncated": ("bad.safetensors", truncated),
    "a web page": ("bad.safetensors", web_page),
    "code in a pickle": ("bad.pth", pickled_code),
    "code in an old pickle": ("bad.pth", old_pickled_code),
    "a bit of the header flipped": ("bad.safetensors", flipped_header(0)),
}


@pytest.fixture(scope="session")
def good(project: Path, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good transformer, LoRA and latents."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copy(project / "model" / "dit.safetensors", folder)
    shutil.copy(undisturbed.output / "x.safetensors", folder / "lora.safetensors")
    succeed_here(*GENERATE, "--output_type", "latent", "--save_path", folder / "made", folder=project)
    next((folder / "made").iterdir()).rename(folder / "latent.safetensors")
    return folder


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """All files below a folder with size and time."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: as_bytes(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("damage", DAMAGES)  # found by code that all options share
def test_a_bad_file_is_refused_in_one_message(damage: str, project: Path, good: Path, tmp_path: Path) -> None:
    name, make_bad = DAMAGES[damage]
    make_bad(good / "dit.safetensors", tmp_path / name)
    before = everything(project)

    code, said = run_here(*SHORT_TRAINING, "--dit", tmp_path / name, folder=project)

    assert_one_message(code, said, name)
    assert not proof_of(tmp_path / name).exists(), "the code in the file was run"
    assert before.items() <= everything(project).items()


def test_damaged_weights_of_a_lora_made_here_are_noticed(project: Path, good: Path, tmp_path: Path) -> None:
    flipped_data(good / "lora.safetensors", tmp_path / "bad.safetensors")

    code, said = run_here(*GENERATE, "--lora_weight", tmp_path / "bad.safetensors", folder=project)

    assert_one_message(code, said, "bad.safetensors", "checksum")


def test_a_flipped_bit_never_changes_a_lora_silently(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, dice, path = read_lora(good / "lora.safetensors"), random.Random(1), tmp_path / "x.safetensors"
    for _ in range(150):
        shutil.copy(good / "lora.safetensors", path)
        flip_any_bit(path, dice)
        caplog.clear()
        read = read_or_reject(read_lora, path)
        warned = any(record.levelname == "WARNING" for record in caplog.records)
        assert read is None or warned or bytes_of(read.tensors) == bytes_of(full.tensors)


def test_a_flipped_bit_in_the_header_never_changes_latents_silently(good: Path, tmp_path: Path) -> None:
    full, dice, path = (
        load_latents(good / "latent.safetensors"),
        random.Random(2),
        tmp_path / "x.safetensors",
    )
    header = 8 + int.from_bytes((good / "latent.safetensors").read_bytes()[:8], "little")
    for _ in range(100):
        content = bytearray((good / "latent.safetensors").read_bytes())
        content[dice.randrange(header)] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(content))
        read = read_or_reject(load_latents, path)
        assert read is None or torch.equal(read.latents, full.latents)


# --- states to resume from


def save_content(folder: Path, content: object) -> None:
    torch.save(content, folder / FILE)
    (folder / CHECKSUM).write_text(f"{zlib.crc32((folder / FILE).read_bytes()):08x}\n", encoding="utf-8")


def in_place(damage: Damage, name: str) -> Callable[[Path], None]:
    """Damage one file of the folder."""
    return lambda folder: damage(folder / name, folder / name)


def foreign(folder: Path) -> None:
    """Turn the folder into one as accelerate writes it, with code in both of its files."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name in ("pytorch_model.bin", "optimizer.bin"):
        torch.save({"state": Harmful(proof_of(folder))}, folder / name)


def looped() -> dict[str, object]:
    content: dict[str, object] = {"version": 2, "parts": {}}
    content["optimizer"] = content
    return content


BAD_STATES: dict[str, Callable[[Path], None]] = {
    "truncated": in_place(truncated, FILE),
    "empty": in_place(empty, FILE),
    "of another kind": in_place(web_page, FILE),
    "with a flipped bit": in_place(flipped_data, FILE),
    "with code": in_place(pickled_code, FILE),
    "with code and its checksum": lambda folder: save_content(folder, {"version": Harmful(proof_of(folder))}),
    "in itself": lambda folder: save_content(folder, looped()),
    "without a checksum": lambda folder: (folder / CHECKSUM).unlink(),
    "of a newer version": lambda folder: save_content(folder, {"version": 99}),
    "gone": lambda folder: (folder / FILE).unlink(),
    "foreign, with code": foreign,
}


@pytest.mark.parametrize("fault", BAD_STATES)
def test_a_bad_state_is_refused_in_one_message(
    fault: str, project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder = tmp_path / "bad-state"
    shutil.copytree(undisturbed.output / "x-state", folder)
    BAD_STATES[fault](folder)
    before = everything(tmp_path)

    code, said = run_here(*SHORT_TRAINING, "--resume", folder, folder=project)

    assert_one_message(code, said, "bad-state")
    assert not proof_of(folder).exists(), "the code in the state was run"
    assert everything(tmp_path) == before


def test_the_state_of_another_run_names_what_differs(project: Path, undisturbed: Undisturbed) -> None:
    code, said = run_here(
        *SHORT_TRAINING, "--resume", undisturbed.output / "x-state", "--network_dim", "8", folder=project
    )

    assert_one_message(code, said, "x-state", "--network_dim: 4 in the state, 8 now")


def test_latest_goes_past_a_state_that_was_cut(
    project: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.output, tmp_path / "out")
    truncated(undisturbed.output / "x-state" / FILE, tmp_path / "out" / "x-state" / FILE)

    said = succeed_here(*WAN.train, "--output_dir", tmp_path / "out", folder=project)

    assert "x-state is ignored in the search for the latest state" in said
    assert_same_tensors(tmp_path / "out" / "x.safetensors", undisturbed.output / "x.safetensors")


def test_a_flipped_bit_never_changes_a_state_silently(undisturbed: Undisturbed, tmp_path: Path) -> None:
    full, dice = told(undisturbed.output / "x-state"), random.Random(3)
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed.output / "x-state", folder)
        flip_any_bit(folder / dice.choice([FILE, CHECKSUM]), dice)
        read = read_or_reject(told, folder)
        assert read is None or read == full
