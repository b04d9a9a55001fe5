"""Names that no file can have, wherever they stand: one error of ours that shows them, no traceback."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset.config import load_dataset_config
from dataset.sources.captions import read_caption
from dataset.sources.listing import find_all_sources
from modules.errors import UserError

NAMES = {
    "user": "~nosuchuser/clip.mp4",
    "long": "n" * 300 + ".mp4",
    "long folder": f"{'n' * 300}/clip.mp4",
    "long in bytes": "猫" * 90 + ".mp4",
    "long path": "/".join(["folder"] * 900),
}


def _config(folder: Path, source: str, **more: str) -> None:
    keys = {"cache_directory": str(folder / "cache"), **more}
    table = {"resolution": [64, 64], "target_frames": [1], **keys}
    content = {"datasets": [{**table, **json.loads(source)}]}
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")


def in_key(folder: Path, name: str) -> None:
    _config(folder, json.dumps({"video_directory": name}))


def in_cache_key(folder: Path, name: str) -> None:
    _config(folder, json.dumps({"video_directory": "x"}), cache_directory=name)


def in_list(folder: Path, name: str) -> None:
    rows = [{"video_path": name, "caption": "x"}, {"video_path": "a.mp4", "control_path": name}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    _config(folder, json.dumps({"video_jsonl_file": str(folder / "list.jsonl")}))


def in_csv(folder: Path, name: str) -> None:
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["video_path", "caption"], [name, "x"], ["a.mp4", "y"]])
    _config(folder, json.dumps({"video_table_file": str(folder / "table.csv")}))


def in_parquet(folder: Path, name: str) -> None:
    table = pyarrow.table({"path": [name, "a.mp4"], "mask_path": [None, name]})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    _config(folder, json.dumps({"video_table_file": str(folder / "table.parquet")}))


def in_tars(folder: Path, name: str) -> None:
    _config(folder, json.dumps({"video_tars": [name, f"{name}-*.tar"]}))


def in_cogvideox(folder: Path, name: str) -> None:
    (folder / "videos.txt").write_text(f"{name}\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("x\n", encoding="utf-8")
    _config(folder, json.dumps({"cogvideox_root": str(folder)}))


def in_cogvideox_table(folder: Path, name: str) -> None:
    _config(folder, json.dumps({"cogvideox_root": str(folder), "dataset_file": name}))


def in_metadata(folder: Path, name: str) -> None:
    (folder / "meta.json").write_text(json.dumps({name: {"caption": "x"}}), encoding="utf-8")
    subset = {"image_dir": str(folder), "metadata_file": str(folder / "meta.json")}
    content = {"datasets": [{"resolution": 64, "subsets": [subset]}]}
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")


READERS = (
    *(in_key, in_cache_key, in_list, in_csv, in_parquet),
    *(in_tars, in_cogvideox, in_cogvideox_table, in_metadata),
)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("write", READERS, ids=lambda write: write.__name__)
def test_a_name_that_no_file_can_have_is_one_error(
    write: Callable[[Path, str], None], name: str, tmp_path: Path
) -> None:
    write(tmp_path, name)

    with pytest.raises(UserError) as caught:
        find_all_sources(load_dataset_config(tmp_path / "data.json"))

    assert name[:20] in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 10_000  # the console shortens lines


def test_a_caption_whose_name_would_be_too_long_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file has so long a name"):
        read_caption(tmp_path / f"{'n' * 252}.txt")
