"""Single model files: each container as written, damaged, or made to do harm."""

import contextlib
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.containers import load_pickled
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from tests.modules.making import tensors, write


class Code:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must never run",)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.sft.pt"])
def test_every_tensor_reads_back_as_written(tmp_path: Path, name: str) -> None:
    with open_checkpoint(write(tmp_path / name, tensors())) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()
        for key, tensor in tensors().items():
            read, told = checkpoint.read(key), checkpoint.tensors[key]
            assert read.dtype == tensor.dtype == told.dtype
            assert read.shape == tensor.shape == told.shape
            assert torch.equal(read.float(), tensor.float())


@pytest.mark.parametrize(
    "content",
    [
        {"module": tensors(), "step": torch.tensor(7), "options": {"lr": 1e-4}},
        {"model_state_dict": tensors()},
        {"model": {"name": "x", "sizes": {"a": 1}}, "state_dict": tensors()},
        {"generator": {"params": tensors()}},
    ],
    ids=["beside other entries", "alone", "after one without tensors", "in the only entry of any name"],
)
def test_tensors_are_found_inside_what_trainers_wrap_around_them(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    with open_checkpoint(write(tmp_path / "a.pt", content)) as checkpoint:
        assert checkpoint.tensors.keys() == tensors().keys()


def test_of_several_wrappers_the_published_average_is_taken(tmp_path: Path) -> None:
    order = ("params_ema", "params-ema", "params", "model", "state_dict")
    for index in range(len(order)):
        content = {name: {"a": torch.full((2,), float(place))} for place, name in enumerate(order)}
        path = write(tmp_path / "a.pth", {name: content[name] for name in reversed(order[index:])})
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.read("a").tolist() == [index, index]


def test_wrappers_without_end_are_refused(tmp_path: Path) -> None:
    deep: dict[str, Any] = tensors()
    for _ in range(150):
        deep = {"model": deep}
    in_itself: dict[str, Any] = {}
    in_itself["module"] = in_itself

    for content in (deep, in_itself):
        with pytest.raises(CheckpointError, match="no named tensors"):
            open_checkpoint(write(tmp_path / "a.pth", content))


def test_the_older_torch_format_opens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", {"a": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.ones(3))


def test_a_tensor_that_is_a_view_reads_as_one_of_its_own_size(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    path = write(tmp_path / "a.pth", {"columns": base.t(), "rows": base[1:3]})

    with open_checkpoint(path) as checkpoint:
        rows, columns = checkpoint.read("rows"), checkpoint.read("columns")

    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert columns.is_contiguous()
    assert torch.equal(columns, base.t())


def test_a_header_whose_length_begins_like_a_pickle_is_still_a_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"note": "x"})
    header = path.read_bytes()[8:-8].rstrip()
    path.write_bytes((0x80).to_bytes(8, "little") + header.ljust(0x80) + path.read_bytes()[-8:])

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {"note": "x"}
        assert torch.equal(checkpoint.read("a"), torch.ones(2))


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], is_zip: bool
) -> None:
    content = {"a": torch.ones(2), "b": Code()}
    path = write(tmp_path / "a.pth", content, _use_new_zipfile_serialization=is_zip)

    with pytest.raises(
        CheckpointError, match="contains program code in addition to its tensors and is refused"
    ):
        open_checkpoint(path)

    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / name, tensors()).read_bytes()

    for length in [0, 4, 8, 40, len(data) // 2, len(data) - 1]:
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged|empty|neither"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_flipped_bit_in_the_header_gives_an_error_or_other_names_but_never_a_crash(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name, {"first.weight": torch.ones(4), "second.weight": torch.ones(4)})
    data = path.read_bytes()

    for place in range(min(len(data), 200)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        # any other error fails the test
        with contextlib.suppress(CheckpointError), open_checkpoint(path) as checkpoint:
            for key in checkpoint.tensors:
                checkpoint.read(key)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}, "the unknown type Q4"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "8 bytes for shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "begin at byte 4, not 0"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "its header describes"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "has the shape"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "has the shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}, "has the shape"),
        ({"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}, "impossible shape"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "unhashable"),
        ({"shape": [2]}, "data_offsets"),
        ([], "header cannot be read"),
        (
            {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]},
            "is quantized: a is of type F4, which is not supported",
        ),
    ],
)
def test_a_safetensors_header_that_contradicts_itself_is_refused(
    tmp_path: Path, entry: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_header(tmp_path / "a.safetensors", json.dumps({"a": entry})))


