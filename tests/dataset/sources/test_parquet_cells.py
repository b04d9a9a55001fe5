from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from dataset.sources.parquet_cells import cells_of, read_cell

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

THREADS = 4


def test_threads_that_want_one_row_group_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clips.parquet"
    files = [bytes([number]) * 1_000 for number in range(THREADS)]
    parquet.write_table(pa.table({"video": files}), path)
    place, together = cells_of(path, "video"), Barrier(THREADS)
    reads, read_group = [], parquet.ParquetFile.read_row_group

    def counted(self: Any, group: int, **settings: Any) -> Any:
        reads.append(group)
        return read_group(self, group, **settings)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)

    def read(number: int) -> bytes:
        together.wait()
        return read_cell(place(number))

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(read, range(1, THREADS + 1))) == files
    assert reads == [0]
