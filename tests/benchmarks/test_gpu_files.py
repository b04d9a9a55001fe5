"""The files that the GPU benchmark loads: empty ones of full size, and one with real bytes."""

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu_files import fill, folder_for, lay_out, memory_folder
from benchmarks.gpu_rows import BY_NAME, ROWS
from modules.checkpoints.opening import open_checkpoint
from tests.manifests import manifest_names, write_hollow


def test_every_row_names_a_list_of_tensors_that_is_there() -> None:
    manifests = {row.model.manifest for row in ROWS} | {row.model.high for row in ROWS}
    assert manifests - {""} <= set(manifest_names(""))


def test_the_file_of_a_loading_row_has_real_numbers_behind_its_header(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "a.safetensors", {"a": ("BF16", (300, 70_000)), "b": ("BF16", (5,))})

    fill(path)

    with open_checkpoint(path) as checkpoint:
        for name, shape in (("a", (300, 70_000)), ("b", (5,))):
            numbers = checkpoint.read(name)
            assert numbers.shape == shape
            assert numbers.isfinite().all()
            assert numbers.count_nonzero() == numbers.numel()
    if hasattr(path.stat(), "st_blocks"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_files_are_written_once_and_transformers_are_in_bf16(tmp_path: Path) -> None:
    path, none = lay_out(BY_NAME["wan14b-bf16"], tmp_path)
    written = path.stat().st_mtime_ns
    low, high = lay_out(BY_NAME["gen-wan22-14b"], tmp_path)

    assert none is None
    assert lay_out(BY_NAME["wan14b-fp8-weights"], tmp_path)[0] == path
    assert path.stat().st_mtime_ns == written
    assert high is not None
    assert low != high
    with open_checkpoint(path) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}


def test_files_without_content_are_in_memory_where_there_is_some_and_real_ones_on_the_disk(
    tmp_path: Path,
) -> None:
    disk = Path(tempfile.gettempdir())
    with folder_for(BY_NAME["gen-flux"], None) as hollow, folder_for(BY_NAME["load-bf16"], None) as real:
        assert hollow.parent == (memory_folder() or disk)
        assert real.parent == disk
    assert not hollow.exists()
    with folder_for(BY_NAME["gen-flux"], tmp_path / "models") as asked:
        assert asked == tmp_path / "models"
    assert asked.exists()
