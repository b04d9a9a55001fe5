"""Every key of a dataset file changes what is learned, or the list says why it cannot."""

import dataclasses
import json
import tomllib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.caching.loop import cache_media
from dataset.config import load_dataset_config
from dataset.forms.composing import KEYS, SOURCES
from dataset.subset_options import DATASET, SUBSET_KEYS
from modules.options import NoOptions
from protocols.data import Conditions
from protocols.family import TextEncoder
from protocols.requests import Prompt
from tests.dataset.making import make_clip
from tests.dataset.toy_family import ToyFamily
from tests.dataset.toy_family import options as toy_options
from tests.training.toy import ToyTextEncoder, same
from tests.training.toy_images import ImageFamily
from training.image_options import ImageTrainerDefaults, read_image_training
from training.run import train_network

DATA = Path(__file__).resolve().parent.parent / "data" / "acts_dataset.toml"
ACTS: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(DATA.read_text(encoding="utf-8"))
STEPS = 4
TEXTS = (
    "a ||| b {c|d}, x;;;y; z\nsecond line, e, f",
    "g ||| h, i; j, k;;;l",
)
SIZES = ((48, 48), (96, 48), (48, 80))


class TextsByContent(ToyTextEncoder):
    """A text becomes a number that differs for every other text."""

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        numbers = [zlib.crc32(prompt.text.encode("utf-8")) / 2**32 for prompt in prompts]
        return [{"letters": [torch.full((1, 1), number)]} for number in numbers]


class FamilyOfTexts(ImageFamily):
    def text_encoders(self) -> Sequence[TextEncoder]:
        return [TextsByContent()]


def make_images(folder: Path, seed: int) -> None:
    """Write three pictures with faces in their names, transparency and two kinds of captions; the last has no
    caption.
    """
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    for index, (width, height) in enumerate(SIZES):
        stem = f"{seed}{index}_{width // 2}_{height // 2}_12_12"
        pixels = numbers.integers(0, 256, (height, width, 4), np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.png")
        if index < len(TEXTS):
            (folder / f"{stem}.txt").write_text(TEXTS[index], encoding="utf-8")
            (folder / f"{stem}.caption").write_text(f"another {index}", encoding="utf-8")


def make_folder(folder: Path) -> None:
    make_images(folder / "pictures", 1)
    make_images(folder / "others", 2)
    (folder / "masks").mkdir()
    for picture in (folder / "pictures").glob("*.png"):
        with Image.open(picture) as image:
            mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, :24] = 255
        Image.fromarray(mask).save(folder / "masks" / picture.name)
    listed = {path.stem: {"caption": "of the list"} for path in (folder / "pictures").glob("*.png")}
    (folder / "list.json").write_text(json.dumps(listed), encoding="utf-8")


def written(folder: Path, form: str, keys: dict[str, Any], of_second: dict[str, Any]) -> Path:
    """Write a dataset file with one table, or two if the second has keys of its own."""
    default: dict[str, Any] = {"resolution": [48, 48], "caption_extension": ".txt", "class_tokens": "cat"}
    tables = [default | keys]
    if of_second:
        tables.append(default | of_second)
    content: dict[str, Any]
    if form == "subsets":
        outer = {"batch_size": 1, "enable_bucket": False, "resolution": [48, 48]}
        subsets = []
        for place, table in zip(("pictures", "others"), tables, strict=False):
            subset = {"image_dir": place}
            for name, value in table.items():
                is_outer = SUBSET_KEYS[name].level == DATASET
                (outer if is_outer else subset)[name] = value
            if "metadata_file" in subset:
                subset["image_dir"] = "pictures"
            subsets.append({name: _in(folder, name, value) for name, value in subset.items()})
        content = {"datasets": [{**outer, "subsets": subsets}]}
    else:
        places = ("pictures", "others")
        content = {
            "datasets": [
                {"image_directory": str(folder / place)}
                | {name: _in(folder, name, value) for name, value in table.items()}
                | {"cache_directory": str(folder / f"cache_{place}")}
                for place, table in zip(places, tables, strict=False)
            ]
        }
    path = folder / "dataset.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _in(folder: Path, name: str, value: Any) -> Any:
    return str(folder / value) if name.endswith(("_dir", "_directory", "_file")) else value


