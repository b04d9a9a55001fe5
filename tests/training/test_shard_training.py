"""Training from shards is training from single files, to the bit, through the scripts of every family."""

import os
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.faults.messages import run_here, succeed_here
from tests.tiny.families import FAMILIES, TinyFamily

OF_THE_RUN = {"ss_ss_session_id", "ss_session_id", "ss_training_started_at", "ss_training_finished_at"}
OF_THE_RUN |= {"modelspec.date", "sshs_model_hash"}


def train(family: TinyFamily, folder: Path, form: str, workers: int) -> Path:
    """Cache in a form and train; return the LoRA."""
    config = folder / "dataset.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("[general]\n", f'[general]\ncache_format = "{form}"\n'), encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    output = ["--output_dir", "output", "--output_name", form, "--seed", "1", "--max_train_steps", "2"]
    succeed_here(*family.train, *output, "--max_data_loader_n_workers", str(workers), folder=folder)
    config.write_text(text, encoding="utf-8")
    return folder / "output" / f"{form}.safetensors"


def facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {
            key: value.replace("shards", "files")
            for key, value in file.metadata().items()
            if key not in OF_THE_RUN
        }


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=() if one is FAMILIES[0] else pytest.mark.slow)
        for one in FAMILIES
    ],
)
def test_a_lora_from_shards_is_that_from_files(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    theirs = train(family, tmp_path, "files", workers=0)
    (tmp_path / "cache").rename(tmp_path / "single")
    ours = train(family, tmp_path, "shards", workers=1)

    assert len(os.listdir(tmp_path / "cache")) == 2
    assert len(os.listdir(tmp_path / "single")) >= 4 * 2
    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys()
    assert all(mine[name].equal(other[name]) for name in mine)
    assert any(tensor.any() for name, tensor in mine.items() if "lora_up" in name or "lora_B" in name)
    assert facts(ours) == facts(theirs)

    if family is FAMILIES[0]:  # the trainings of picture models encode what they miss
        code, said = run_here(*family.train, "--output_dir", "output", "--output_name", "x", folder=tmp_path)
        assert code == 1
        assert 'cache_format = "files", but in' in said
        assert "tools/convert_cache.py --dataset_config dataset.toml --to files" in said
    succeed_here(
        "tools/convert_cache.py", "--dataset_config", "dataset.toml", "--to", "files", folder=tmp_path
    )
    for path in (tmp_path / "single").iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes(), path.name
