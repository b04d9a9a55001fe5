"""Files that are damaged, of another kind, or hold code: one clear message, and nothing is lost."""

import random
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.checkpoints.model_files import load_latents
from networks.loading import read_lora
from tests.faults.damage import (
    Damage,
    Harmful,
    empty,
    flip_any_bit,
    flipped_data,
    flipped_header,
    old_pickled_code,
    one_byte_short,
    pickled_code,
    proof_of,
    read_or_refuse,
    truncated,
    web_page,
)
from tests.faults.messages import assert_one_message, run_here
from tests.faults.runs import (
    FRAMEPACK,
    HUNYUAN_VIDEO,
    TOKENIZERS,
    WAN,
    Scripts,
    Undisturbed,
    as_bytes,
    assert_same_tensors,
    told,
)
from tests.tiny.hunyuan_encoders import write_comfy_text_encoders
from tests.tiny.wan_dit import tiny_state
from training.saving.states import CHECKSUM, FILE

# of tests that do not choose themselves: what is wrong there is found by code that all share
FAMILIES = (WAN,)
TOKENIZER = TOKENIZERS[WAN.name]
SMALL = ("--video_size", "32", "32", "--infer_steps", "1", "--prompt", "a cat", "--save_path", "made")


def generating(scripts: Scripts) -> tuple[str, ...]:
    """A generation of one small video."""
    return (scripts.generate_script, *scripts.models, *scripts.length, *SMALL, *TOKENIZERS[scripts.name])


def training(scripts: Scripts) -> tuple[str, ...]:
    """A training of one epoch."""
    return (*scripts.train_only, "--output_dir", "made", "--max_train_epochs", "1", *TOKENIZERS[scripts.name])


GENERATE, SHORT_TRAINING = generating(WAN), training(WAN)
HV_GENERATE, HV_TEXTS = (
    generating(HUNYUAN_VIDEO),
    (*HUNYUAN_VIDEO.cache_texts, *TOKENIZERS[HUNYUAN_VIDEO.name]),
)
NEVER_MERGED = ("--save_merged_model", "never.safetensors")
DAMAGES: dict[str, tuple[str, Damage]] = {
    "truncated": ("bad.safetensors", truncated),
    "one byte short": ("bad.safetensors", one_byte_short),
    "empty": ("bad.safetensors", empty),
    "a web page": ("bad.safetensors", web_page),
    "code in a pickle": ("bad.pth", pickled_code),
    "code in an old pickle": ("bad.pth", old_pickled_code),
    "code in a pickle named safetensors": ("bad.safetensors", pickled_code),
    "a bit of the header flipped": ("bad.safetensors", flipped_header(0)),
}


@dataclass(frozen=True)
class Place:
    """An option that names a file, in a command; where a good file is, and one of another kind."""

    command: tuple[str, ...]
    good: str  # in the folder of good files
    wrong: str
    option: str
    scripts: Scripts = field(default=WAN)  # in whose project


PLACES = (
    Place(SHORT_TRAINING, "dit", "vae", "--dit"),
    Place(GENERATE, "dit", "i2v", "--dit"),
    Place((*WAN.cache_latents,), "vae", "t5", "--vae"),
    Place(GENERATE, "vae", "clip", "--vae"),
    Place((*WAN.cache_texts, *TOKENIZER), "t5", "clip", "--t5"),
    Place(WAN.cache_latents, "clip", "dit", "--clip"),
    Place(training(HUNYUAN_VIDEO), "dit", "vae", "--dit", HUNYUAN_VIDEO),
    Place(HV_GENERATE, "dit", "text_encoder2", "--dit", HUNYUAN_VIDEO),
    Place(HUNYUAN_VIDEO.cache_latents, "vae", "text_encoder1", "--vae", HUNYUAN_VIDEO),
    Place(HV_GENERATE, "vae", "dit", "--vae", HUNYUAN_VIDEO),
    Place(HV_TEXTS, "text_encoder1", "text_encoder2", "--text_encoder1", HUNYUAN_VIDEO),
    Place(HV_GENERATE, "text_encoder1", "dit", "--text_encoder1", HUNYUAN_VIDEO),
    Place(HV_TEXTS, "text_encoder2", "text_encoder1", "--text_encoder2", HUNYUAN_VIDEO),
    Place(HV_GENERATE, "lora", "vae", "--lora_weight", HUNYUAN_VIDEO),
    Place(HV_GENERATE, "latent", "text_encoder1", "--latent_path", HUNYUAN_VIDEO),
    Place(training(FRAMEPACK), "dit", "siglip", "--dit", FRAMEPACK),
    Place(generating(FRAMEPACK), "siglip", "text_encoder2", "--image_encoder", FRAMEPACK),
    Place(FRAMEPACK.cache_latents, "siglip", "vae", "--image_encoder", FRAMEPACK),
    Place(FRAMEPACK.cache_latents, "vae", "siglip", "--vae", FRAMEPACK),
    Place(GENERATE, "lora", "dit", "--lora_weight"),
    Place(SHORT_TRAINING, "lora", "dit", "--network_weights"),
    Place(SHORT_TRAINING, "lora", "t5", "--base_weights"),
    Place(GENERATE, "latent", "vae", "--latent_path"),
    Place(("merge_lora.py", "--lora_weight", "lora.safetensors", *NEVER_MERGED), "dit", "vae", "--dit"),
    Place(
        ("merge_lora.py", "--dit", "model/dit.safetensors", *NEVER_MERGED), "lora", "clip", "--lora_weight"
    ),
    Place(
        ("convert_lora.py", "--target", "other", "--output", "never.safetensors"), "lora", "dit", "--input"
    ),
)


