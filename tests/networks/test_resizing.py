"""Resize LoRAs: networks/resize_lora.py, against NumPy's decomposition of the whole change."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks import resize_lora
from networks.resizing import select_rank
from tests.faults.messages import assert_one_message, run_here

# the ends of names of a pair, and of its alpha, in files of several programs
NAMES = {
    "sd-scripts": ("lora_unet_x", ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "comfyui": ("diffusion_model.x", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "peft": ("base_model.model.x", ".lora_A.default.weight", ".lora_B.default.weight", ".alpha"),
    "diffusers": ("transformer.x", ".lora.down.weight", ".lora.up.weight", ".alpha"),
    "processors": ("unet.x.processor.to_q", "_lora.down.weight", "_lora.up.weight", ".alpha"),
}
RANK, ALPHA = 6, 3.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_pair(module: str, down: str, up: str, alpha: str, seed: int = 0) -> dict[str, Tensor]:
    return {
        module + down: draw(RANK, 12, seed=seed),
        module + up: draw(10, RANK, seed=seed + 1),
        module + alpha: torch.tensor(ALPHA),
    }


def change_of(tensors: dict[str, Tensor], module: str, down: str, up: str, alpha: str) -> np.ndarray:
    """The change in float64: up @ down * alpha / rank."""
    down_factor, up_factor = tensors[module + down].double(), tensors[module + up].double()
    strength = float(tensors[module + alpha]) / len(down_factor) if module + alpha in tensors else 1.0
    return (up_factor.flatten(1) @ down_factor.flatten(1) * strength).numpy()


def resize(
    folder: Path, tensors: dict[str, Tensor], *words: str, metadata: dict[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    source, made = folder / "a b ü.safetensors", folder / "small.safetensors"
    save_file(tensors, source, metadata)
    resize_lora.main(["--model", str(source), "--save_to", str(made), *words])
    with safe_open(made, "pt") as file:
        return load_file(made), file.metadata()


@pytest.mark.parametrize("form", NAMES)
def test_the_nearest_change_of_a_smaller_rank_under_the_names_of_the_file(tmp_path: Path, form: str) -> None:
    names = NAMES[form]
    tensors = make_pair(*names)

    made, _ = resize(tmp_path, tensors, "--new_rank", "2")

    assert made.keys() == tensors.keys()
    assert made[names[0] + names[1]].shape == (2, 12)
    assert made[names[0] + names[3]] == ALPHA / RANK * 2
    u, sizes, vh = np.linalg.svd(change_of(tensors, *names))
    nearest = (u[:, :2] * sizes[:2]) @ vh[:2]
    # factors in float32: 1e-7 of the largest value, and sums of 2
    np.testing.assert_allclose(change_of(made, *names), nearest, atol=2e-6 * sizes[0])


def test_factors_are_those_of_the_decomposition(tmp_path: Path) -> None:
    names = NAMES["sd-scripts"]
    made, _ = resize(tmp_path, make_pair(*names), "--new_rank", "3")

    down = made[names[0] + names[1]].double()
    # rows of length 1 that are orthogonal; the sizes are in the other factor
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_without_alphas_the_strength_stays_1(tmp_path: Path) -> None:
    names = NAMES["comfyui"]
    tensors = make_pair(*names)
    del tensors["diffusion_model.x.alpha"]

    made, _ = resize(tmp_path, tensors, "--new_rank", "6")

    assert made.keys() == tensors.keys()
    np.testing.assert_allclose(change_of(made, *names), change_of(tensors, *names), atol=1e-4)


def test_a_rank_above_the_old_one_keeps_the_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = NAMES["sd-scripts"]
    tensors = make_pair(*names)
    caplog.set_level("INFO")

    made, metadata = resize(tmp_path, tensors, "--new_rank", "64")

    assert made[names[0] + names[1]].shape == (RANK, 12)
    np.testing.assert_allclose(change_of(made, *names), change_of(tensors, *names), atol=1e-4)
    assert metadata["ss_network_dim"] == str(RANK)
    assert "no module has more ranks than asked for" in caplog.text


def test_convolutions_have_a_rank_of_their_own_and_other_tensors_stay(tmp_path: Path) -> None:
    names = NAMES["sd-scripts"]
    tensors = make_pair(*names) | {
        "lora_unet_conv.lora_down.weight": draw(4, 5, 3, 3, seed=3),
        "lora_unet_conv.lora_up.weight": draw(7, 4, 1, 1, seed=4),
        "lora_unet_conv.alpha": torch.tensor(4.0),
        "lora_unet_norm.diff": draw(7, seed=5),
        "bundle_emb.blob.emb_params": draw(3, 8, seed=6),
    }
    arguments = json.dumps({"conv_dim": "4", "conv_alpha": "4", "dropout": "0.1"})

    made, metadata = resize(
        *(tmp_path, tensors, "--new_rank", "5", "--new_conv_rank", "2"),
        metadata={"ss_network_args": arguments, "ss_network_dim": "6", "ss_network_alpha": "3.0"},
    )

    conv = ("lora_unet_conv", *names[1:])
    assert made["lora_unet_conv.lora_down.weight"].shape == (2, 5, 3, 3)
    assert made["lora_unet_conv.lora_up.weight"].shape == (7, 2, 1, 1)
    u, sizes, vh = np.linalg.svd(change_of(tensors, *conv), full_matrices=False)
    np.testing.assert_allclose(change_of(made, *conv), (u[:, :2] * sizes[:2]) @ vh[:2], atol=1e-5)
    for name in ("lora_unet_norm.diff", "bundle_emb.blob.emb_params"):
        assert torch.equal(made[name], tensors[name])
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "2.5")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0", "dropout": "0.1"}


def test_a_core_becomes_part_of_the_new_factors(tmp_path: Path) -> None:
    down, core, up = draw(4, 5, 1, 1), draw(3, 4, 3, 3, seed=1), draw(7, 3, 1, 1, seed=2)
    tensors = {
        "lora_unet_conv.lora_down.weight": down,
        "lora_unet_conv.lora_mid.weight": core,
        "lora_unet_conv.lora_up.weight": up,
    }

    made, _ = resize(tmp_path, tensors, "--new_rank", "3")

    assert made.keys() == tensors.keys() - {"lora_unet_conv.lora_mid.weight"}
    full = torch.einsum("op,pqhw,qi->oihw", up[..., 0, 0], core, down[..., 0, 0])
    product = torch.einsum(
        "or,rihw->oihw",
        made["lora_unet_conv.lora_up.weight"][..., 0, 0],
        made["lora_unet_conv.lora_down.weight"],
    )
    torch.testing.assert_close(product, full, atol=1e-4, rtol=0)  # 3 directions: all that there are


# the largest first; their squares sum to 30, they sum to 10
SIZES = np.array([4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("method", "param", "rank"),
    [
        (None, None, 4),
        ("sv_ratio", 2.0, 2),  # above 4 / 2: 4 and 3
        ("sv_ratio", 2.1, 3),
        ("sv_ratio", 1.0, 1),
        ("sv_cumulative", 0.7, 2),  # 7 of 10
        ("sv_cumulative", 0.71, 3),
        ("sv_cumulative", 1.0, 4),
        # squares: 16, 25, 29, 30 of 30
        ("sv_fro", (25 / 30) ** 0.5, 2),
        ("sv_fro", (25 / 30) ** 0.5 + 1e-6, 3),
        ("sv_fro", 1.0, 4),
    ],
)
def test_rank_of_each_method(method: str | None, param: float | None, rank: int) -> None:
    assert select_rank(SIZES, 16, method, param) == rank
    assert select_rank(SIZES, 2, method, param) == min(rank, 2)


def test_each_module_has_the_rank_that_it_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = torch.eye(12)[:4]
    tensors = {
        "lora_unet_a.lora_down.weight": rows,
        "lora_unet_a.lora_up.weight": torch.eye(10)[:, :4] * torch.tensor([8.0, 4.0, 0.1, 0.01]),
        "lora_unet_a.alpha": torch.tensor(4.0),
        "lora_unet_b.lora_down.weight": rows.clone(),
        "lora_unet_b.lora_up.weight": torch.zeros(10, 4),
        "lora_unet_b.alpha": torch.tensor(4.0),
    }

    made, metadata = resize(
        *(tmp_path, tensors, "--new_rank", "8", "--dynamic_method", "sv_fro", "--dynamic_param", "0.99"),
        "--verbose",
        metadata={
            "ss_network_dim": "4",
            "ss_training_comment": "mine",
            "ss_lr": "1e-4",
            "sshs_model_hash": "0",
        },
    )

    assert made["lora_unet_a.lora_down.weight"].shape == (2, 12)
    assert made["lora_unet_a.alpha"] == 2
    assert made["lora_unet_b.lora_down.weight"].shape == (1, 12)  # it learned nothing
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_training_comment"] == "Dynamic resize with sv_fro: 0.99 from 4; mine"
    assert metadata["ss_lr"] == "1e-4"
    assert len(metadata["sshs_model_hash"]) == 64
    said = caplog.text
    kept = "sum kept 99.1%, Frobenius norm kept 100.0%, largest / smallest 2.0"
    assert f"lora_unet_a: rank 2 of 4, alpha 2, {kept}" in said
    assert "1 module, of rank 1 now" in said


def test_precision_and_comment_of_a_fixed_rank(tmp_path: Path) -> None:
    names = NAMES["sd-scripts"]
    made, metadata = resize(
        *(tmp_path, make_pair(*names), "--new_rank", "2", "--save_precision", "bf16"),
        metadata={"ss_network_dim": "6", "ss_network_alpha": "3"},
    )

    assert {made[names[0] + end].dtype for end in names[1:3]} == {torch.bfloat16}
    assert made[names[0] + names[3]].dtype == torch.float32  # 1 / 3 of it would be rounded
    assert metadata["ss_training_comment"] == "dimension is resized from 6 to 2; "
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.0")


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    plain = make_pair(*NAMES["sd-scripts"])
    others = {
        "a LoKr": {"lora_unet_x.lokr_w1": draw(2, 2), "lora_unet_x.lokr_w2": draw(2, 2)},
        "a LoHa": {"lora_unet_x.hada_w1_a": draw(2, 2)},
        "an OFT": {"lora_unet_x.oft_blocks": draw(2, 2, 2)},
        "a DoRA": {**plain, "lora_unet_x.dora_scale": draw(10, 1)},
        "DoRA": {**make_pair(*NAMES["peft"]), "base_model.model.x.lora_magnitude_vector": draw(10)},
    }
    for kind, tensors in others.items():
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=kind) as error:
            resize_lora.main(["--model", str(path), "--save_to", str(tmp_path / "out.safetensors")])
        assert "--bake" in str(error.value)


def test_ranks_that_act_by_the_noise_are_not_mixed(tmp_path: Path) -> None:
    arguments = json.dumps({"tlora": "True", "tlora_min_rank": "1"})
    with pytest.raises(
        CheckpointError, match="is a T-LoRA, whose active ranks depend on the noise level"
    ) as error:
        resize(tmp_path, make_pair(*NAMES["sd-scripts"]), metadata={"ss_network_args": arguments})
    assert "--network_dim" in str(error.value)


def test_mistakes(tmp_path: Path) -> None:
    names = NAMES["comfyui"]
    tensors = make_pair(*names)
    del tensors[names[0] + names[3]]
    save_file(tensors, tmp_path / "header.safetensors", {"ss_network_alpha": "3", "ss_network_dim": "6"})
    save_file({"x": draw(2)}, tmp_path / "none.safetensors")
    tensors[names[0] + names[2]][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    script, out = "networks/resize_lora.py", ("--save_to", "out.safetensors")
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (("--model", "header.safetensors", *out), ("ss_network_alpha", "convert_lora.py")),
        (("--model", "none.safetensors", *out), ("has no LoRA", "--model")),
        (("--model", "nan.safetensors", *out), ("NaN",)),
        (("--model", "nan.safetensors", "--save_to", "nan.safetensors"), ("--save_to",)),
        (("--model", "none.safetensors", *out, "--new_rank", "0"), ("--new_rank",)),
        (("--model", "none.safetensors", *out, "--dynamic_method", "sv_fro"), ("--dynamic_param",)),
        (("--model", "none.safetensors", *out, "--dynamic_param", "0.9"), ("--dynamic_method",)),
        (("--model", "missing.safetensors", *out), ("missing.safetensors",)),
    ]
    for words, parts in cases:
        assert_one_message(*run_here(script, *words, folder=tmp_path), *parts)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "param"), [("sv_fro", "1.5"), ("sv_cumulative", "2"), ("sv_ratio", "0.5")]
)
def test_a_number_that_its_method_cannot_have(tmp_path: Path, method: str, param: str) -> None:
    save_file(make_pair(*NAMES["sd-scripts"]), tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="--dynamic_param"):
        resize_lora.main(
            [
                *("--model", str(tmp_path / "x.safetensors"), "--save_to", str(tmp_path / "y.safetensors")),
                *("--dynamic_method", method, "--dynamic_param", param),
            ]
        )
