"""The sizes that a model is told of each picture."""

from pathlib import Path

import pytest
import torch

from dataset.batches.items import TableCacheInfo, TrainingItem
from dataset.batches.reading import _size_conditions
from dataset.config import load_dataset_config

SAID = torch.tensor([320.0, 120.0, 3.0, 5.0, 150.0, 90.0])  # width and height; left, top, right, bottom


@pytest.mark.parametrize(
    ("said", "flip", "expected"),
    [
        (None, False, [100, 300, 32, 0, 128, 192]),  # height first; fitted inside, not what was cut off
        (None, True, [100, 300, 32, 0, 128, 192]),
        (SAID, False, [120, 320, 5, 3, 128, 192]),
        (SAID, True, [120, 320, 5, 192 - 150, 128, 192]),
    ],
)
def test_sizes_of_a_picture(
    said: torch.Tensor | None, flip: bool, expected: list[float], tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    data = tmp_path / "data.toml"
    data.write_text(f'[[datasets]]\nresolution = 64\nimage_directory = "{tmp_path / "pictures"}"\n')
    (table,) = load_dataset_config(data).datasets
    item = TrainingItem("cat_0300x0100_sdxl.safetensors", 3, table, (192, 128), TableCacheInfo("sdxl"))

    assert _size_conditions(item, said, flip).tolist() == expected
