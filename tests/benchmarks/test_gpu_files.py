"""The files that the GPU benchmark loads: empty ones of full size, and one with real bytes."""

from pathlib import Path

from benchmarks.gpu_files import fill
from benchmarks.gpu_rows import ROWS
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
