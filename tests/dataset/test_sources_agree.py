"""A folder, a list, tables, tars and addresses with the same content give the same caches."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_tools.report.check import check_caching
from dataset.batches.finding import find_items, require_items
from dataset.batches.reading import read_batch
from dataset.cache.records import latent_record, text_records
from dataset.cache_files import read_entry
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig, load_dataset_config
from protocols.data import LOSS_MASK
from tests.dataset.making import make_clip, make_image
from tests.dataset.serving import Site, site
from tests.dataset.toy_family import LATENT, ToyFamily, options

__all__ = ["site"]
NAMES = ("a b", "ü", "third")


def make_media(folder: Path, kind: str) -> list[dict[str, str]]:
    """Write three images or clips with captions; returns the rows of a table of them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for index, name in enumerate(NAMES):
        path = folder / f"{name}.{'png' if kind == 'image' else 'mp4'}"
        if kind == "image":
            make_image(path, (40 + index, 36), (40 * index, 80, 120))
        else:
            make_clip(path, 5 + 4 * index)
        (folder / f"{name}.txt").write_text(f"caption of {name}\n", encoding="utf-8")
        rows.append({"file_name": path.name, "text": f"caption of {name}"})
    return rows


def config_of(folder: Path, name: str, keys: dict[str, Any]) -> DatasetConfig:
    """A configuration of one table whose caches are in `folder / name`."""
    lines = ["[general]", "resolution = 32", "enable_bucket = true", "bucket_no_upscale = true"]
    lines += ["[[datasets]]", f"cache_directory = {json.dumps(str(folder / name))}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_dataset_config(path)


def write_forms(folder: Path, media: Path, rows: list[dict[str, str]], kind: str, url: str) -> dict[str, Any]:
    """Write the content of a folder in all forms: name -> keys of the table."""
    with (media / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["text", "file_name"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "t.jsonl").write_text(
        "\n".join(json.dumps({"where": str(media / row["file_name"]), "text": row["text"]}) for row in rows),
        encoding="utf-8",
    )
    addresses = [{"url": f"{url}/{row['file_name']}", "caption": row["text"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(addresses), folder / "urls.parquet")
    pq.write_table(pa.Table.from_pylist(rows), media / "t.parquet")
    held = [{kind: {"bytes": (media / row["file_name"]).read_bytes()}, "text": row["text"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(held), folder / "held.parquet", row_group_size=2)
    with tarfile.open(folder / "t-000.tar", "w") as tar:
        for row in rows[:2]:
            tar.add(media / row["file_name"], row["file_name"])
            tar.add(media / f"{Path(row['file_name']).stem}.txt", f"{Path(row['file_name']).stem}.txt")
    with tarfile.open(folder / "t-001.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        told = json.dumps({"caption": rows[2]["text"]}).encode()
        info = tarfile.TarInfo(f"{Path(rows[2]['file_name']).stem}.json")
        info.size = len(told)
        tar.addfile(info, io.BytesIO(told))
        tar.add(media / rows[2]["file_name"], rows[2]["file_name"])
    listed = [{f"{kind}_path": one["url"], "caption": one["caption"]} for one in addresses]
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, listed)), encoding="utf-8")
    return {
        "folder": {f"{kind}_directory": str(media), "caption_extension": ".txt"},
        "csv": {f"{kind}_table_file": str(media / "metadata.csv")},
        "jsonl": {f"{kind}_table_file": str(folder / "t.jsonl"), "path_column": "where"},
        "parquet": {f"{kind}_table_file": str(media / "t.parquet")},
        "tars": {f"{kind}_tars": str(folder / "t-{000..001}.tar")},
        "held": {f"{kind}_table_file": str(folder / "held.parquet")},
        "urls": {f"{kind}_table_file": str(folder / "urls.parquet"), "allow_urls": True},
        "list": {f"{kind}_jsonl_file": str(folder / "l.jsonl"), "allow_urls": True},
    }


def caches_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of all caches but what their records say of files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        entry = read_entry(path)
        is_text = "_te." in path.name
        media = None if is_text else latent_record(entry)
        texts = text_records(entry) if is_text else {}
        told = (
            None if media is None else (media.options, media.clip, media.parts, media.crc32),
            [(one.caption, one.crc32) for one in texts.values()],
            [] if media is None else [one.sha256 for one in media.files],
        )
        tensors = {name: tensor.numpy(force=True).tobytes() for name, tensor in _viewed(entry.named).items()}
        name = path.name
        for row, stem in enumerate(NAMES, 1):  # files in a column have no names
            name = name.replace(f"held_{row:08d}", stem)
        found[name] = {"tensors": tensors, "told": told}
    return found


def _viewed(named: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in named.items()}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_all_forms_give_equal_caches_which_train_and_a_rerun_reads_nothing(
    tmp_path: Path, site: Site, kind: str
) -> None:
    rows = make_media(site.folder, kind)
    forms = write_forms(tmp_path, site.folder, rows, kind, site.url)
    expected: dict[str, Any] = {}
    for name, keys in forms.items():
        if kind == "video":
            keys["target_frames"] = [1, 5]
        config = config_of(tmp_path, name, keys)
        family = ToyFamily()
        assert not cache_media(family, config, options(num_workers=2)).failures
        cache_texts(family, config, options())
        found = caches_of(tmp_path / name)
        assert len(found) == (6 if kind == "image" else 9)
        expected = expected or found
        assert found == expected, name

        again = ToyFamily()
        asked = len(site.asked)
        report = cache_media(again, config, options(num_workers=2))
        assert (again.loaded, report.written, report.removed) == (0, 0, 0), name
        assert cache_texts(again, config, options()).written == 0
        assert len(site.asked) == asked
        items = require_items(find_items(config, "toy", LATENT))
        assert len(items) == len(found) - 3
        for item in items:
            assert read_batch([item], LATENT).captions[0].startswith("caption of")
    # two tables of addresses, each with a download folder of its own
    assert sorted(site.asked) == sorted([row["file_name"] for row in rows] * 2)


def test_a_rerun_needs_no_download_and_a_changed_caption_makes_its_text_only(
    tmp_path: Path, site: Site
) -> None:
    rows = make_media(site.folder, "image")
    keys = write_forms(tmp_path, site.folder, rows, "image", site.url)["urls"]
    kept = tmp_path / "urls" / "kept"
    config = config_of(tmp_path, "urls", keys | {"download_directory": str(kept)})
    cache_media(ToyFamily(), config, options())
    cache_texts(ToyFamily(), config, options())
    for path in kept.iterdir():
        path.unlink()
    changed = [{"url": f"{site.url}/{row['file_name']}", "caption": row["text"]} for row in rows]
    changed[1]["caption"] = "new"
    pq.write_table(pa.Table.from_pylist(changed), tmp_path / "urls.parquet")
    asked, family = len(site.asked), ToyFamily()

    assert cache_media(family, config, options()).reused == 3
    assert check_caching(family, config, 1, False).exit_code == 0
    assert cache_texts(family, config, options()).written == 1

    assert len(site.asked) == asked
    assert family.text[0].calls == ["new"]


def test_masks_and_control_images_come_from_columns_and_from_tars(tmp_path: Path, site: Site) -> None:
    for name, gray in (("a", 9), ("m", 255), ("c", 5)):
        make_image(site.folder / f"{name}.png", colour=(gray, gray, gray))
    (site.folder / "a.txt").write_text("x", encoding="utf-8")
    row = {"path": f"{site.url}/a.png", "caption": "x"}
    row |= {"mask_path": f"{site.url}/m.png", "control_path": str(site.folder / "c.png")}
    (tmp_path / "t.jsonl").write_text(json.dumps(row), encoding="utf-8")
    members = {"a.png": "a.png", "a.mask.png": "m.png", "a.control.png": "c.png", "a.txt": "a.txt"}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, file in members.items():
            tar.add(site.folder / file, name)
    found = []
    for name, keys in (
        ("table", {"image_table_file": str(tmp_path / "t.jsonl"), "allow_urls": True}),
        ("tar", {"image_tars": str(tmp_path / "t.tar")}),
    ):
        config = config_of(tmp_path, name, keys)
        assert cache_media(ToyFamily(), config, options()).written == 1
        assert cache_media(ToyFamily(), config, options()).reused == 1
        cache_texts(ToyFamily(), config, options())
        (item,) = require_items(find_items(config, "toy", LATENT))
        assert {"latents", "latents_control", LOSS_MASK} <= read_batch([item], LATENT).tensors.keys()
        found.append(caches_of(tmp_path / name))

    assert found[0] == found[1]