def in_projects(places: Sequence[Place]) -> list[Any]:
    """Each place with the family of its project, for a test's parameters."""
    return [
        pytest.param(place.scripts, place, id=f"{place.command[0]} {place.option} {place.wrong}")
        for place in places
    ]


@pytest.fixture(scope="session")
def good_folders() -> dict[str, Path]:
    """What `good` made, by family."""
    return {}


@pytest.fixture(scope="session")
def good(
    scripts: Scripts,
    project: Path,
    undisturbed: Undisturbed,
    good_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one good file of each kind, by the names in PLACES."""
    if scripts.name not in good_folders:
        good_folders[scripts.name] = write_good(
            tmp_path_factory.mktemp("good"), scripts, project, undisturbed
        )
    return good_folders[scripts.name]


def write_good(folder: Path, scripts: Scripts, project: Path, undisturbed: Undisturbed) -> Path:
    """Write one good file of each kind into a new folder, which is returned."""
    for path in (project / "model").glob("*.safetensors"):
        shutil.copy(path, folder)
    if scripts is WAN:
        save_file(tiny_state("i2v"), folder / "i2v.safetensors")
    else:
        files = write_comfy_text_encoders(folder)
        for name in ("text_encoder1", "text_encoder2"):
            files[name].rename(folder / f"{name}.safetensors")
    shutil.copy(undisturbed.output / "x.safetensors", folder / "lora.safetensors")
    shutil.copy(undisturbed.output / "x.safetensors", project / "lora.safetensors")
    made = folder / "made"
    code, said = run_here(
        *generating(scripts), "--output_type", "latent", "--save_path", made, folder=project
    )
    assert code == 0, said
    next(made.iterdir()).rename(folder / "latent.safetensors")
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


@pytest.mark.parametrize("damage", DAMAGES)  # found by code that all places share
def test_a_bad_file_is_refused_in_one_message(damage: str, project: Path, good: Path, tmp_path: Path) -> None:
    place, (name, make_bad) = PLACES[0], DAMAGES[damage]
    make_bad(good / f"{place.good}.safetensors", tmp_path / name)
    before = everything(project)

    code, said = run_here(*place.command, place.option, tmp_path / name, folder=project)

    assert_one_message(code, said, name)
    assert not proof_of(tmp_path / name).exists(), "the code in the file was run"
    assert before.items() <= everything(project).items()
    assert not (project / "never.safetensors").exists()


@pytest.mark.parametrize(
    ("scripts", "place"), in_projects([*PLACES[:-3], *PLACES[-2:]]), indirect=["scripts"]
)
def test_a_file_of_another_kind_is_refused_in_one_message(place: Place, project: Path, good: Path) -> None:
    before = everything(project)

    code, said = run_here(*place.command, place.option, good / f"{place.wrong}.safetensors", folder=project)

    assert_one_message(code, said, f"{place.wrong}.safetensors")
    assert before.items() <= everything(project).items()
    assert not (project / "never.safetensors").exists()


def test_damaged_weights_of_a_lora_made_here_are_noticed(project: Path, good: Path, tmp_path: Path) -> None:
    flipped_data(good / "lora.safetensors", tmp_path / "bad.safetensors")

    code, said = run_here(*GENERATE, "--lora_weight", tmp_path / "bad.safetensors", folder=project)

    assert_one_message(code, said, "bad.safetensors", "checksum")


def test_a_flipped_bit_never_changes_a_lora_silently(
    good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, dice, path = read_lora(good / "lora.safetensors"), random.Random(1), tmp_path / "x.safetensors"
    for _ in range(150):
        shutil.copy(good / "lora.safetensors", path)
        flip_any_bit(path, dice)
        caplog.clear()
        read = read_or_refuse(read_lora, path)
        warned = any(record.levelname == "WARNING" for record in caplog.records)
        assert read is None or warned or bytes_of(read.tensors) == bytes_of(whole.tensors)


def test_a_flipped_bit_in_the_header_never_changes_latents_silently(good: Path, tmp_path: Path) -> None:
    whole, dice, path = (
        load_latents(good / "latent.safetensors"),
        random.Random(2),
        tmp_path / "x.safetensors",
    )
    header = 8 + int.from_bytes((good / "latent.safetensors").read_bytes()[:8], "little")
    for _ in range(100):
        content = bytearray((good / "latent.safetensors").read_bytes())
        content[dice.randrange(header)] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(content))
        read = read_or_refuse(load_latents, path)
        assert read is None or torch.equal(read.latents, whole.latents)


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

    code, said = run_here(*WAN.train, "--output_dir", tmp_path / "out", folder=project)

    assert code == 0, said
    assert "x-state is ignored in the search for the latest state" in said
    assert_same_tensors(tmp_path / "out" / "x.safetensors", undisturbed.output / "x.safetensors")


def test_a_flipped_bit_never_changes_a_state_silently(undisturbed: Undisturbed, tmp_path: Path) -> None:
    whole, dice = told(undisturbed.output / "x-state"), random.Random(3)
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed.output / "x-state", folder)
        flip_any_bit(folder / dice.choice([FILE, CHECKSUM]), dice)
        read = read_or_refuse(told, folder)
        assert read is None or read == whole
