"""--item_losses: the loss of each picture, its comparison at equal noise levels, and the page."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dataset.cache_files import LatentName
from dataset.config import load_dataset_config
from modules.errors import OptionError
from tests.pictures import picture
from tests.run_pages import read_run_page
from tests.training import toy
from training.features.item_losses_recording import (
    ItemLossRecorder,
    append_losses,
    make_thumbnails,
    start_losses_file,
    write_images,
)
from training.reports.history import RunHistory
from training.reports.item_losses import (
    ItemDraw,
    ItemImage,
    compare_items,
    make_section,
    read_draws,
    read_images,
    select_shown,
)
from training.steps import Progress

STEPS = ("--max_train_epochs", 4, "--seed", 3)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "x-items.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_losses_are_recorded_by_picture_and_nothing_else_changes(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, batch_size=2)
    plain = toy.train_toy(tmp_path, *STEPS, "--output_dir", tmp_path / "plain", has_page=True)

    recorded = toy.train_toy(tmp_path, *STEPS, "--item_losses", has_page=True)

    assert toy.same(plain, recorded)
    rows = rows_of(tmp_path / "output")
    history = (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {row["step"]: row["loss"] for row in map(json.loads, history) if "loss" in row}
    by_step: dict[int, list[float]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row["loss"])
    means = {step: sum(values) / len(values) for step, values in by_step.items()}
    assert means == pytest.approx(losses, rel=1e-5)
    names = [row["key"] for row in rows]
    assert {names.count(f"clip{index}_0032x0032_toy") for index in range(5)} == {4}  # once an epoch
    assert all(0 <= row["level"] <= 1 for row in rows)


def test_a_run_that_is_killed_and_resumed_has_the_same_lines(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = (*STEPS, "--item_losses", "--save_every_n_steps", 2, "--save_state", "--resume", "latest")
    toy.train_toy(tmp_path, *words)

    toy.train_with_kills(tmp_path, *words, moments=(4, 3))

    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "output")


def test_a_run_anew_begins_a_new_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, *STEPS, "--item_losses")
    before = (tmp_path / "output" / "x-items.jsonl").read_bytes()

    toy.train_toy(tmp_path, "--max_train_steps", 2, "--item_losses")

    assert len(rows_of(tmp_path / "output")) == 2
    (kept,) = tmp_path.glob("output/x.before-*/x-items.jsonl")
    assert kept.read_bytes() == before


def test_an_item_is_compared_with_others_at_its_noise_levels() -> None:
    """b has the lower losses, but only because it was drawn where losses are low: it is the harder one."""
    draws = [ItemDraw(1, 1, "a", 0.95, 10.0), ItemDraw(2, 2, "b", 0.05, 1.5)]
    draws += [ItemDraw(3, 3, "c", 0.95, 10.0), ItemDraw(4, 4, "c", 0.05, 0.5)]

    items = {item.key: item for item in compare_items(draws)}

    assert items["b"].hardness == pytest.approx(1.5)  # the mean at its level is 1
    assert items["a"].hardness == pytest.approx(1.0)
    assert items["c"].hardness == pytest.approx(10.5 / 11)
    assert items["a"].error is None
    assert items["c"].error == pytest.approx(math.sqrt(2 * 2 * (10 / 11 * 0.5) ** 2) / 11 / 1, rel=0.2)
    assert next(iter(items)) == "b"


def test_a_picture_whose_latents_are_odd_is_the_hardest(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    toy.write_caches(tmp_path)
    path = tmp_path / "cache" / "clip1_0032x0032_toy.safetensors"
    save_file({name: 30 * tensor for name, tensor in load_file(path).items()}, path)

    toy.train_toy(tmp_path, "--max_train_epochs", 8, "--seed", 3, "--item_losses", has_page=True)

    items = compare_items(read_draws(tmp_path / "output", "x"))
    assert items[0].key == "clip1_0032x0032_toy"
    assert items[0].hardness > 2
    page = read_run_page(tmp_path / "output")
    assert "Loss of each image" in page
    assert page.index("clip1_0032x0032_toy") < page.index("clip2_0032x0032_toy")


def test_the_page_has_small_pictures_of_the_files(tmp_path: Path) -> None:
    for name in ("images", "cache", "output"):
        (tmp_path / name).mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "images" / "a b ü.png")
    toy.write_caches(tmp_path, count=0)
    (table,) = load_dataset_config(tmp_path / "dataset.toml").datasets
    key = LatentName("a b ü", (32, 32)).file_name("toy").removesuffix(".safetensors")

    images = make_thumbnails(table, "toy", [key, "gone_0032x0032_toy"])
    write_images(tmp_path / "output", "x", images)
    start_losses_file(tmp_path / "output", "x", process=0, session=1, step=0)
    append_losses(tmp_path / "output", "x", 0, [ItemDraw(1, 1, key, 0.5, 1.0)])

    section = make_section(tmp_path / "output", "x", RunHistory())
    assert section is not None
    assert section.rows[0][0].startswith('<img src="data:image/jpeg;base64,')
    assert section.rows[0][1] == "a b ü.png"


def test_files_of_strangers_put_nothing_into_the_page(tmp_path: Path) -> None:
    write_images(tmp_path, "x", {"a": ItemImage("a.png", 'AAAA" onerror="alert(1)')})
    assert read_images(tmp_path, "x") == {}
    lines = [
        '{"session": 1}',
        "[1]",
        '{"step": 1, "batch": 1, "key": "a", "level": 7, "loss": 1}',
        "{",
        "[" * 9999,
    ]
    lines += ['{"step": 1, "batch": 1, "key": "<b>", "level": 0.5, "loss": 1}', '{"step": 2, "batch"']
    (tmp_path / "x-items.jsonl").write_text("\n".join(lines), encoding="utf-8")

    assert [draw.key for draw in read_draws(tmp_path, "x")] == ["<b>"]


def test_few_items_are_shown_once() -> None:
    draws = [ItemDraw(1, index, f"{index:03d}", 0.5, 1.0 + index) for index in range(100)]
    assert len(select_shown(compare_items(draws))) == 25
    assert len(select_shown(compare_items(draws[:22]))) == 22
    assert len(select_shown(compare_items(draws[:3]))) == 3


def test_processes_that_run_passes_for_each_other_are_refused(tmp_path: Path) -> None:
    recorder = ItemLossRecorder(tmp_path, "x", Progress(seed=1, session_id=1, started_at=0.0))
    plan: Any = SimpleNamespace(steps=SimpleNamespace(in_lockstep=True, processes_per_batch=1))

    with pytest.raises(OptionError, match="--item_losses: processes that share the transformer"):
        recorder.join_run(plan, ())
