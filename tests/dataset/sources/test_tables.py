"""Tables of sources: which columns, where relative paths start, which rows cannot be used."""

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.cache.records import identify, is_unchanged
from dataset.config import DatasetTable
from dataset.forms import parquet_files as parquet
from dataset.forms.jsonl_rows import read_jsonl
from dataset.forms.parquet_files import CellFinder, read_cell
from dataset.forms.row_formats import column_names, read_columns
from dataset.forms.unread import find_unused
from dataset.listing import find_sources
from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault
from modules.errors import DatasetError, MediaError
from protocols.rules import ReferenceRules
from tests.dataset.making import make_image, make_table


@pytest.fixture(autouse=True)
def _memory_of_arrow() -> Iterator[None]:
    yield
    pa.default_memory_pool().release_unused()  # it keeps 600 MB of the tables that are large once unpacked


Rows = list[dict[str, Any]]


def table_of(folder: Path, rows: Rows, name: str = "t.parquet", **changes: Any) -> DatasetTable:
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return make_table(folder, "image_directory", directory=None, table_file=path, **changes)


@pytest.mark.parametrize("column", ["image_path", "file_name", "url", "image"])
def test_the_usual_names_of_columns_are_found_and_others_are_named(tmp_path: Path, column: str) -> None:
    rows = [{"id": "b.png", column: "a.png", "text": "x", "prompt": "y"}]
    (one,) = find_sources(table_of(tmp_path, rows))
    assert (one.path, one.caption) == (Path("a.png"), "x")
    (one,) = find_sources(table_of(tmp_path, rows, path_column="id", caption_column="prompt"))
    assert (one.path, one.caption) == (Path("b.png"), "y")
    with pytest.raises(DatasetError, match=f"path_column = 'no' is not a column. It has 'id', '{column}', "):
        find_sources(table_of(tmp_path, rows, path_column="no"))
    with pytest.raises(DatasetError, match=r"none of the columns image_path, path, .* exists.*'picture'"):
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
        return [path for source in sources for path, _ in source.latent_inputs]

    assert paths() == [Path("a.png"), Path("/c.png"), Path("m.png"), Path("gone.png")]
    make_image(tmp_path / "beside" / "a.png")
    beside = tmp_path / "beside"
    assert paths() == [beside / "a.png", Path("/c.png"), beside / "m.png", beside / "gone.png"]
    make_image(tmp_path / "here" / "a.png")
    assert paths()[0] == Path("a.png")


def test_lists_of_the_known_tuner_may_lie_with_their_media(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = [{"image_path": "a.png", "caption": "a cat", "control_path": "sub/c.png"}]
    path = beside / "list.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    table = make_table(tmp_path, "image_directory", directory=None, jsonl_file=path)

    def paths() -> list[Path]:
        return [path for path, _ in find_sources(table)[0].latent_inputs]

    assert paths() == [Path("a.png"), Path("sub/c.png")]
    make_image(beside / "a.png")
    assert paths() == [beside / "a.png", beside / "sub/c.png"]
    assert not caplog.text
    make_image(tmp_path / "here" / "a.png")
    assert paths() == [Path("a.png"), Path("sub/c.png")]
    assert "a.png is both in the working folder and in" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.png", "text": "x"}, "file_name is read from tables: name the file in image_table_"),
        (
            {"image_path_0": "a.png", "image_path_1": "b.png"},
            "its layers: set multiple_target",
        ),
        ({"caption": "x"}, "Each line is one object such as"),
        (
            {"image_path": "a.png", "caption": ["x", "y"]},
            "in a list named captions, with multi_caption = true",
        ),
    ],
)
def test_a_line_without_a_path_says_what_it_is(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DatasetError, match=message):
        find_sources(make_table(tmp_path, "image_directory", directory=None, jsonl_file=path))


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
        then = identify(*source.latent_inputs[0])
        assert then.sha256 == hashlib.sha256(content).hexdigest()
        assert is_unchanged(then, *source.latent_inputs[0])
        assert is_unchanged(dataclasses.replace(then, mtime_ns=1), *source.latent_inputs[0])
    empty = r"train-1.v1.parquet, row 1 of row group 2: its image.bytes is empty"
    with pytest.raises(MediaError, match=empty), fetch(sources[5]):
        pass

    edits = {"image": {"bytes": contents[0]}, "be/fore": {"bytes": contents[1]}, "mask_path": contents[2]}
    other = {**edits, "image": {"bytes": contents[3]}, "mask_path": None}
    one, two = find_sources(table_of(tmp_path, [edits, other], control_column="be/fore"))
    assert (len(two.control), two.mask) == (1, None)
    named = {**edits, "mask_path": {"bytes": None, "path": "m.png"}}  # it names a file that is not there
    first = {**edits, "mask_path": {"bytes": contents[2], "path": None}}
    _, two = find_sources(table_of(tmp_path, [first, {**named, "image": other["image"]}]))
    with pytest.raises(MediaError, match="its mask_path.bytes is empty"), fetch(two):
        pass
    one, two = find_sources(table_of(tmp_path, [edits, other], control_column="be/fore"))
    with fetch(one) as here:
        assert [path.read_bytes() for path, _ in here.latent_inputs] == contents[:3]
        assert (len(here.control), here.mask is None) == (1, False)

    plain = pa.table({"video": [b"GIF89a"], "id": ["x"]})
    pq.write_table(plain, tmp_path / "t.parquet")
    table = make_table(tmp_path, directory=None, table_file=tmp_path / "t.parquet")
    (one,) = find_sources(table)
    with fetch(one) as here:
        assert (here.path.suffix, here.path.read_bytes()) == (".gif", b"GIF89a")


