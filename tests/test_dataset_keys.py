"""Masks, several captions and caption dropout go through the scripts of every family."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, TinyFamily


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_nothing_is_learned_of_black_masks(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    config = tmp_path / "dataset.toml"
    (tmp_path / "masks").mkdir()
    for caption in (tmp_path / "clips").glob("*.txt"):
        Image.new("RGB", (64, 64)).save(tmp_path / "masks" / f"{caption.stem}.png")
    keys = f'mask_directory = "{tmp_path.as_posix()}/masks"\ntrigger_word = "ohwx"\n'
    keys += "multi_caption = true\ncaption_dropout_rate = 0.5\n"
    config.write_text(config.read_text(encoding="utf-8") + keys, encoding="utf-8")
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    output = ["--output_dir", "output", "--output_name", "lora", "--seed", "1"]

    succeed_here(
        *family.train, *output, "--max_train_steps", "3", "--max_data_loader_n_workers", "0", folder=tmp_path
    )

    tensors = load_file(tmp_path / "output" / "lora.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    with safe_open(tmp_path / "output" / "lora.safetensors", "pt") as file:
        (table,) = json.loads(file.metadata()["ss_datasets"])
    assert {name: table[name] for name in ("mask_directory", "multi_caption", "trigger_word")} == {
        "mask_directory": "masks",
        "multi_caption": True,
        "trigger_word": "ohwx",
    }
