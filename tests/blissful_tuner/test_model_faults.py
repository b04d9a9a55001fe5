"""blissful_tuner/model_utility.py on files that are odd, damaged, or made to mislead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.errors import CheckpointError, OptionError, OutputError
from modules.output_files import Answer, ask_at_console, ask_to_replace
from tests.blissful_tuner.test_model_utility import STATE, run, write


def write_index(folder: Path, name: str) -> Path:
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": name}}), encoding="utf-8")
    return index


@pytest.mark.parametrize("name", ["../b.safetensors", "{}/b.safetensors"])
def test_an_index_leads_to_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "b.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    write_index(folder, name.format(tmp_path))

    with pytest.raises(CheckpointError, match=r"b\.safetensors is not in its folder"):
        run(folder)


# --- what would be lost ---


def answer(typed: str) -> Callable[[str], Answer | None]:
    """Return somebody at a terminal who types that."""
    return lambda question: ask_at_console(question, lambda _: typed, lambda: True, offers_name=False)


def test_what_exists_is_replaced_only_if_that_is_wanted(tmp_path: Path) -> None:
    path, there = write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    before = there.read_bytes()

    with pytest.raises(OutputError, match=r"b\.safetensors exists already. Give another name, or --yes"):
        run(path, "--convert", there)
    with pytest.raises(OutputError, match="is kept"):
        ask_to_replace([there], yes=False, ask=answer("f"))  # no other name is offered
    assert there.read_bytes() == before

    ask_to_replace([there], yes=False, ask=answer("Y"))
    run(path, "--convert", there, "-y")
    assert load_file(there).keys() == STATE.keys()


def test_a_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {f"w{i}": torch.randn(100) for i in range(4)})
    run(path, "--convert", tmp_path / "s.safetensors", "--shard_size", "1kB")
    shard = tmp_path / "s-00001-of-00002.safetensors"

    for source, target in ((path, path), (shard, shard), (tmp_path / "s.safetensors.index.json", shard)):
        with pytest.raises(OptionError, match="would be lost"):
            run(source, "--convert", target, "-y")
    with pytest.raises(OptionError, match="would be lost"):
        run(shard, "--convert", tmp_path / "s.safetensors", "--shard_size", "1kB", "-y")


def test_nothing_is_left_of_a_file_that_cannot_be_written_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": torch.ones(9), "b": torch.tensor([1e6])})
    out = tmp_path / "out"

    with pytest.raises(CheckpointError, match="b has values that float16 cannot hold"):
        run(path, "--convert", out / "b.safetensors", "--dtype", "fp16")
    with pytest.raises(CheckpointError, match="b has values that float16 cannot hold"):
        run(path, "--convert", out, "--dtype", "fp16", "--shard_size", "1000")

    assert list(out.iterdir()) == []


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "code": Touch(tmp_path / "touched")}, tmp_path / "a.pth")

    with pytest.raises(CheckpointError, match="holds program code"):
        run(tmp_path / "a.pth", "--convert", tmp_path / "b.safetensors")

    assert not (tmp_path / "touched").exists()


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
