"""Tables of sources: which columns, where relative paths start, which rows cannot be used."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.cache.records import identify, is_unchanged
from dataset.config import DatasetTable
from dataset.sources.fetching import fetch
from dataset.sources.listing import find_sources
from dataset.sources.media_source import Fault
from modules.errors import DatasetError, MediaError
from tests.dataset.making import make_image, make_table

Rows = list[dict[str, Any]]


def table_of(folder: Path, rows: Rows, name: str = "t.parquet", **changes: Any) -> DatasetTable:
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return make_table(folder, "image_directory", directory=None, table_file=path, **changes)


@pytest.mark.parametrize("column", ["image_path", "path", "file_name", "url", "image"])
def test_the_usual_names_of_columns_are_found_and_others_are_named(tmp_path: Path, column: str) -> None:
    rows = [{"id": "b.png", column: "a.png", "text": "x", "prompt": "y"}]
    (one,) = find_sources(table_of(tmp_path, rows))
    assert (one.path, one.caption) == (Path("a.png"), "x")
    (one,) = find_sources(table_of(tmp_path, rows, path_column="id", caption_column="prompt"))
    assert (one.path, one.caption) == (Path("b.png"), "y")
    with pytest.raises(DatasetError, match=f"path_column = 'no' is not a column. It has 'id', '{column}', "):
        find_sources(table_of(tmp_path, rows, path_column="no"))


def test_a_table_without_paths_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none of the columns image_path, path, .* is there.*'picture'"):
        find_sources(table_of(tmp_path, [{"picture": "a.png", "label": 1}]))


def test_relative_paths_start_in_the_working_folder_or_beside_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = [{"path": "gone.png"}, {"path": "a.png", "mask_path": "m.png", "control_path": "/c.png"}]

    def paths() -> list[Path]:
        sources = find_sources(table_of(tmp_path / "beside", rows, "t.jsonl"), faults=[])
        return [path for source in sources for path, _ in source.parts]

    assert paths() == [Path("a.png"), Path("/c.png"), Path("m.png"), Path("gone.png")]
    make_image(tmp_path / "beside" / "a.png")
    beside = tmp_path / "beside"
    assert paths() == [beside / "a.png", Path("/c.png"), beside / "m.png", beside / "gone.png"]
    make_image(tmp_path / "here" / "a.png")
    assert paths()[0] == Path("a.png")


def test_equal_names_in_two_folders_get_a_hash_and_the_same_row_twice_is_a_fault(tmp_path: Path) -> None:
    rows = [{"path": f"{folder}/a.png"} for folder in ("x", "y")] + [{"path": "x/b.png"}]
    first = {str(one.path): one.stem for one in find_sources(table_of(tmp_path, rows))}
    second = {str(one.path): one.stem for one in find_sources(table_of(tmp_path, rows[::-1]))}
    assert first == second
    assert first["x/b.png"] == "b"
    assert len(set(first.values())) == 3
    with pytest.raises(DatasetError, match="would share a cache file"):
        find_sources(table_of(tmp_path, [*rows, rows[0]]))


def test_files_in_a_column_are_read_row_by_row(tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{index}.png", colour=(index, 0, 0)) for index in range(5)]
    contents = [path.read_bytes() for path in images]
    rows = [{"image": {"bytes": one}, "text": f"c{index}"} for index, one in enumerate(contents)]
    (tmp_path / "parts").mkdir()
    held = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", held), ("text", pa.string())])
    for part, chosen in enumerate((rows[:3], [*rows[3:], {"image": None, "text": "empty"}])):
        path = tmp_path / "parts" / f"train-{part}.v1.parquet"
        pq.write_table(pa.Table.from_pylist(chosen, schema), path, row_group_size=2)
    table = make_table(tmp_path, "image_directory", directory=None, table_file=tmp_path / "parts")

    sources = find_sources(table)

    assert [one.stem for one in sources] == [
        *("train-0_v1_00000001", "train-0_v1_00000002", "train-0_v1_00000003"),
        *("train-1_v1_00000001", "train-1_v1_00000002", "train-1_v1_00000003"),
    ]
    assert [one.caption for one in sources] == ["c0", "c1", "c2", "c3", "c4", "empty"]
    for source, content in zip(sources, contents, strict=False):
        with fetch(source) as here:
            assert here.path.read_bytes() == content
        then = identify(*source.parts[0])
        assert then.sha256 == hashlib.sha256(content).hexdigest()
        assert is_unchanged(then, *source.parts[0])
        assert is_unchanged(dataclasses.replace(then, mtime_ns=1), *source.parts[0])
    empty = r"train-1.v1.parquet, row 1 of row group 2: image.bytes is empty"
    with pytest.raises(MediaError, match=empty), fetch(sources[5]):
        pass

    plain = pa.table({"video": [b"GIF89a"], "id": ["x"]})
    pq.write_table(plain, tmp_path / "t.parquet")
    table = make_table(tmp_path, directory=None, table_file=tmp_path / "t.parquet")
    (one,) = find_sources(table)
    with fetch(one) as here:
        assert (here.path.suffix, here.path.read_bytes()) == (".gif", b"GIF89a")


def test_a_row_that_cannot_be_used_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    rows = [{"path": "a.png", "captions": list(map(str, range(101)))}, {"path": "b.png"}, {"path": "x/b.png"}]
    faults: list[Fault] = []
    sources = find_sources(table_of(tmp_path, rows, "t.jsonl", multi_caption=True), faults=faults)
    assert [source.stem.split("-")[0] for source in sources] == ["b", "b"]
    assert "101 captions, at most 100" in faults[0].text