def write_header(path: Path, header: str, length: int | None = None) -> Path:
    """A safetensors file with 8 bytes of data; `length` is what it claims of its header."""
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(8))
    return path


FULL = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a":{FULL},"a":{FULL}}}', "key .a. occurs twice"),
        (f'{{"a":{FULL},"b":{FULL}}}', "begin at byte 0, not 8"),
        (f'{{"__metadata__":["x"],"a":{FULL}}}', "header cannot be read"),
        (f'{{"\\ud800":{FULL}}}', "surrogates"),
        (f'{{"__metadata__":{{"x":"\\ud800"}},"a":{FULL}}}', "surrogates"),
        ('{"a":' * 100_000, "header cannot be read"),
        ("[" * 100_000, "neither a safetensors nor a PyTorch file|header cannot be read"),
        ("{" + " " * 64, "header cannot be read"),
        (f'{{"blocks.{"9" * 5000}.weight":{FULL}}}', "a name of 5014 characters"),
    ],
)
def test_a_header_made_to_do_harm_is_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_header(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [0, 1 << 20, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_is_refused_before_memory_is_taken(
    tmp_path: Path, length: int
) -> None:
    with pytest.raises(CheckpointError, match="it claims"):
        open_checkpoint(write_header(tmp_path / "a.safetensors", f'{{"a":{FULL}}}', length))


def test_a_pickled_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", {"a": torch.zeros(1).expand(1 << 40)})

    with pytest.raises(CheckpointError, match="the whole file"):
        open_checkpoint(path)


def test_a_pickled_tensor_with_an_endless_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a name of 5007 characters"):
        open_checkpoint(write(tmp_path / "a.pth", {f"blocks.{'9' * 5000}": torch.zeros(1)}))


@pytest.mark.parametrize("read", [open_checkpoint, load_pickled])
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x08\x08\x12\x07pytorch", "is an ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is neither a safetensors nor a PyTorch file"),
    ],
)
def test_what_is_no_model_file_is_called_by_its_name(
    tmp_path: Path, start: bytes, message: str, read: Callable[[Path], Any]
) -> None:
    (tmp_path / "model.bin").write_bytes(start)

    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "model.bin")


ODD_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": torch.eye(4).to_sparse,
    "sparse_csr": torch.eye(4).to_sparse_csr,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    "without data": lambda: torch.empty(4, device="meta"),
    "complex64": lambda: torch.ones(4, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_pickled_tensor_that_is_no_plain_one_is_named(tmp_path: Path, kind: str) -> None:
    content = {"state_dict": {"good": torch.ones(2), "odd": ODD_TENSORS[kind]()}, "lists": [1, (2,)]}

    with pytest.raises(CheckpointError, match=rf"a\.pth: (state_dict\.)?odd is .*{kind}.*Only plain weights"):
        open_checkpoint(write(tmp_path / "a.pth", content))


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_state_with_such_a_tensor_is_refused_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", {"state": {0: {"exp_avg": [torch.eye(3).to_sparse()]}}})

    with pytest.raises(CheckpointError, match=r"state\.0\.exp_avg\.0 is a sparse tensor"):
        load_pickled(path)


@pytest.mark.parametrize("program", [b"(" * 2_000_000, b"]" * 700_000 + b"."])
@pytest.mark.parametrize("is_zip", [False, True])
def test_a_list_of_tensors_that_takes_minutes_is_refused_in_seconds(
    tmp_path: Path, program: bytes, is_zip: bool
) -> None:
    path, content = tmp_path / "x.pt", b"\x80\x02" + program
    path.write_bytes(content)
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", content)
    began = time.process_time()
    with pytest.raises(CheckpointError, match="damaged or incomplete: its list of tensors"):
        load_pickled(path)
    assert time.process_time() - began < 60  # a second, on a machine that does nothing else


def test_a_list_of_tensors_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 25))
    with pytest.raises(CheckpointError, match="its list of tensors and values is longer"):
        load_pickled(tmp_path / "x.pt")
