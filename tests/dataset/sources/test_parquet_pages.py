"""Parquet files of a few kB that say gigabytes: refused, or read without them."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.sources import parquet
from dataset.sources.columns import read_columns
from dataset.sources.parquet import Unpacking, _walk, cells_of, read_cell
from modules.errors import DatasetError, MediaError

MIB = 1 << 20
LONG = "x" * MIB


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """What Arrow takes in a test."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    parquet._group.cache_clear()  # what it holds is of this pool
    pa.set_memory_pool(before)


def repeated(value: Any, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **{"compression": "zstd", "store_schema": False, **options})
    assert path.stat().st_size < 200_000
    return path


def lists_of(value: str, count: int, each: int) -> pa.Array:
    offsets = pa.array(np.arange(0, count * each + 1, each, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, repeated(value, count * each))


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (lambda: repeated(LONG, 4000), {}),
        (lambda: repeated("a.png", 1_000_000), {}),
        (lambda: lists_of(LONG, 2, 2000), {}),
        (lambda: lists_of("", 2, 8_000_000), {}),
        (lambda: pa.array([LONG] * 100), {"use_dictionary": False, "data_page_size": 1 << 30}),
        (lambda: pa.array([LONG] * 100), {"column_encoding": "DELTA_BYTE_ARRAY", "use_dictionary": False}),
        (lambda: pa.array([bytes(MIB)] * 100, pa.binary(MIB)), {}),
    ],
    ids=["a long text", "many rows", "lists", "long lists", "zstd", "prefixes", "of a fixed size"],
)
def test_a_small_file_of_much_is_refused_before_it_fills_the_memory(
    tmp_path: Path, pool: pa.MemoryPool, column: Any, options: dict[str, Any]
) -> None:
    path = write(tmp_path / "t.parquet", {"caption": column()}, **options)
    before = pool.max_memory()  # of writing

    with pytest.raises(DatasetError, match=r"unpacks to more than \d+ MiB"):
        list(read_columns(path, ["caption"]))

    assert pool.max_memory() - before < 200 * MIB


def _varint(number: int) -> bytes:
    """A number in four bytes, as the metadata of a file have it."""
    parts = [(2 * number >> 7 * place) & 127 | (128 if place < 3 else 0) for place in range(4)]
    return bytes(parts)


def test_a_usual_table_is_read_whole(tmp_path: Path) -> None:
    rows = [
        {"path": f"{number}.png", "caption": "a picture of a cat " * 20, "captions": ["a", None, "b"]}
        for number in range(3000)
    ]
    for compression in ("zstd", "none"):
        pq.write_table(
            pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=1000, compression=compression
        )
        assert [dict(row.values) for row in read_columns(tmp_path / "t.parquet")] == rows


def test_damaged_pages_are_one_message(tmp_path: Path) -> None:
    rows = [{"path": f"{number}.png", "captions": ["a", "b"], "image": b"abc"} for number in range(50)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    content, numbers = path.read_bytes(), np.random.default_rng(0)
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # behind it pyarrow itself may abort
    for _ in range(100):
        damaged = bytearray(content)
        for place in numbers.integers(4, end, 3):
            damaged[place] = numbers.integers(0, 256)
        path.write_bytes(bytes(damaged))
        for read in (lambda: list(read_columns(path)), lambda: read_cell(cells_of(path, "image")(7))):
            with contextlib.suppress(DatasetError, MediaError):
                read()


def walk(content: io.BytesIO, num_values: int) -> int:
    size = len(content.getvalue())
    chunk = SimpleNamespace(
        num_values=num_values, data_page_offset=0, dictionary_page_offset=None, total_compressed_size=size
    )
    return _walk(content, chunk, Unpacking(Path("t.parquet"), 1 << 20))


def page(of_data: bytes) -> bytes:
    """A page that holds a byte. of_data: the struct of a page of data."""
    return bytes.fromhex("1500 1502 1502 2c") + of_data + b"\0\0" + b"x"


@pytest.mark.parametrize("count", ["1c00", "1501", ""], ids=["a struct", "-1", "missing"])
def test_a_page_of_no_number_of_values_is_damaged(count: str) -> None:
    with pytest.raises(ValueError, match="without a size"):
        walk(io.BytesIO(page(bytes.fromhex(count))), 1)
