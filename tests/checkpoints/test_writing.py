"""Files written tensor by tensor, models cut into files, tokenizers that grow, weights of tokens."""

import base64
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models

from blissful_tuner.model_utility import main
from checkpoints.changing import existing_shards, gather, write_shards
from checkpoints.opening import open_checkpoint
from checkpoints.tokenizers import TokenizerFiles, check_sentencepiece
from checkpoints.writing import stream_tensors
from modules import atomic_write
from modules.errors import CheckpointError
from modules.limits import MAX_TOKENIZER_BYTES
from protocols.data import weigh_tokens
from protocols.loading import TensorInfo
from protocols.rules import CharSpan, token_weights
from tests.tiny.wan_encoders import sentencepiece_model

TENSORS = {
    "b": torch.randn(3, 4).to(torch.bfloat16),
    "a": torch.randn(2, 2),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    "turned": torch.randn(4, 3).T,
    "ümlaut": torch.ones(2, dtype=torch.bool),
}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_a_file_has_what_the_library_reads_and_its_order_of_data(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    stream_tensors(path, INFOS, TENSORS.__getitem__, {"key": "välue"})

    stored = load_file(path)
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(tensor.float(), TENSORS[name].float()) for name, tensor in stored.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "välue"}
    theirs = save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
    size_bytes = sum(info.size_bytes for info in INFOS.values())
    assert path.read_bytes()[-size_bytes:] == theirs[-size_bytes:]


def test_nothing_is_left_where_a_tensor_is_not_as_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scalar was announced"):
        stream_tensors(tmp_path / "x.safetensors", INFOS, lambda name: TENSORS[name].float())

    assert list(tmp_path.iterdir()) == []


NAMES = ("a", "b", "c")
SIZE = 400  # bytes of a tensor


class Killed(BaseException):
    """The machine stops here."""


def write_model(path: Path, value: float, shard_bytes: int) -> None:
    tensors = {name: TensorInfo(torch.float32, (100,)) for name in NAMES}
    write_shards(path, tensors, lambda _: torch.full((100,), value), {}, shard_bytes)


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, folder: Path, changes: int) -> Iterator[list[Path]]:
    """Raise Killed at the next change of the folder's names after that many; yields the names changed."""
    changed: list[Path] = []

    def counted(change: Callable[..., Any], place: int) -> Callable[..., Any]:
        def run(*words: Any, **options: Any) -> Any:
            target = Path(words[place])
            if target.parent == folder and (place == 1 or target.exists()):
                if len(changed) == changes:
                    raise Killed
                changed.append(target)
            return change(*words, **options)

        return run

    with monkeypatch.context() as patches:
        patches.setattr(atomic_write, "replace_file", counted(os.replace, 1))
        patches.setattr(os, "link", counted(os.link, 1))  # a new name for a finished file, on Linux
        patches.setattr(os, "rename", counted(os.rename, 1))  # the same, on Windows
        patches.setattr(Path, "unlink", counted(Path.unlink, 0))
        yield changed


def values(path: Path, opened: Callable[[Path], Any]) -> set[float]:
    with opened(path) as checkpoint:
        assert set(checkpoint.tensors) == set(NAMES)
        return {float(number) for name in NAMES for number in checkpoint.read(name)}


@pytest.mark.parametrize("before", [3 * SIZE, 2 * SIZE, SIZE])  # one file, two, as many as the new model
def test_a_kill_between_two_names_leaves_one_model_or_none(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = steps = 0
    for steps in range(20):
        folder = tmp_path / str(steps)
        path = folder / "model.safetensors"
        write_model(path, 1.0, before)
        try:
            with killed_after(monkeypatch, folder, steps):
                write_model(path, 2.0, SIZE)
            break
        except Killed:
            pass
        files = [*folder.glob("*.safetensors"), *existing_shards(path), folder]
        for file, opened in itertools.product(files, (gather, open_checkpoint)):
            try:
                assert values(file, opened) in ({1.0}, {2.0}), (steps, file)
            except CheckpointError:
                refused += 1
    assert steps >= 4
    assert refused
    assert values(folder, gather) == {2.0}


def test_a_folder_with_some_of_the_shards_is_refused_with_the_names_of_others(tmp_path: Path) -> None:
    write_model(tmp_path / "model.safetensors", 1.0, SIZE)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert values(tmp_path, gather) == {1.0}
    (tmp_path / "model-00002-of-00003.safetensors").unlink()

    for opened in (gather, open_checkpoint):
        with pytest.raises(CheckpointError, match="model-00002-of-00003"):
            opened(tmp_path)


def test_older_shards_go_after_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out" / "model.safetensors"
    write_model(source, 1.0, SIZE)
    write_model(target, 2.0, SIZE)
    words = ["--input", f"{source}.index.json", "--convert", str(target), "-y", "--shard_size", "1MB"]

    with killed_after(monkeypatch, target.parent, 99) as changed:
        main(words)

    assert [path.name for path in changed] == [
        "model.safetensors",
        "model.safetensors.index.json",
        *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    ]
    assert [path.name for path in target.parent.iterdir()] == ["model.safetensors"]


FILES = TokenizerFiles("--tokenizer", ("tokenizer.json",), "", "nobody/nothing", ("."))


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(inner)}