def learned(folder: Path, path: Path, words: Sequence[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    output = folder / "output"
    argv = ["--dataset_config", path, "--output_dir", output, "--output_name", "x", "--seed", 3, "--no_page"]
    argv += ["--network_train_unet_only", "--learning_rate", "1e-2", "--max_train_steps", STEPS]
    argv += ["--overwrite", *words]
    defaults = ImageTrainerDefaults("uniform", 1.0, "raw")
    settings = read_image_training("", NoOptions, defaults, [str(word) for word in argv])[0]
    assert train_network(FamilyOfTexts(), settings) == 0
    return load_file(output / "x.safetensors")


def cases(form: str) -> list[str]:
    return [name for name, entry in ACTS[form].items() if "same" not in entry]


def test_every_key_is_listed() -> None:
    assert set(ACTS["subsets"]) == set(SUBSET_KEYS)
    assert {*ACTS["datasets"], *ACTS["clips"]} == set(KEYS) - set(SOURCES)
    assert all(entry["same"] for form in ACTS.values() for entry in form.values() if "value" not in entry)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training whose tables have keys of their own, in the first one or a second one."""

    form: str
    keys: dict[str, Any]
    is_second: bool
    options: tuple[str, ...]

    def learn(self, folder: Path) -> dict[str, torch.Tensor]:
        make_folder(folder)
        first, second = ({}, {"num_repeats": 1} | self.keys) if self.is_second else (self.keys, {})
        return learned(folder, written(folder, self.form, first, second), self.options)


LearnedBefore = Callable[[Run], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def learned_before(tmp_path_factory: pytest.TempPathFactory) -> LearnedBefore:
    """Return what trains each run once: most keys are compared with the same one."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def learn(run: Run) -> dict[str, torch.Tensor]:
        text = repr(run)
        if text not in known:
            known[text] = run.learn(tmp_path_factory.mktemp("before"))
        return known[text]

    return learn


@pytest.mark.parametrize("form", ["subsets", "datasets"])
def test_the_same_keys_in_another_folder_change_nothing(
    tmp_path: Path, form: str, learned_before: LearnedBefore
) -> None:
    run = Run(form, {}, is_second=False, options=())
    assert same(run.learn(tmp_path), learned_before(run))


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form in ("subsets", "datasets") for name in cases(form)]
)
def test_a_key_changes_what_is_learned(
    tmp_path: Path, form: str, name: str, learned_before: LearnedBefore
) -> None:
    entry = ACTS[form][name]
    shared = entry.get("with", {})
    before = shared | ({name: entry["before"]} if "before" in entry else {})
    is_second, options = entry.get("of") == "second", tuple(entry.get("options", ()))
    changed = Run(form, shared | {name: entry["value"]}, is_second, options)

    unchanged = learned_before(dataclasses.replace(changed, keys=before))
    assert not same(changed.learn(tmp_path), unchanged), f"{name} = {entry['value']} changes nothing"


def cached(folder: Path, keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the cached latents of a table of clips by file and name."""
    cache = folder / f"cache{len(list(folder.glob('cache*')))}"
    table = {"video_directory": str(folder / "clips"), "cache_directory": str(cache), "resolution": [32, 32]}
    path = folder / "dataset.json"
    path.write_text(json.dumps({"datasets": [table | keys]}), encoding="utf-8")
    family = dataclasses.replace(ToyFamily())
    cache_media(family, load_dataset_config(path), toy_options())
    tensors = {}
    for file in sorted(cache.glob("*.safetensors")):
        tensors |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    return tensors


@pytest.mark.parametrize("name", cases("clips"))
def test_a_key_of_clips_changes_the_cached_latents(tmp_path: Path, name: str) -> None:
    (tmp_path / "clips").mkdir()
    make_clip(tmp_path / "clips" / "a.mp4", 24)
    entry = ACTS["clips"][name]
    before = cached(tmp_path, entry.get("with", {}))
    after = cached(tmp_path, entry.get("with", {}) | {name: entry["value"]})

    assert before.keys() != after.keys() or not same(before, after)
