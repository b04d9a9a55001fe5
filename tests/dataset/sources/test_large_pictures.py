"""Pictures that are large in memory are decoded one after the other, whatever the size of their files."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dataset.listing import find_sources
from dataset.sources.decoding import ByteBudget, planned_bytes
from tests.dataset.making import make_table


@pytest.mark.parametrize(("size", "maximum"), [(10, 10), (40, 2), (60, 1), (300, 1)])
def test_threads_hold_no_more_than_there_is(size: int, maximum: int) -> None:
    budget, lock, at_once, seen = ByteBudget(100), threading.Lock(), 0, []

    def work(_: int) -> None:
        nonlocal at_once
        with budget.hold(size):
            with lock:
                at_once += 1
                seen.append(at_once)
            time.sleep(0.005)
            with lock:
                at_once -= 1

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(work, range(40)))
    assert len(seen) == 40
    assert max(seen) <= maximum


def test_a_failure_gives_its_bytes_back() -> None:
    budget = ByteBudget(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), budget.hold(5):
            raise ValueError("x")
    with budget.hold(1):
        pass


def test_what_is_planned_is_of_the_picture_and_not_of_its_file(tmp_path: Path) -> None:
    Image.new("1", (8000, 5000)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    for name in ("large", "small"):
        (tmp_path / f"{name}.txt").write_text("x", encoding="utf-8")
    table = make_table(tmp_path, "image_directory", directory=tmp_path, caption_extension=".txt")
    planned = {source.stem: planned_bytes(source) for source in find_sources(table)}
    assert (tmp_path / "large.png").stat().st_size < 50_000
    assert planned["large"] >= 3 * 8000 * 5000
    assert planned["small"] == 0  # many at once are no matter