def test_a_row_that_cannot_be_used_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    rows = [{"path": "a.png", "captions": list(map(str, range(101)))}, {"path": "b.png"}, {"path": "x/b.png"}]
    errors: list[Fault] = []
    sources = find_sources(table_of(tmp_path, rows, "t.jsonl", multi_caption=True), faults=errors)
    assert [source.stem.split("-")[0] for source in sources] == ["b", "b"]
    assert "101 captions, at most 100" in errors[0].text


ROWS = [{"path": "a.png", "caption": "one,\ntwo"}, {"path": "b c.png", "caption": 'say "ü"'}]
MIB = 1 << 20
LONG = "x" * MIB


def rows_of(path: Path, *wanted: str) -> list[tuple[str, int, dict[str, Any], str | None]]:
    found = read_columns(path, wanted or None)
    return [(row.unit, row.number, dict(row.values), row.fault) for row in found]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    csv, tsv, jsonl = (tmp_path / f"t.{end}" for end in ("csv", "tsv", "jsonl"))
    of_spreadsheet = tmp_path / "s.csv"
    of_spreadsheet.write_text('path;caption\na.png;"one,\ntwo"\nb c.png;"say ""ü"""\n', encoding="utf-8")
    assert [values for _, _, values, _ in rows_of(of_spreadsheet)] == ROWS
    csv.write_bytes('\ufeffpath,caption\r\na.png,"one,\r\ntwo"\r\nb c.png,"say ""ü"""\r\n'.encode())
    tsv.write_text('path\tcaption\na.png\t"one,\ntwo"\n\nb c.png\t"say ""ü"""', encoding="utf-8")
    jsonl.write_text(
        '{"caption": "one,\\ntwo", "path": "a.png", "more": 1}\n\n'
        '{"path": "b c.png", "caption": "say \\"ü\\"", "more": null}\n',
        encoding="utf-8",
    )
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")

    numbers = {}
    for path in (csv, tsv, jsonl, tmp_path / "t.parquet"):
        found = rows_of(path, "path", "caption", "absent")
        assert [values for _, _, values, _ in found] == ROWS
        numbers[path.suffix] = [f"{unit} {number}" for unit, number, _, _ in found]

    assert numbers == {
        ".csv": ["line 2", "line 4"],
        ".tsv": ["line 2", "line 5"],
        ".jsonl": ["line 1", "line 3"],
        ".parquet": ["row 1", "row 2"],
    }
    assert column_names(csv) == column_names(tsv) == column_names(tmp_path / "t.parquet")
    assert column_names(jsonl) == ("caption", "path", "more")


