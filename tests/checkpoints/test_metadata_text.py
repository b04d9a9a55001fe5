"""tools/show_metadata.py: the metadata of a model file as JSON."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.messages import assert_one_message, run_here
from tools import show_metadata

TENSORS = {"weight": torch.zeros(2)}


def test_metadata_is_printed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"ss_tag_frequency": '{"10_猫": {"cat": 3}}', "ss_network_dim": "16", "a": "{no json"}
    save_file(TENSORS, tmp_path / "lora.safetensors", metadata)

    show_metadata.main(["--model", str(tmp_path / "lora.safetensors")])

    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["a", "ss_network_dim", "ss_tag_frequency"]
    assert shown == {"ss_tag_frequency": {"10_猫": {"cat": 3}}, "ss_network_dim": "16", "a": "{no json"}


def test_a_file_without_metadata_is_an_empty_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(TENSORS, tmp_path / "lora.safetensors")
    show_metadata.main([str(tmp_path / "lora.safetensors")])  # also without --model
    said = capsys.readouterr()
    assert json.loads(said.out) == {}
    assert "contains no metadata" in said.err


def test_codes_of_a_terminal_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", {"title": "\x1b[31mred\x9b", "list": "[" * 5000})
    show_metadata.main(["--model", str(tmp_path / "x.safetensors")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x9b" not in out


@pytest.mark.parametrize(
    ("name", "reason"),
    [("model.ckpt", "is not a safetensors file"), ("nowhere.safetensors", "nowhere"), ("folder", "folder")],
)
def test_what_has_no_header_is_an_error(name: str, reason: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.ckpt")
    (tmp_path / "folder").mkdir()
    code, said = run_here("tools/show_metadata.py", "--model", name, folder=tmp_path)
    assert_one_message(code, said, reason, remedy=name != "model.ckpt")
