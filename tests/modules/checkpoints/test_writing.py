"""Files written tensor by tensor are those that the safetensors library writes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo

TENSORS = {
    "b": torch.randn(3, 4).to(torch.bfloat16),
    "a": torch.randn(2, 2),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    "turned": torch.randn(4, 3).T,
    "ümlaut": torch.ones(2, dtype=torch.bool),
}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    stream_tensors(path, INFOS, TENSORS.__getitem__, {"key": "välue"})

    stored = load_file(path)
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(tensor.float(), TENSORS[name].float()) for name, tensor in stored.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "välue"}


def test_data_lie_in_the_order_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    stream_tensors(path, INFOS, TENSORS.__getitem__)

    ours, theirs = path.read_bytes(), save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
    size_bytes = sum(info.size_bytes for info in INFOS.values())
    assert ours[-size_bytes:] == theirs[-size_bytes:]


def test_nothing_is_left_where_a_tensor_is_not_as_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scalar was announced"):
        stream_tensors(tmp_path / "x.safetensors", INFOS, lambda name: TENSORS[name].float())

    assert list(tmp_path.iterdir()) == []