def write(path: Path, normaliser: dict[str, Any] | None) -> Path:
    content = json.loads(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str())
    path.write_text(json.dumps({**content, "normalizer": normaliser}), encoding="utf-8")
    return path


def field(number: int, content: bytes) -> bytes:
    """One entry of a protobuf message."""
    length, groups = len(content), bytearray()
    while True:
        groups.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            return bytes([number << 3 | 2]) + bytes(groups) + content


HARMLESS = [
    None,
    sequence({"type": "NFC"}, replace(" ", Regex=r"\s+"), {"type": "Lowercase"}),  # CLIP's
    sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),  # Llama 2's
]
HARMFUL = {
    "a long replacement": replace("x" * 1000, String="a"),
    "by a regular expression": replace("x" * 1000, Regex="."),
    "many short ones": sequence(*[replace("aa", String="a")] * 40),
    "nested": sequence(sequence(replace("x" * 100, String="a")), replace("y" * 100, String="x")),
    "a long beginning": {"type": "Prepend", "prepend": "x" * 1000},
}


@pytest.mark.parametrize("normaliser", HARMLESS, ids=["none", "CLIP's", "Llama 2's"])
def test_a_normaliser_of_a_real_tokenizer_is_taken(normaliser: dict[str, Any] | None, tmp_path: Path) -> None:
    FILES.read(write(tmp_path / "tokenizer.json", normaliser))


@pytest.mark.parametrize("name", HARMFUL)
def test_a_normaliser_that_lengthens_without_measure_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer.json", HARMFUL[name])

    with pytest.raises(CheckpointError, match=r"tokenizer\.json .*normalizer makes \d+ characters of one"):
        FILES.read(path)


def test_a_table_of_characters_that_lengthens_without_measure_is_refused(tmp_path: Path) -> None:
    charsmap = (4).to_bytes(4, "little") + bytes(4) + b"short\0" + b"x" * 5000 + b"\0"
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}

    with pytest.raises(CheckpointError, match="makes 5000 characters of one"):
        FILES.read(write(tmp_path / "tokenizer.json", table))
    with pytest.raises(ValueError, match="makes 5000 characters of one"):
        check_sentencepiece(field(1, b"piece") + field(3, field(1, b"name") + field(2, charsmap)))


def test_a_sentencepiece_model_of_any_size_is_taken_unless_it_is_damaged() -> None:
    model = sentencepiece_model()
    check_sentencepiece(model)
    check_sentencepiece(field(1, b"0123456789") * 256_000 + field(3, field(2, bytes(4) + b"a\0")))

    for damaged in (model + b"\x0a", b"\x1a\xff\xff", b"\x07", b"\xff" * 10_000_000):
        with pytest.raises(ValueError, match="field"):
            check_sentencepiece(damaged)


def test_a_file_larger_than_any_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10 << 30)

    for read in (FILES.read, FILES.read_bytes):
        with pytest.raises(CheckpointError, match=f"larger than {MAX_TOKENIZER_BYTES >> 20} MiB"):
            read(tmp_path / "tokenizer.json")


TEXT = "a red, red car"
SPANS = ((2, 5, 2.0), (7, 14, 0.5))


@pytest.mark.parametrize(
    ("place", "weight"),
    [
        ((0, 1), 1.0),
        ((1, 5), 2.0),  # the blank in front does not count
        ((4, 6), 2.0),  # it begins inside
        ((5, 7), 1.0),
        ((5, 8), 1.0),  # it begins before
        ((6, 7), 1.0),  # a blank alone
        ((10, 11), 0.5),  # a blank inside
        ((14, 14), 1.0),
        (None, 1.0),
    ],
)
def test_a_token_belongs_where_its_first_character_is(place: CharSpan, weight: float) -> None:
    assert token_weights(TEXT, [place], SPANS) == [weight]
    assert token_weights(TEXT, [place], ()) == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_weight_one_keep_every_bit(dtype: torch.dtype) -> None:
    rows = (100 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))).to(dtype)
    expected = rows.clone()
    expected[1], expected[3] = (rows[1].float() * 1.4).to(dtype), rows[3] * -0.5

    weighted = weigh_tokens(rows, [1.0, 1.4, 1.0, -0.5])

    assert weighted.dtype == dtype
    assert torch.equal(weighted, expected)
    stacked = weigh_tokens(rows.unflatten(-1, (2, 4)), [1.0, 1.4, 1.0, -0.5])
    assert torch.equal(stacked, expected.unflatten(-1, (2, 4)))
