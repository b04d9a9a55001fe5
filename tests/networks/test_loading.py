"""Reading LoRA files: damage, foreign content, PEFT's settings; network modules by name."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from modules.errors import CheckpointError
from networks.alphas import peft_alphas
from networks.convert import convert_file
from networks.loading import read_lora
from networks.metadata import save_network
from networks.module_factors import compute_scaling
from tests.networks.making import tiny_dit, wan_network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_network(wan_network(tiny_dit(tmp_path)), path, torch.bfloat16, {"ss_seed": "1"})
    return path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("position", [-1, -5000])
def test_a_flipped_bit_is_found_out(saved: Path, position: int) -> None:
    read_lora(saved)
    flip(saved, position)

    with pytest.raises(CheckpointError, match="damaged"):
        read_lora(saved)


def test_what_a_lora_was_trained_for_is_said_when_it_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network, use = wan_network(tiny_dit(tmp_path)), "videos of FramePack-F1"
    save_network(network, tmp_path / "f1.safetensors", torch.bfloat16, {"reelsmith_trained_for": use})
    read_lora(tmp_path / "f1.safetensors")
    assert caplog.messages[-1].endswith(f"names as in sd-scripts, trained for {use}")


def test_old_hashes_that_another_tool_copied_do_no_harm(saved: Path) -> None:
    metadata = dict(read_lora(saved).metadata)
    renamed = {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 4),
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.ones(4, 2),
    }
    save_file(renamed, saved, metadata=metadata)

    assert read_lora(saved).dialect == "other"


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("GLoRA", ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")),
        ("OFT in an older form than oft_R.weight", ("oft_blocks", "alpha")),
        ("BOFT", ("boft_R", "boft_s")),
        (r"\(IA\)3", ("on_input", "weight")),
    ],
)
def test_other_kinds_of_networks_are_refused_by_name(
    tmp_path: Path, kind: str, parts: tuple[str, ...]
) -> None:
    tensors = {f"lora_unet_blocks_0_ffn_0.{part}": torch.ones(2, 2) for part in parts}
    save_file(tensors, tmp_path / "x.safetensors")

    with pytest.raises(CheckpointError, match=f"is a network of the kind {kind}, which is not supported"):
        read_lora(tmp_path / "x.safetensors")


UP, DOWN = "lora_up.weight", "lora_down.weight"


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ({UP: torch.full((4, 2), torch.nan)}, "8 of 8 values of its lora_up.weight are NaN or infinite"),
        (
            {UP: torch.ones(4, 3)},
            r"do not match each other: lora_down.weight \[2, 5\], lora_up.weight \[4, 3\]",
        ),
        ({UP: torch.ones(4, 2, dtype=torch.int32)}, "lora_up.weight is of the type int32"),
        ({"diff_b": torch.ones(3)}, "its bias has 3 values, its weight 4 rows"),
    ],
)
def test_factors_that_no_weight_could_take_are_refused_with_numbers(
    tmp_path: Path, factors: dict[str, torch.Tensor], reason: str
) -> None:
    full = {DOWN: torch.ones(2, 5), UP: torch.ones(4, 2)} | factors
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_blocks_1_ffn_0.{part}": tensor for part, tensor in full.items()}, path)

    with pytest.raises(CheckpointError, match=rf"lora_unet_blocks_1_ffn_0: .*{reason}"):
        read_lora(path)
    with pytest.raises(CheckpointError, match=reason):
        convert_file(path, tmp_path / "y.safetensors", "other")


@pytest.mark.parametrize(("number", "is_loud"), [(5, False), (9, True)])
def test_keys_that_cannot_be_used_are_listed_loudly_if_they_are_many(
    saved: Path, number: int, is_loud: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = dict(read_lora(saved).tensors)
    others = {f"params{index}": torch.ones(2) for index in range(number)}
    save_file(tensors | others | {"lora_te_x.lora_down.weight": torch.ones(2, 2)}, saved)

    with caplog.at_level(logging.WARNING):
        assert read_lora(saved).tensors.keys() == tensors.keys()

    assert "1 tensor of a text encoder is ignored: lora_te_x.lora_down.weight" in caplog.text
    assert f"{number} of {len(tensors) + number + 1} tensors are not part of a LoRA" in caplog.text
    assert "params0" in caplog.text
    assert ("IS USED ONLY IN PART" in caplog.text) == is_loud


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_alpha": 8, "r": 2, "use_rslora": True}, [8 / 2**0.5] * 2),
        ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"blocks.0.attn1.to_q": 2}}, [1.0, 4.0]),
    ],
)
def test_alphas_in_the_peft_settings_of_a_folder_count(
    tmp_path: Path, settings: dict[str, object], expected: list[float]
) -> None:
    """Those in the metadata of a file: tests/networks/test_key_formats.py."""
    start = "base_model.model.blocks.0.attn1"
    names = [f"{start}.to_{part}.lora_{factor}.weight" for part in "qk" for factor in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")

    modules = read_lora(tmp_path).modules()

    found = [compute_scaling(modules[f"lora_unet_blocks_0_self_attn_{part}"]) for part in "qk"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 8, "alpha_pattern": {"(": 2}},
        {"lora_alpha": 8, "alpha_pattern": [1]},
    ],
)
def test_peft_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: object) -> None:
    save_file(
        {f"blocks.0.attn1.to_q.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
        tmp_path / "adapter_model.sft",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")

    with pytest.raises(CheckpointError, match="PEFT settings cannot be read"):
        read_lora(tmp_path)


PATHS = [
    *("blocks.0.attn1.to_q", "blocks.10.attn2.to_out.0", "blocks.3.ffn.net.0.proj", "blocks.1.ffn.net.2"),
    *("to_q", "attn1.to_q", "xto_q", "proj_out", "blocks.0.attn1.add_k_proj", "blocks.2.a_b.to_q"),
]
KEYS = [
    *("to_q", "attn1.to_q", "net.0.proj", "q", "blocks.0.attn1.to_q", "a-b", r".*attn.*to_q", r"^to_q$"),
    *(r"^blocks\.0\..*", r"(attn1|attn2)\.to_(q|out\.0)", r"[^x]*to_q", r"to_q|to_k", r"(a+)+c?", r"x?to_q"),
    *(r"\w+", r".*?q", r"blocks.[\d].*", r"(|x)to_q"),
]


def alphas(keys: list[str]) -> list[str | None]:
    """Return which of the keys of an alpha_pattern counts for each of PATHS."""
    modules = {path: {"lora_down.weight": torch.ones(1, 2)} for path in PATHS}
    pattern = {key: float(index) for index, key in enumerate(keys)}
    found = peft_alphas(modules, {path: path for path in PATHS}, {"alpha_pattern": pattern}, {})
    return [keys[int(found[f"{path}.alpha"])] if f"{path}.alpha" in found else None for path in PATHS]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_what_peft_matches(key: str) -> None:
    assert alphas([key]) == [key if get_pattern_key([key], path) == key else None for path in PATHS]


def test_the_first_of_several_keys_counts_as_in_peft() -> None:
    keys = ["attn2.to_out.0", ".*attn1.*", "to_q", "blocks.0.attn1.to_q", ".*"]
    for turned in (keys, keys[::-1]):
        assert alphas(turned) == [get_pattern_key(turned, path) for path in PATHS]


def test_what_is_no_expression_is_named() -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        alphas(["a**"])


def test_a_hostile_expression_ends_soon() -> None:
    start = time.process_time()
    modules = {"m": {"lora_down.weight": torch.ones(1, 2)}}
    # Python's `re` would need longer than the universe is old
    with pytest.raises(ValueError, match="takes too long"):
        peft_alphas(modules, {"m": "a" * 900}, {"alpha_pattern": {r"(a|aa)+[bc]": 1.0}}, {})
    assert time.process_time() - start < 10
