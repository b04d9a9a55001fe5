"""A LoRA of edits is recognized by its metadata, so that one without a picture is remarked on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from generation.request import find_edit_loras

CONTROLLED = json.dumps([{"has_control": True}])


@pytest.mark.parametrize(
    ("metadata", "options"),
    [
        ({"ss_edit": "True"}, [" (--edit)"]),
        ({"ss_datasets": CONTROLLED}, [""]),  # FLUX.1 Kontext
        ({"ss_edit": "False", "ss_model_version": "edit-2511", "ss_datasets": CONTROLLED}, [""]),
        ({"ss_edit": "False", "ss_datasets": CONTROLLED}, []),  # Krea 2, which ignores them without --edit
        ({"ss_datasets": json.dumps([{"has_control": True}, {"has_control": False}])}, []),
        ({"ss_datasets": "[]"}, []),
        ({"ss_datasets": "[[[["}, []),
        ({"ss_datasets": "[3]"}, []),
        ({}, []),
    ],
)
def test_loras_of_edits_are_found(tmp_path: Path, metadata: dict[str, str], options: list[str]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)

    assert [option for _, option in find_edit_loras([path])] == options
