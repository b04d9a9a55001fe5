"""What hv_generate_video.py makes of its own options."""

from pathlib import Path

import pytest

from generation.options import read_generation
from hunyuan_model.options import HunyuanGenerationOptions
from hv_generate_video import DEFAULTS, settle

COMMAND = ("--save_path", "out", "--prompt", "a cat", "--exclude_single_blocks")


def test_blocks_of_loras_are_left_out_of_each_file_and_told_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for path in files:
        Path(path).touch()
    for loras in ([], files):
        words = ["--lora_weight", *loras] if loras else []
        options, _ = settle(*read_generation("", DEFAULTS, HunyuanGenerationOptions, [*COMMAND, *words]))
        assert len(options.lora_patterns.exclude_patterns or ()) == len(loras)
    assert caplog.messages == ["--exclude_single_blocks is ignored because --lora_weight is not given"]
