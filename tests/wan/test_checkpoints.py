"""Files of Wan transformers: every variant, and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.model_files import read_once
from modules.errors import CheckpointError
from protocols.loading import Placement
from tests.manifests import TensorList, manifest_names, tensor_list, write_hollow
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import check_task, identify, load_dit, log_task_differences, read_dit_header
from wan.configs import TASKS

META = Placement(torch.device("meta"))
FULL_SIZE = [name for name in manifest_names("wan2.") if "vae" not in name]
RUNNABLE = [name for name in FULL_SIZE if "camera" not in name]


@pytest.mark.parametrize("name", RUNNABLE)
def test_published_files_of_full_size_load_without_leftovers(tmp_path: Path, name: str) -> None:
    tensors = tensor_list(name)

    dit = load_dit(write_hollow(tmp_path / "dit.safetensors", tensors), META)

    assert sum(weight.numel() for weight in dit.parameters()) == sum(
        torch.Size(shape).numel() for _, shape in tensors.values()
    )
    parts = {
        "fun-a14b-control": "fun-control-2.2",
        "control": "fun-control",
        "flf2v": "flf2v",
        "ti2v": "ti2v",
        "i2v-a14b": "i2v-2.2",
        "t2v": "t2v",
        "": "i2v",
    }
    assert dit.config.kind == next(kind for part, kind in parts.items() if part in name)
    assert dit.config.dim == (1536 if "1.3b" in name else 3072 if "5b" in name else 5120)
    assert dit.config.num_heads == dit.config.dim // 128


@pytest.mark.parametrize("name", [name for name in FULL_SIZE if "camera" in name])
def test_camera_control_of_full_size_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"camera control\), which is not supported"):
        load_dit(write_hollow(tmp_path / "dit.safetensors", tensor_list(name)), META)


def _relative(in_dim: int, out_dim: int = 16, camera: bool = False) -> TensorList:
    """A Wan2.2 file: no image attention."""
    state = tiny_state("camera" if camera else "t2v", in_dim=in_dim, out_dim=out_dim, has_image=False)
    return {name: ("F32", tuple(tensor.shape)) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (_relative(36, camera=True), "Wan2.2 Fun-Control-Camera"),
        (_relative(16) | {"casual_audio_encoder.weights": ("F32", (1, 25, 1, 1))}, "Wan2.2 S2V"),
        (_relative(36) | {"face_adapter.fuser_blocks.0.k_norm.weight": ("F32", (128,))}, "Wan2.2 Animate"),
        (_relative(20), "an unknown variant of Wan with 20 input channels"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path: Path, tensors: TensorList, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"is {name}.*not supported") as caught:
        read_once(write_hollow(tmp_path / "dit.safetensors", tensors), read_dit_header)

    assert ("--task" in str(caught.value)) != ("unknown" in name), "what to use instead"


IMAGE = "img_emb, the projection of image features, is"
ALIKE = "Use --task t2v-14B or t2v-1.3B or t2v-A14B (their files have the same tensors), or pass a Wan2.1 I2V"


@pytest.mark.parametrize(
    ("kind", "task", "difference", "advice"),
    [
        (
            "i2v",
            "t2v-14B",
            "takes 36 input channels, t2v-14B has 16",
            "--task i2v-14B, or pass a Wan T2V",
        ),
        ("t2v", "i2v-14B", "takes 16 input channels, i2v-14B has 36", f"{ALIKE} checkpoint"),
        ("i2v", "i2v-A14B", f"{IMAGE} present; i2v-A14B has none", "i2v-14B, or pass a Wan2.2 I2V"),
        (
            "i2v-2.2",
            "i2v-14B",
            f"{IMAGE} missing; i2v-14B has one",
            "--task i2v-A14B, or pass a Wan2.1 I2V",
        ),
        (
            "fun-control-2.2",
            "i2v-A14B",
            "52 input channels, i2v-A14B has 36",
            "t2v-A14B-FC or i2v-A14B-FC",
        ),
        ("ti2v", "t2v-1.3B-FC", f"{IMAGE} missing", "ti2v-5B, or pass a"),
        ("fun-control", "t2v-1.3B", "takes 48 input", "t2v-1.3B-FC or t2v-14B-FC or i2v-14B-FC, or"),
        ("flf2v", "i2v-14B", "img_emb.emb_pos has positions for two images", "Use --task flf2v-14B"),
        (
            "i2v",
            "flf2v-14B",
            "img_emb.emb_pos, by which flf2v-14B distinguishes two images, is missing",
            "Use --task i2v-14B",
        ),
        ("t2v", "i2v-14B-FC", "takes 16 input channels, i2v-14B-FC has 48", "pass a Wan2.1 Fun-Control"),
    ],
)
def test_another_kind_than_the_task_is_an_error_that_names_the_right_task(
    tmp_path: Path, kind: str, task: str, difference: str, advice: str
) -> None:
    path = write_dit(tmp_path, tiny_state(kind))

    with pytest.raises(CheckpointError) as caught:
        check_task(read_once(path, read_dit_header), TASKS[task], path)

    first, second, third = str(caught.value).splitlines()
    assert first == f"{path} does not fit --task {task}:"
    assert difference in second
    assert advice in third


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("t2v", "t2v-14B"),
        ("t2v", "t2i-14B"),
        ("fun-control", "i2v-14B-FC"),
        ("fun-control-v1.1", "t2v-1.3B-FC"),
    ],
)
def test_another_size_of_the_right_kind_is_used_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, task: str
) -> None:
    path = write_dit(tmp_path, tiny_state(kind))

    with caplog.at_level(logging.INFO):
        check_task(read_once(path, read_dit_header), TASKS[task], path)
        log_task_differences(read_once(path, read_dit_header), TASKS[task], path)

    assert [record.message for record in caplog.records] == [
        f"wan.safetensors has 2 blocks of width 128, the released {task} has width {TASKS[task].dim}: the "
        "file is used as it is"
    ]


def test_the_log_says_that_the_task_decides_where_the_tensors_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_hollow(tmp_path / "low.safetensors", tensor_list("wan2.2-t2v-a14b"))

    with caplog.at_level(logging.INFO):
        log_task_differences(read_once(path, read_dit_header), TASKS["t2v-A14B"], path)

    assert [record.message for record in caplog.records] == [
        "low.safetensors is used as Wan2.2 t2v-A14B, as --task says: a file of t2v-14B has the same tensors"
    ]


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_a_large_file_that_stays_in_float32_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: torch.dtype
) -> None:
    path = write_hollow(tmp_path / "high.safetensors", tensor_list("wan2.2-i2v-a14b"))

    log_task_differences(read_once(path, read_dit_header), TASKS["i2v-A14B"], path, target)

    assert ("--dit_dtype bfloat16 to convert it" in caplog.text) == (target == torch.float32)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    """Transformers: tests/test_all_checkpoints.py."""
    vae, other, siglip = (tmp_path / f"{name}.safetensors" for name in ("vae", "other", "siglip"))
    save_file({"decoder.upsamples.0.residual.2.weight": torch.zeros(1)}, vae)
    save_file({"x": torch.zeros(1)}, other)
    patches = "vision_model.embeddings.patch_embedding"
    save_file({f"{patches}.{name}": torch.zeros(1) for name in ("weight", "bias")}, siglip)

    assert identify(siglip) == "it looks like a SigLIP image encoder (--image_encoder)"
    assert identify(vae) == "it looks like a Wan2.1 VAE (--vae)"
    assert identify(other) is None
    assert identify(tmp_path / "nothing.safetensors") is None


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("decoder.upsamples.0.upsamples.0.residual.2.weight", "VAE of Wan2.2 TI2V-5B"),
        ("blocks.0.pos_embedding.embedding.weight", "umT5"),
        ("diffusion_model.blocks.0.ffn.0.lora_A.weight", "LoRA"),
        ("lora_unet_blocks_0_ffn_0.lora_down.weight", "LoRA"),
        ("double_blocks.0.img_attn_qkv.weight", "HunyuanVideo"),
        ("something.weight", "an unknown model with tensors such as something.weight"),
    ],
)
def test_a_file_of_another_network_is_refused_with_what_it_looks_like(
    tmp_path: Path, tensor: str, what: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({tensor: torch.zeros(2)}, path)

    with pytest.raises(CheckpointError, match=f"is not a Wan transformer.*{what}") as caught:
        read_once(path, read_dit_header)

    assert caught.value.path == path


def test_a_width_that_no_head_of_128_divides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="width 96 is not a multiple of 128"):
        read_once(write_dit(tmp_path, tiny_state("t2v", dim=96)), read_dit_header)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("img_emb.emb_pos", (5,)),
        ("vace_patch_embedding.weight", (5,)),
        ("head.head.weight", ()),
        ("time_embedding.0.weight", (3,)),
        ("patch_embedding.weight", (128, 16, 1, 0, 2)),
    ],
)
def test_a_weight_of_a_shape_that_no_model_has_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    state = {**tiny_state("t2v"), name: torch.zeros(shape)}

    with pytest.raises(CheckpointError, match=f"does not fit Wan: {name} is "):
        read_once(write_dit(tmp_path, state), read_dit_header)
