"""Tables that others made, row by row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset.sources.columns import column_names, read_columns

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
