"""Weights of the transformer in 8 bits, and products in 8 bits. Training and generation name them differently."""

import argparse

from modules.options import add_unsupported

NO_FP8 = "weights are kept in the dtype of the file; leave the option out"


def add_training_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare what is refused yet."""
    add_unsupported(group, "--fp8_base", reason=NO_FP8, action="store_true", help="store the model's weights in fp8")
    add_unsupported(group, "--fp8_scaled", reason=NO_FP8, action="store_true", help="scale fp8 weights per tensor")
    add_unsupported(group, "--upcast_quantization", reason=NO_FP8, action="store_true", help="compute fp8 scales in float32")


def add_generation_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare what is refused yet."""
    add_unsupported(group, "--fp8", reason=NO_FP8, action="store_true", help="store the model's weights in fp8")
    add_unsupported(group, "--fp8_scaled", reason=NO_FP8, action="store_true", help="store them in fp8 with a scale per tensor")
    add_unsupported(group, "--fp8_fast", reason=NO_FP8, action="store_true", help="multiply in fp8")
    add_unsupported(group, "--upcast_linear", reason=NO_FP8, action="store_true", help="compute fp8 layers in float32")
    add_unsupported(group, "--upcast_quantization", reason=NO_FP8, action="store_true", help="compute fp8 scales in float32")
