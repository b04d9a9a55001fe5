"""blissful_tuner/model_utility.py on files that are odd, damaged, or made to mislead."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.checkpoints.containers import MAX_HEADER_BYTES
from modules.errors import CheckpointError, OptionError, OutputError
from modules.output_files import Answer, ask_at_console, ask_to_replace
from tests.blissful_tuner.test_model_utility import STATE, run, write
from tests.manifests import write_hollow


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


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


def test_an_index_may_lead_to_links_and_to_folders_below(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    save_file({"b": torch.full((1,), 3.0)}, blob)
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "b.safetensors").symlink_to(blob)
    index = write_index(folder, "below/b.safetensors")

    run(index, "--convert", tmp_path / "all.safetensors")

    assert load_file(tmp_path / "all.safetensors")["b"] == 3.0


def test_an_index_with_an_endless_name_is_refused_in_few_words(tmp_path: Path) -> None:
    write_index(tmp_path, "b" * 1_000_000)

    with pytest.raises(CheckpointError, match="not beside it") as failure:
        run(tmp_path)
    assert len(str(failure.value)) < 1000


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "C64"])
def test_a_dtype_that_no_model_here_has_is_named_and_not_called_damage(tmp_path: Path, kind: str) -> None:
    path = write_raw(
        tmp_path / "a.safetensors", {"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}, b"0000"
    )

    with pytest.raises(CheckpointError, match=f"w is of type {kind}, which is not supported"):
        run(path)


def test_whole_numbers_with_a_scale_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {
        "l.weight": torch.tensor([[1, 2]], dtype=torch.int8),
        "l.weight_scale": torch.tensor(0.5),
        "m.weight": torch.ones(2),
    }
    save_file(state, path)

    run(path, "--convert", tmp_path / "b.safetensors", "--dtype", "bf16")

    made = load_file(tmp_path / "b.safetensors")
    assert torch.equal(made["l.weight"], state["l.weight"])
    assert torch.equal(made["l.weight_scale"], state["l.weight_scale"])
    assert made["m.weight"].dtype == torch.bfloat16


def test_a_scale_that_does_not_fit_its_weight_is_named(tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    save_file({"l.weight": weight, "l.scale_weight": torch.ones(3, 1)}, path)

    with pytest.raises(CheckpointError, match=r"the scale of l\.weight has the shape \[3, 1\]"):
        run(path, "--convert", out, "--dtype", "bf16")
    assert not out.exists()


def test_a_lora_of_single_numbers_is_described_without_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    parts = {"lora_down.weight": torch.tensor(1.0), "lora_up.weight": torch.ones(4, 8)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{part}": each for part, each in parts.items()}, path)

    run(path)

    assert "a LoRA" in capsys.readouterr().out


def test_names_that_no_safetensors_file_can_hold_are_refused(tmp_path: Path) -> None:
    half, taken = tmp_path / "half.pt", tmp_path / "taken.pt"
    torch.save({"a\ud800": torch.ones(1)}, half)
    torch.save({"__metadata__": torch.ones(2), "b": torch.zeros(1)}, taken)
    out = tmp_path / "out.safetensors"

    with pytest.raises(CheckpointError, match="a tensor's name is no text"):
        run(half)
    with pytest.raises(OptionError, match="would be called __metadata__"):
        run(taken, "--convert", out)
    assert not out.exists()
    run(taken, "--convert", out, "--add_prefix", "x.")
    assert set(load_file(out)) == {"x.__metadata__", "x.b"}


def test_a_tensor_without_a_name_can_be_written(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path / "a.safetensors", {"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000"
    )

    run(path, "--convert", tmp_path / "b.safetensors", "--add_prefix", "w")

    assert set(load_file(tmp_path / "b.safetensors")) == {"w"}


def test_a_header_that_nothing_could_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path)

    with pytest.raises(OutputError, match="cannot be read. Give shorter names"):
        run(path, "--convert", tmp_path / "b.safetensors", "--add_prefix", "x" * MAX_HEADER_BYTES)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_name_of_several_lines_is_shown_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a\ntensors: 1000": torch.ones(1)}, path)

    run(path, "--inspect")

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("tensors:")] == ["tensors: 1, with 1 number"]
    assert lines[-1] == "a\\ntensors: 1000: [1] (float32)"


def test_the_index_of_the_model_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1000)}, tmp_path / "b.safetensors")
    index = write_index(tmp_path, "b.safetensors")
    before = index.read_bytes()

    with pytest.raises(OptionError, match="would be lost"):
        run(tmp_path, "--convert", tmp_path / "model.safetensors", "--shard_size", "1kB", "-y")
    assert index.read_bytes() == before


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


def test_the_disk_is_asked_for_room_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 1 << 40
    hollow = write_hollow(tmp_path / "a.safetensors", {"a": ("F32", (size,)), "b": ("F32", (size,))})

    for more in ([], ["--shard_size", "5TB"]):
        with pytest.raises(OutputError, match="the disk has"):
            run(hollow, "--convert", tmp_path / "b.safetensors", *more)

    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_tensor_that_differs_between_two_files_is_named_with_both(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"a": torch.ones(2)})
    write(tmp_path / "2.safetensors", {"a": torch.zeros(2)})

    with pytest.raises(CheckpointError, match=r"a is in two files, 1\.safetensors and 2\.safetensors"):
        run(tmp_path)


def test_an_index_whose_files_lack_a_tensor_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"a": torch.ones(2)})
    index = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    with pytest.raises(CheckpointError, match="1 tensors are in none of its files: b"):
        run(tmp_path)


def test_metadata_that_differ_between_files_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "1.safetensors", {"a": torch.ones(1)}, {"same": "x", "other": "1"})
    write(tmp_path / "2.safetensors", {"b": torch.ones(1)}, {"same": "x", "other": "2"})

    run(tmp_path)

    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "its files say different things of other; the last one's counts"
    ]


def test_two_tensors_cannot_get_one_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x.a": torch.ones(1), "a": torch.ones(1)})

    with pytest.raises(OptionError, match=r"a and x\.a would both be called a"):
        run(path, "--convert", tmp_path / "b.safetensors", "--strip_prefix", "x.")


def test_a_scale_is_not_parted_from_its_weight(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)}
    path = write(tmp_path / "a.safetensors", state)

    with pytest.raises(OptionError, match=r"a\.weight is in 8 bits and means nothing without"):
        run(path, "--convert", tmp_path / "b.safetensors", "--full_exclude_keys", "scale_weight")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "code": Touch(tmp_path / "touched")}, tmp_path / "a.pth")

    with pytest.raises(CheckpointError, match="holds program code"):
        run(tmp_path / "a.pth", "--convert", tmp_path / "b.safetensors")

    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights_only", "false"], "--weights_only false: .* never opened"),
        (["--disable_weights_only"], "--disable_weights_only: .* never opened"),
        (["--convert", "b.safetensors", "--dtype", "fp61"], "Did you mean fp16"),
        (["--convert", "b.safetensors", "--dtype", "fp8"], "weights in 8 bits are not written"),
        (["--convert", "b.safetensors", "--shard_size", "many"], "give a size such as 5GB"),
        (["--convert", "b.safetensors", "--strip_prefix", "nothing."], "no tensor's name begins so"),
        (["--convert", "b.safetensors", "--full_target_keys", "nothing"], "leave no tensor"),
        (["--convert", "b.txt"], "a name that ends in .safetensors"),
        (["--inspect", "--target_keys", "nothing"], "leave no tensor to list"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    path = write(tmp_path / "a.safetensors")

    with pytest.raises(OptionError, match=message):
        run(path, *[str(tmp_path / word) if word.startswith("b.") else word for word in words])

    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)
