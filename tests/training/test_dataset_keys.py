"""What datasets change in a run: keys, shards, and families unlike the video families."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.cache.records import TextRecord, record_metadata
from dataset.cache_files import checksum, read_entry, write_tensors
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import load_dataset_config
from modules.errors import OptionError
from modules.options import read_options
from protocols.data import LOSS_MASK
from protocols.family import NoiseSpec
from tests.dataset.toy_family import options as caching_options
from tests.faults.messages import run_here, succeed_here
from tests.tiny.families import FAMILIES, TinyFamily
from tests.training import toy
from tests.training.toy_images import LATENT, LEVELS, ImageFamily, count_tokens
from training.noise_options import SAMPLERS, SIZE_SAMPLERS
from training.options import TrainingOptions, read_arguments, training_parser
from training.run import prepare_run, train_network
from training.targets.passes import training_loss

KEYS = "multi_caption = true\ncaption_dropout_rate = 0.3"


def write_text(path: Path, value: float, captions: int) -> None:
    tensors = {"varlen_letters_float32": torch.full((1, 1), value)}
    crc32 = {name: checksum(name, tensor) for name, tensor in tensors.items()}
    settings = {"multi_caption": True, "captions": captions}
    record = TextRecord({"letters": "1"}, "a text", None, crc32, settings)
    write_tensors(path, tensors, {"architecture": "toy"} | record_metadata({"letters": record}))


def write_dataset(folder: Path, keys: str = KEYS, batch_size: int = 2) -> None:
    """Caches of five pictures with three captions each, two of them with masks, and of the empty prompt."""
    toy.write_caches(folder, batch_size=batch_size, more=keys)
    for index in range(5):
        for number, name in enumerate(["", ".caption2", ".caption3"]):
            path = folder / "cache" / f"clip{index}_toy_te{name}.safetensors"
            write_text(path, 0.1 * index + 10 * number, captions=3)
    for index in (1, 4):
        path = folder / "cache" / f"clip{index}_0032x0032_toy.safetensors"
        mask = torch.linspace(0, 1, 16).view(1, 4, 4).half()
        write_tensors(path, {**load_file(path), LOSS_MASK: mask}, {})
    write_text(folder / "cache" / "toy_te.empty.safetensors", -50.0, captions=1)


def test_a_killed_run_goes_on_with_the_same_texts(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    words = ["--gradient_accumulation_steps", 2, "--save_every_n_steps", 2, "--save_state"]
    words += ["--resume", "latest"]

    assert toy.same(toy.train_toy(tmp_path, *words), toy.train_with_kills(tmp_path, *words, moments=(1, 8)))


def two_tables(folder: Path, weight: str) -> None:
    """Three pictures, and two of a second table with `weight`."""
    path = toy.write_caches(folder)
    (folder / "more").mkdir()
    for cache in (folder / "cache").glob("clip[34]_*"):
        cache.rename(folder / "more" / cache.name)
    table = f'[[datasets]]\nimage_directory = "x"\ncache_directory = "{(folder / "more").as_posix()}"\n'
    path.write_text(path.read_text(encoding="utf-8") + table + weight, encoding="utf-8")


def test_items_of_a_regularisation_table_count_by_its_weight(tmp_path: Path) -> None:
    losses = []
    for weight in ("", "prior_loss_weight = 1", "prior_loss_weight = 0.25"):
        folder = tmp_path / str(len(losses))
        two_tables(folder, weight)
        with prepare_run(toy.ToyFamily(), toy.toy_options(folder)) as run:
            batches = [run.feed.read((0, index)) for index in range(5)]
            found = [
                training_loss(toy.ToyFamily(), run.model.dits.on_device(0), batch, nullcontext).item()
                for batch in batches
            ]
            losses.append({batch.batch.keys[0][:5]: loss for batch, loss in zip(batches, found, strict=True)})

    plain, one, quarter = losses
    assert one == plain
    share = {"clip3": 0.25, "clip4": 0.25}
    assert quarter == pytest.approx(
        {stem: loss * share.get(stem, 1) for stem, loss in plain.items()}, rel=1e-6
    )


def test_a_changed_weight_is_another_run(tmp_path: Path) -> None:
    two_tables(tmp_path, "prior_loss_weight = 0.5")
    toy.train_toy(tmp_path, "--max_train_steps", 2, "--save_state")
    path = tmp_path / "dataset.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "0.7"), encoding="utf-8")

    with pytest.raises(OptionError, match=r"batches of an epoch .* in the state, .* now"):
        toy.train_toy(tmp_path, "--resume", "latest")


OF_THE_RUN = {"ss_ss_session_id", "ss_session_id", "ss_training_started_at", "ss_training_finished_at"}
OF_THE_RUN |= {"modelspec.date", "sshs_model_hash"}


def train_from(family: TinyFamily, folder: Path, form: str, workers: int) -> Path:
    """Cache in a form and train_from; return the LoRA."""
    config = folder / "dataset.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("[general]\n", f'[general]\ncache_format = "{form}"\n'), encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    output = ["--output_dir", "output", "--output_name", form, "--seed", "1", "--max_train_steps", "2"]
    succeed_here(*family.train, *output, "--max_data_loader_n_workers", str(workers), folder=folder)
    config.write_text(text, encoding="utf-8")
    return folder / "output" / f"{form}.safetensors"


def facts(path: Path) -> dict[str, str]:
    told = toy.metadata_of(path).items()
    return {key: value.replace("shards", "files") for key, value in told if key not in OF_THE_RUN}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=() if one is FAMILIES[0] else pytest.mark.slow)
        for one in FAMILIES
    ],
)
def test_a_lora_from_shards_is_that_from_files(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    theirs = train_from(family, tmp_path, "files", workers=0)
    (tmp_path / "cache").rename(tmp_path / "single")
    ours = train_from(family, tmp_path, "shards", workers=1)

    assert len([*(tmp_path / "cache").glob("[!.]*")]) == 1
    assert len(os.listdir(tmp_path / "single")) >= 4 * 2
    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys()
    assert all(mine[name].equal(other[name]) for name in mine)
    assert any(tensor.any() for name, tensor in mine.items() if "lora_up" in name or "lora_B" in name)
    assert facts(ours) == facts(theirs)

    if family is FAMILIES[0]:  # the trainings of picture models encode what they miss
        code, said = run_here(*family.train, "--output_dir", "output", "--output_name", "x", folder=tmp_path)
        assert code == 1
        assert 'cache_format = "files", but in' in said
        assert "tools/convert_cache.py --dataset_config dataset.toml --to files" in said
    succeed_here(
        "tools/convert_cache.py", "--dataset_config", "dataset.toml", "--to", "files", folder=tmp_path
    )
    # only the caching scripts write it, and not of tables that it cannot describe
    (tmp_path / "single" / "index.jsonl").unlink(missing_ok=True)
    for path in (tmp_path / "single").iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes(), path.name


NOISE_PREDICTION = NoiseSpec(training_offset=0.0, integer_timesteps=True, table=LEVELS)
STEPS = 6


def cache(folder: Path, left: int = 255, right: int = 255) -> None:
    """Three pictures of 32 x 32 pixels, cached. left, right: alpha of their halves."""
    (folder / "pictures").mkdir(parents=True)
    random = np.random.default_rng(1)
    for index in range(3):
        pixels = random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[:, :16, 3], pixels[:, 16:, 3] = left, right
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text("a" * (index + 1), encoding="utf-8")
    path, here = folder / "dataset.toml", folder.as_posix()
    general = '[general]\nresolution = [32, 32]\nbatch_size = 2\ncaption_extension = ".txt"\n'
    table = f'[[datasets]]\nimage_directory = "{here}/pictures"\ncache_directory = "{here}/cache"\n'
    path.write_text(general + table, encoding="utf-8")
    config = load_dataset_config(path)
    assert cache_media(ImageFamily(), config, caching_options()).written == 3
    assert cache_texts(ImageFamily(), config, caching_options()).written == 3


def train(folder: Path, family: ImageFamily, *arguments: object) -> dict[str, torch.Tensor]:
    """The LoRA of a whole training, its options as a script of that family would have them."""
    default = ["--dataset_config", folder / "dataset.toml", "--output_dir", folder / "output"]
    default += ["--output_name", "x", "--seed", 3, "--learning_rate", "1e-2", "--max_train_steps", STEPS]
    argv = [str(one) for one in (*default, "--max_data_loader_n_workers", 0, *arguments)]
    parser = training_parser("", settings={"timestep_sampling": {"choices": (*SAMPLERS, *SIZE_SAMPLERS)}})
    assert train_network(family, read_options(TrainingOptions, read_arguments(parser, argv, {}))) == 0
    return load_file(folder / "output" / "x.safetensors")


def made(noise: NoiseSpec | None = None) -> ImageFamily:
    torch.manual_seed(7)
    family = ImageFamily()
    return family if noise is None else replace(family, noise=noise)


def has_learned(tensors: dict[str, torch.Tensor]) -> bool:
    return any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))


def test_a_picture_family_is_cached_and_trained_with_a_shift_that_follows_the_size(tmp_path: Path) -> None:
    cache(tmp_path)
    family = made()

    assert has_learned(train(tmp_path, family, "--timestep_sampling", "flux_shift", "--loss_type", "huber"))

    times = torch.cat([times for _, times in family.network.fed])
    assert len(family.network.fed) == STEPS
    assert times.min() > 0
    assert times.max() <= 1  # without the 1 / 1000 that video families add
    shape = count_tokens((4, 4)), 4 * LATENT.channels
    assert {tokens.shape[1:] for tokens, _ in family.network.fed} == {shape}


@pytest.mark.parametrize(("right", "teaches"), [(255, True), (0, False)])
def test_transparent_places_of_a_picture_teach_nothing(tmp_path: Path, right: int, teaches: bool) -> None:
    cache(tmp_path, left=0, right=right)

    masks = [read_entry(path).named["alpha_mask"] for path in (tmp_path / "cache").glob("*_pic.safetensors")]

    assert [mask.mean() for mask in masks] == [right / 255 / 2] * 3
    assert has_learned(train(tmp_path, made())) is teaches


def test_a_model_that_predicts_noise_is_trained_on_its_own_levels(tmp_path: Path) -> None:
    cache(tmp_path)
    family = made(NOISE_PREDICTION)

    assert has_learned(train(tmp_path, family, "--timestep_sampling", "uniform", "--validation_split", "0.3"))

    for _, times in family.network.fed:
        torch.testing.assert_close(1000 * times, (1000 * times).round(), atol=1e-3, rtol=0)  # whole timesteps
    spread = torch.cat([tokens.flatten() for tokens, _ in family.network.fed]).std()
    assert 0.5 < spread < 1.5  # noise of up to 15 is scaled back by the family
