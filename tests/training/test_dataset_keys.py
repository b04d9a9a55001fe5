"""What dataset keys change in a run: texts, masks and weights. All is exact on resume and over processes."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataset.cache.files import checksum, write_tensors
from dataset.cache.records import TextRecord, text_metadata
from modules.contract.data import LOSS_MASK
from modules.errors import OptionError
from tests.training.toy import Killed, ToyFamily, killed_at, same, toy_options, train_toy, write_caches
from training.loss import training_loss
from training.run import prepare_run, train_network

KEYS = "multi_caption = true\ncaption_dropout_rate = 0.3"


def write_text(path: Path, value: float, captions: int) -> None:
    tensors = {"varlen_letters_float32": torch.full((1, 1), value)}
    crc32 = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    settings = {"multi_caption": True, "captions": captions}
    record = TextRecord({"letters": "1"}, "a text", None, crc32, settings)
    write_tensors(path, tensors, {"architecture": "toy"} | text_metadata({"letters": record}))


def write_dataset(folder: Path, keys: str = KEYS, batch_size: int = 2) -> None:
    """Caches of five pictures with three captions each, two of them with masks, and of the empty prompt."""
    write_caches(folder, batch_size=batch_size, more=keys)
    for index in range(5):
        for number, name in enumerate(["", ".caption2", ".caption3"]):
            path = folder / "cache" / f"clip{index}_toy_te{name}.safetensors"
            write_text(path, 0.1 * index + 10 * number, captions=3)
    for index in (1, 4):
        path = folder / "cache" / f"clip{index}_0032x0032_toy.safetensors"
        mask = torch.linspace(0, 1, 16).view(1, 4, 4).half()
        write_tensors(path, {**load_file(path), LOSS_MASK: mask}, {})
    write_text(folder / "cache" / "toy_te.empty.safetensors", -50.0, captions=1)


def test_captions_and_dropout_change_the_run(tmp_path: Path) -> None:
    found = []
    for place, keys in enumerate([KEYS, KEYS.replace("0.3", "0.0"), KEYS.replace("0.3", "1")]):
        write_dataset(tmp_path / str(place), keys)
        found.append(train_toy(tmp_path / str(place)))

    assert not same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("moment", [1, 4, 8])
def test_a_killed_run_goes_on_with_the_same_texts(tmp_path: Path, moment: int) -> None:
    settings = ["--gradient_accumulation_steps", 2, "--save_every_n_steps", 2, "--save_state"]
    settings += ["--resume", "latest"]
    for name in ("whole", "killed"):
        write_dataset(tmp_path / name)
    whole = train_toy(tmp_path / "whole", *settings)

    with pytest.raises(Killed):
        train_toy(tmp_path / "killed", *settings, family=killed_at(moment))

    assert same(whole, train_toy(tmp_path / "killed", *settings))


def two_tables(folder: Path, weight: str) -> None:
    """Three pictures, and two of a second table with `weight`."""
    write_caches(folder)
    (folder / "more").mkdir()
    for index in (3, 4):
        for path in (folder / "cache").glob(f"clip{index}_*"):
            path.rename(folder / "more" / path.name)
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        cache = (folder / "more").as_posix()
        file.write(f'[[datasets]]\nimage_directory = "x"\ncache_directory = "{cache}"\n{weight}\n')


def test_items_of_a_regularisation_table_count_by_its_weight(tmp_path: Path) -> None:
    losses = {}
    for weight in ("", "prior_loss_weight = 1", "prior_loss_weight = 0.25"):
        folder = tmp_path / str(len(losses))
        two_tables(folder, weight)
        with prepare_run(ToyFamily(), toy_options(folder)) as run:
            batches = [run.feed.batches[0, index].data for index in range(5)]
            losses[weight] = {
                batch.batch.keys[0][:5]: training_loss(ToyFamily(), run.dits.at(0), batch, nullcontext).item()
                for batch in batches
            }

    plain, one, quarter = losses.values()
    assert one == plain
    assert quarter == {
        stem: pytest.approx(loss * (0.25 if stem in {"clip3", "clip4"} else 1), rel=1e-6)
        for stem, loss in plain.items()
    }


def test_a_changed_weight_is_another_run(tmp_path: Path) -> None:
    two_tables(tmp_path, "prior_loss_weight = 0.5")
    train_toy(tmp_path, "--max_train_steps", 2, "--save_state")
    path = tmp_path / "dataset.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "0.7"), encoding="utf-8")

    with pytest.raises(OptionError, match=r"batches of an epoch .* in the state, .* now"):
        train_network(ToyFamily(), toy_options(tmp_path, "--resume", "latest"))