# --- Parquet


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """What Arrow takes in a test."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    parquet._read_column.cache_clear()  # what it holds is of this pool
    pa.set_memory_pool(before)


def repeated(value: Any, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **{"compression": "zstd", "store_schema": False, **options})
    assert path.stat().st_size < 200_000
    return path


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (lambda: repeated(LONG, 4000), {}),
        (lambda: repeated("a.png", 1_000_000), {}),
        (lambda: pa.ListArray.from_arrays(np.array([0, 2000], np.int32), repeated(LONG, 2000)), {}),
        (lambda: pa.array([LONG] * 100), {"use_dictionary": False, "data_page_size": 1 << 30}),
        (lambda: pa.array([LONG] * 100), {"column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False}),
        (lambda: pa.array([bytes(MIB)] * 100, pa.binary(MIB)), {}),
    ],
    ids=["a long text", "many rows", "lists", "zstd", "prefixes", "of a fixed size"],
)
def test_a_small_file_of_much_is_refused_before_it_fills_the_memory(
    tmp_path: Path, pool: pa.MemoryPool, column: Any, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "t.parquet", {"caption": column()}, **options)
    before = pool.max_memory()  # of writing

    with pytest.raises(DatasetError, match=r"unpacks to more than \d+ MiB"):
        list(read_columns(path, ["caption"]))

    assert pool.max_memory() - before < 200 * MIB


def understate(path: Path) -> None:
    """Let a file's metadata say that its columns unpack to 1000 bytes."""
    group = pq.read_metadata(path).row_group(0)
    content = bytearray(path.read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for size in {group.total_byte_size, group.column(0).total_uncompressed_size}:
        declared, new = varint(2 * size), varint(2 * 1000)  # twice: the lowest bit is the sign
        new = bytes(byte | 128 for byte in new).ljust(len(declared) - 1, b"\x80") + b"\0"  # as long
        assert declared in content[end:]
        content[end:] = content[end:].replace(declared, new)
    path.write_bytes(content)
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 1000


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def test_pages_decide_where_the_metadata_lie(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    options = {"use_dictionary": False, "data_page_size": 1 << 30, "write_statistics": False}
    path = write(tmp_path / "t.parquet", {"image": pa.array([bytes(200 * MIB)])}, **options)
    understate(path)
    pool: pa.MemoryPool = request.getfixturevalue("pool")  # after writing

    for read in (lambda: list(read_columns(path)), lambda: read_cell(CellFinder(path, "image").find(1))):
        with pytest.raises((DatasetError, MediaError), match=r"unpacks to more than \d+ MiB"):
            read()
        assert pool.max_memory() < 10 * MIB


def test_a_usual_table_is_read_whole(tmp_path: Path) -> None:
    rows = [{"path": f"{number}.png", "caption": "a picture of a cat " * 20} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", compression="zstd")
    assert [dict(row.values) for row in read_columns(tmp_path / "t.parquet")] == rows


def test_damaged_pages_are_one_message(tmp_path: Path) -> None:
    rows = [{"path": f"{number}.png", "captions": ["a", None], "image": b"abc"} for number in range(50)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    assert [dict(row.values) for row in read_columns(path)] == rows
    content, numbers = path.read_bytes(), np.random.default_rng(0)
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # behind it pyarrow itself may abort
    for _ in range(100):
        damaged = bytearray(content)
        for place in numbers.integers(4, end, 3):
            damaged[place] = numbers.integers(0, 256)
        path.write_bytes(bytes(damaged))
        for read in (lambda: list(read_columns(path)), lambda: read_cell(CellFinder(path, "image").find(7))):
            with contextlib.suppress(DatasetError, MediaError):
                read()


# --- columns that nothing reads, and files in several rows


def list_of(folder: Path, rows: Rows, form: str, **changes: Any) -> DatasetTable:
    """A table in one of the forms that name pictures in rows."""
    if form == "list":
        (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return make_table(folder, "image_jsonl_file", **changes)
    if form != "csv":
        return table_of(folder, rows, f"t.{form}", **changes)
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    return make_table(folder, "image_directory", directory=None, table_file=folder / "t.csv", **changes)


@pytest.mark.parametrize("form", ["list", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (
            "edit_image",
            "refs/a.png",
            "are read from control_path. Rename it, or set control_column = 'edit_image'",
        ),
        ("control_image", "https://x.org/a.png", "are read from control_path"),
        ("contol_path", "nothing", "did you mean 'control_path'?"),
        ("contol_path_1", "refs/a.png", "reference images and control media are read from control_path"),
        ("mask", "refs/a.png", "masks are read from mask_path"),
        ("audio", "a.wav", "the audio of clips is read from audio_path"),
        ("Caption", "a cat", "did you mean 'caption'?"),
        ("prompt", "a dog", "'prompt': captions are read from another column."),
        ("thumb", "refs/a.png", "'thumb', such as 'refs/a.png'."),
        ("edit_image", '["refs/a.png"]', "'edit_image', such as 'refs/a.png'"),
        ("thumb", "['refs/a.png']", "'thumb', such as 'refs/a.png'."),
        ("tags", "['a cat']", None),
        ("thumb", "refs/gone.png", None),
        ("copy", "a.png", None),  # what is read from image_path
        ("caption_en", "a cat", None),
        ("source", "a book", None),
        ("score", 0.5, None),
        ("min_timestep", 500, "'min_timestep': it is a key of the [[datasets]] table, for all its items."),
        ("control_path_1", "refs/a.png", None),
    ],
)
def test_columns_that_look_meant_are_told(
    tmp_path: Path, form: str, column: str, value: Any, said: str | None
) -> None:
    (tmp_path / "refs").mkdir()
    make_image(tmp_path / "refs" / "a.png")
    make_image(tmp_path / "a.png")
    rows = [{"image_path": "a.png", "caption": "a cat", column: value}]

    found = [error.text for error in find_unused(list_of(tmp_path, rows, form))]

    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_columns_of_whole_files_and_lists_of_paths_are_told(tmp_path: Path) -> None:
    content = make_image(tmp_path / "a.png").read_bytes()
    row = {"image": {"bytes": content, "path": "a.png"}, "edit": {"bytes": content, "path": "b.png"}}
    (error,) = find_unused(table_of(tmp_path, [{**row, "text": "x", "extra": {"a": 1}}]))
    assert error.text.startswith("'edit', which contains files: reference images and control media are read")
    assert error.kind.startswith("column of ")
    assert error.kind.endswith(" is not read")  # behind "1"

    both = table_of(tmp_path, [{**row, "control_path_1": {"bytes": b"GIF8"}}], control_column="edit")
    (error,) = find_unused(both)
    assert error.text == "'control_path_1': the model uses 1 of these files for each item."

    cell = {"bytes": content, "path": "c.png"}
    apart = [
        {"image": row["image"], "text": "x", "control_path_0": cell, "control_path_1": None},
        {"image": row["image"], "text": "y", "control_path_0": None, "control_path_1": cell},
    ]
    assert find_unused(table_of(tmp_path, apart)) == []  # each row has one

    rows = [{"image_path": "a.png", "control_images": ["b.png", "c.png"]}]
    (error,) = find_unused(list_of(tmp_path, rows, "list"))
    assert "'control_images', such as 'b.png'" in error.text

    (error,) = find_unused(list_of(tmp_path, [{"image_path": "a.png", "prompt": "x"}], "list"))
    assert error.text == "'prompt': did you mean 'caption'?"

    audios = list_of(tmp_path, [{"audio_path": "a.wav", "caption": "x", "video_path": "q"}], "list")
    assert find_unused(audios.with_values(kind="video", is_audio_only=True)) == []


@pytest.mark.parametrize("form", ["list", "jsonl", "csv", "parquet"])
def test_more_control_columns_than_a_model_takes_are_told(tmp_path: Path, form: str) -> None:
    rows = [{"image_path": "a.png", "caption": "x", "control_path_0": "/c.png", "control_path_1": "/d.png"}]
    (error,) = find_unused(list_of(tmp_path, rows, form))
    assert error.text == "'control_path_1': the model uses 1 of these files for each item."
    assert find_unused(list_of(tmp_path, rows, form, rules=ReferenceRules(max_references=2))) == []


def test_a_key_that_is_there_twice_in_a_line_is_a_fault(tmp_path: Path) -> None:
    table = list_of(tmp_path, [{"image_path": "a.png", "caption": "x"}], "list")
    assert table.source.jsonl_file is not None
    line = table.source.jsonl_file.read_text(encoding="utf-8").replace("}", ', "caption": "y"}')
    table.source.jsonl_file.write_text(line, encoding="utf-8")
    errors: list[Fault] = []
    assert find_sources(table, faults=errors) == []
    assert "key 'caption' occurs twice" in errors[0].text


@pytest.mark.parametrize("form", ["list", "jsonl", "csv", "parquet"])
def test_a_key_names_the_column_of_control_media(tmp_path: Path, form: str) -> None:
    rows = [{"image_path": "a.png", "caption": "x", "edit": "/c.png", "control_path_1": "/d.png"}]
    changes = {"control_column": "edit", "rules": ReferenceRules(max_references=2)}

    (one,) = find_sources(list_of(tmp_path, rows, form, **changes))

    assert one.control == (Path("/c.png"), Path("/d.png"))
    assert find_unused(list_of(tmp_path, rows, form, **changes)) == []
    if form != "csv":
        rows = [{"image_path": "a.png", "caption": "x", "edit": ["/c.png", "/d.png"]}]
        (one,) = find_sources(list_of(tmp_path, rows, form, **changes))
        assert one.control == (Path("/c.png"), Path("/d.png"))
        (error,) = find_unused(list_of(tmp_path, rows, form, control_column="edit"))
        assert error.text == "'edit': the model uses 1 of these files for each item."
    if form != "list":
        with pytest.raises(DatasetError, match="control_column = 'no' is not a column"):
            find_sources(list_of(tmp_path, rows, form, control_column="no"))


@pytest.mark.parametrize("form", ["list", "jsonl", "csv", "parquet"])
def test_a_file_in_several_rows_has_a_cache_for_each(tmp_path: Path, form: str) -> None:
    def row(name: str, control: str, caption: str) -> dict[str, Any]:
        return {"image_path": name, "control_path": control, "caption": caption}

    rows = [row("/t.png", "/0.png", "x"), row("/t.png", "/1.png", "x"), row("/t-2.png", "/2.png", "x")]
    rows += [row("/t.png", "/1.png", "y"), row("/one.png", "/0.png", "z")]

    found = find_sources(list_of(tmp_path, rows, form, rules=ReferenceRules(max_references=2)))

    assert {one.stem: (str(one.control[0]), one.caption) for one in found} == {
        "t": ("/0.png", "x"),
        "t-3": ("/1.png", "x"),
        "t-2": ("/2.png", "x"),
        "t-4": ("/1.png", "y"),
        "one": ("/0.png", "z"),
    }
    with pytest.raises(DatasetError, match="repeat another one and would share a cache file"):
        find_sources(list_of(tmp_path, [*rows, rows[3]], form, rules=ReferenceRules(max_references=2)))


LINE = '{"image_path": "a.png", "caption": "a"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"[{LINE}]", r"is one JSON array; a list has one object on each line.*Convert it: python -c"),
        (f"\n[\n{LINE},\n{LINE}\n]\n", "is one JSON array"),
        ('{\n "image_path": "a.png"\n}\n', "has an object over several lines"),
        ("image_path,caption\na.png,a\n", "looks like a table with a header .*Name it .csv"),
    ],
)
def test_a_list_of_another_form_is_told_once(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(DatasetError, match=rf"(?s)^\S*list.jsonl {message}"):
        list(read_jsonl(path, None))


def test_the_command_in_the_message_makes_lines_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "list.json"
    path.parent.mkdir()
    path.write_text(f"[{LINE}, {LINE}]", encoding="utf-8")
    with pytest.raises(DatasetError) as error:
        list(read_jsonl(path, None))
    command = str(error.value).partition("Convert it: python ")[2]

    subprocess.run(f'"{sys.executable}" {command}', shell=True, check=True, cwd=tmp_path)

    lines = path.with_name("list_lines.jsonl")
    assert [row.values["caption"] for row in read_jsonl(lines, None)] == ["a", "a"]


@pytest.mark.parametrize("empty", ["", "   "])
def test_empty_lines_of_lists_and_tables_are_skipped(tmp_path: Path, empty: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join([empty, LINE, empty, LINE, empty]), encoding="utf-8")

    assert [(row.number, row.fault) for row in read_jsonl(path, None, LINE)] == [(2, None), (4, None)]


@pytest.mark.parametrize(
    "head",
    [
        "a,b",
        "\n\na,b",
        "sep=,\na,b",
        "sep=;\na;b",
        "a;b",
        "\r\na,b",
        "a\tb",
        "sep=|\na|b",
        "sep=\t\na\tb",
        "  \na,b",
    ],
)
def test_the_columns_of_a_table_are_found_behind_what_spreadsheets_write(tmp_path: Path, head: str) -> None:
    mark = head[-2]
    path = tmp_path / "list.csv"
    path.write_text(f"{head}\n1{mark}2\n\n3{mark}4\n", encoding="utf-8", newline="")

    assert column_names(path) == ("a", "b")
    assert [row.values for row in read_columns(path)] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
