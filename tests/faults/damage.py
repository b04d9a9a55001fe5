"""Ways in which a file can be bad. Each takes the good file and the path to write the bad one to."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from modules.errors import UserError

Read = TypeVar("Read")
Damage = Callable[[Path, Path], None]


class Harmful:
    """Unpickling this without care makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def proof_of(bad: Path) -> Path:
    """The folder that exists when the code in a bad file was run."""
    return bad.with_name(f"{bad.name}.was_run")


def truncated(good: Path, bad: Path) -> None:
    content = good.read_bytes()
    bad.write_bytes(content[: len(content) // 2])


def one_byte_short(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes()[:-1])


def empty(good: Path, bad: Path) -> None:
    bad.write_bytes(b"")


def web_page(good: Path, bad: Path) -> None:
    bad.write_text("<!doctype html><title>404</title>", encoding="utf-8")


def list_of_clips(good: Path, bad: Path) -> None:
    """FFmpeg would play the good file instead."""
    bad.write_text(f"ffconcat version 1.0\nfile '{good.name}'\n", encoding="ascii")


def pickled_code(good: Path, bad: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "extra": Harmful(proof_of(bad))}, bad)


def old_pickled_code(good: Path, bad: Path) -> None:
    torch.save({"extra": Harmful(proof_of(bad))}, bad, _use_new_zipfile_serialization=False)


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def read_or_reject(read: Callable[[Path], Read], path: Path) -> Read | None:
    """What `read` makes of a path; None where it is refused in a message with the path's name."""
    try:
        return read(path)
    except UserError as error:
        if path.name not in str(error):
            raise AssertionError(f"a message without the file's name: {error}") from error
        return None


def flip_any_bit(path: Path, dice: random.Random) -> None:
    flip_bit(path, dice.randrange(8 * path.stat().st_size))


def flipped_header(seed: int) -> Damage:
    """One bit flipped in the header of a safetensors file that has no metadata: every bit of it counts."""

    def damage(good: Path, bad: Path) -> None:
        save_file(load_file(good), bad)
        size = 8 + int.from_bytes(bad.read_bytes()[:8], "little")
        flip_bit(bad, random.Random(f"{good.name} {seed}").randrange(8 * size))

    return damage


def flipped_data(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes())
    flip_bit(bad, 8 * bad.stat().st_size - 20)
