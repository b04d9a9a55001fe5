"""Tables that others made, row by row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.sources.columns import column_names, read_columns
from modules.errors import DatasetError

ROWS = [{"path": "a.png", "caption": "one,\ntwo"}, {"path": "b c.png", "caption": 'say "ü"'}]


def rows_of(path: Path, *wanted: str) -> list[tuple[str, int, dict[str, Any], str | None]]:
    found = read_columns(path, wanted or None)
    return [(row.unit, row.number, dict(row.values), row.fault) for row in found]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    csv, tsv, jsonl = (tmp_path / f"t.{end}" for end in ("csv", "tsv", "jsonl"))
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


def test_a_spreadsheet_may_separate_by_semicolons(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path;caption\na.png;one, two\n", encoding="utf-8")
    assert rows_of(tmp_path / "t.csv") == [("line", 2, {"path": "a.png", "caption": "one, two"}, None)]


def test_rows_that_cannot_be_read_are_named_and_the_next_ones_follow(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "t.csv", tmp_path / "t.jsonl"
    csv.write_text('path,caption\na.png\n"b"c,d\nc.png,fine\nd.png,"open', encoding="utf-8")
    jsonl.write_text('{"path": "a.png"\n[1]\n{"path": "c.png"}\n', encoding="utf-8")

    found = rows_of(csv)
    assert [number for _, number, _, _ in found] == [2, 3, 4, 5]
    assert found[0][3] == "it has 1 cells, the header has 2"
    assert found[2][2] == {"path": "c.png", "caption": "fine"}
    assert "not valid CSV" in str(found[1][3])
    assert "not valid CSV" in str(found[3][3])
    assert [bool(fault) for _, _, _, fault in rows_of(jsonl)] == [True, True, False]


def test_a_folder_of_parts_is_one_table_of_which_only_wanted_columns_are_read(tmp_path: Path) -> None:
    for number in range(2):
        row = {"path": f"{number}.png", "caption": "x", "score": 0.5}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"part-{number}.parquet")
    (tmp_path / "_SUCCESS").touch()

    found = list(read_columns(tmp_path, ["path"]))

    assert [dict(row.values) for row in found] == [{"path": "0.png"}, {"path": "1.png"}]
    assert found[1].where == f"{tmp_path / 'part-1.parquet'}, row 1"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"path,path\na,b\n", "'path' is there twice"),
        ("t.csv", "path\ncafé.png\n".encode("latin-1"), "is not UTF-8"),
        ("t.csv", b'path,caption\na,"' + b"x\n" * 70_000, "not closed"),
        ("t.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("t.xlsx", b"PK", "ends in .xlsx"),
        ("gone.csv", None, "cannot be read: No such file"),
        ("gone.parquet", None, "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_no_table_is_an_error_with_a_reason(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=expected):
        list(read_columns(tmp_path / name))
