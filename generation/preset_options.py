"""--optimized: options for speed that are turned on together. Standard library only."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


def as_typed(preset: Mapping[str, Any], name: str) -> str:
    """The option as it is typed: `--attn_mode sageattn`, `--compile`."""
    return f"--{name}" if preset[name] is True else f"--{name} {preset[name]}"


def use_preset(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Turn on the options of --optimized, except given ones.

    The names go to `args.by_preset`, those of the exceptions to `args.not_by_preset`.
    """
    given = given_among(parser, argv, {*args.preset, "fp8"})
    taken = tuple(name for name in args.preset if name not in given)
    if "fp8" in given:  # the other way to keep weights in fp8, which --fp8_scaled would replace
        taken = tuple(name for name in taken if name != "fp8_scaled")
    for name in taken:
        setattr(args, name, args.preset[name])
    args.by_preset, args.not_by_preset = taken, tuple(name for name in args.preset if name not in taken)


def given_among(parser: argparse.ArgumentParser, argv: Sequence[str] | None, names: set[str]) -> set[str]:
    """Return those of the arguments that are on the command line, also if their values are the defaults."""
    nothing = object()
    defaults = {name: parser.get_default(name) for name in names}
    parser.set_defaults(**dict.fromkeys(names, nothing))
    try:
        again = parser.parse_args(argv)
    finally:
        parser.set_defaults(**defaults)
    return {name for name in names if getattr(again, name) is not nothing}
