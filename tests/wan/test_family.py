"""What the Wan2.1 description asks of a request before anything is loaded."""

import gc
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import filling
from generation.options import read_generation
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from protocols.data import Batch, MediaTable
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.loading import Placement
from protocols.requests import Request
from protocols.rules import infer_expert_from_path
from tests.tiny.project import write_image
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.configs import TASKS, default_flow_shift
from wan.family import Wan
from wan.files import WanFiles, add_release, check_expert_file_names, files_and_boundary, read_release
from wan.inputs import appends_end
from wan.model import WanModel
from wan.names import WAN
from wan.options import WanGenerationOptions
from wan.spec import LATENT, LATENT_5B
from wan_generate_video import DEFAULTS

CPU = torch.device("cpu")
FamilyOf = Callable[..., Wan]


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    root = tmp_path_factory.mktemp("wan")

    def make(task: str, kind: str, with_clip: bool = True) -> Wan:
        if not (root / kind).exists():
            write_tiny_wan(root / kind, kind)
        paths = {name: root / kind / f"{name}.safetensors" for name in ("dit", "vae", "t5", "clip")}
        files = WanFiles(**paths, task=TASKS[task])  # type: ignore[arg-type]
        return Wan(files if with_clip else replace(files, clip=None))

    return make


def computing_in(family: Wan, dtype: torch.dtype | None) -> Wan:
    return replace(family, files=replace(family.files, dit_dtype=dtype))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_image(tmp_path / "start.png", 128, 64)
    return tmp_path / "start.png"


@pytest.mark.parametrize(
    ("task", "size", "shift"),
    [
        ("t2v-14B", (832, 480), 5.0),
        ("i2v-14B", (832, 480), 3.0),
        ("i2v-14B", (480, 832), 3.0),
        ("i2v-14B", (1280, 720), 5.0),
        ("i2v-14B-FC", (832, 480), 3.0),
        ("flf2v-14B", (1280, 720), 16.0),
    ],
)
def test_the_flow_shift_is_that_of_the_release(task: str, size: tuple[int, int], shift: float) -> None:
    assert default_flow_shift(TASKS[task], *size) == shift


def test_the_flow_shift_goes_by_the_size_asked_for_not_by_the_image(
    family_of: FamilyOf, picture: Path
) -> None:
    request = family_of("i2v-14B", "i2v").prepare(Request("p", 0, width=832, height=480, image_path=picture))
    assert (request.width, request.height) == (880, 432)
    assert request.flow_shift == 3.0


@pytest.mark.parametrize(("task", "kind"), [("i2v-14B", "i2v"), ("i2v-14B-FC", "fun-control")])
def test_image_to_video_asks_for_the_image_encoder(
    family_of: FamilyOf, picture: Path, task: str, kind: str
) -> None:
    family = family_of(task, kind, with_clip=False)
    with pytest.raises(OptionError, match="--clip is missing"):
        family.prepare(Request("p", 0, image_path=picture, control_path=picture))


def test_a_missing_image_is_named_with_its_option(family_of: FamilyOf, picture: Path) -> None:
    with pytest.raises(OptionError, match=r"--end_image_path .*no\.png: no such file"):
        family_of("i2v-14B", "i2v").prepare(
            Request("p", 0, image_path=picture, end_image_path=picture.with_name("no.png"))
        )


def test_an_image_that_the_task_does_not_take_is_ignored_with_a_warning(
    family_of: FamilyOf, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        family_of("t2v-1.3B", "t2v").prepare(Request("p", 0, image_path=Path("gone.png")))
    assert "--image_path gone.png is ignored" in caplog.text


@pytest.mark.parametrize("chosen", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("placement", [Placement(CPU), Placement(CPU, storage_dtype=torch.float16)])
def test_dit_dtype_is_what_it_computes_in_unless_the_caller_asks(
    family_of: FamilyOf, chosen: torch.dtype | None, placement: Placement
) -> None:
    family = computing_in(family_of("t2v-14B", "t2v"), chosen)
    dit = family.load_dit(placement)
    assert isinstance(dit, WanModel)
    wanted = placement.storage_dtype or chosen or torch.float32
    assert dit.compute_dtype == family.compute_dtype(placement) == wanted
    assert dit.get_parameter("head.head.weight").dtype == torch.float32, "always"


def test_the_vae_computes_as_the_transformer_does(family_of: FamilyOf) -> None:
    family = computing_in(family_of("t2v-14B", "t2v"), torch.bfloat16)
    assert family.media_encoders(CPU).vae.dtype == torch.bfloat16


def weights_in_memory() -> int:
    """Bytes of all tensors on the CPU that Python can walk through; memory that several share counts once."""
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.device == CPU]
    return sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values()
    )


def test_a_float32_file_is_never_in_memory_as_float32(
    family_of: FamilyOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at every tensor that is read: at most the network in 16 bits, and room for one tensor of 32."""
    peak, check = 0, filling.is_finite

    def look(tensor: Tensor) -> Tensor:
        nonlocal peak
        peak = max(peak, weights_in_memory())
        return check(tensor)

    monkeypatch.setattr(filling, "is_finite", look)
    before = weights_in_memory()
    family = computing_in(family_of("t2v-14B", "t2v"), torch.bfloat16)
    weights = list(family.load_dit(Placement(CPU)).parameters())
    largest = 4 * max(weight.numel() for weight in weights) + 64  # with what aligns the buffer for reading
    allowed = sum(weight.nbytes for weight in weights) + largest
    assert 0.8 * allowed < peak - before <= allowed

    computing_in(family, None).load_dit(Placement(CPU))
    assert peak - before > 1.3 * allowed, "a file that stays in float32 is seen"


@pytest.mark.parametrize(
    ("task", "kind", "frames"), [("i2v-14B", "i2v", 1), ("i2v-A14B", "i2v-2.2", 0), ("flf2v-14B", "flf2v", 0)]
)
def test_an_end_image_is_one_more_latent_frame_or_the_last_of_the_clip(
    family_of: FamilyOf, picture: Path, task: str, kind: str, frames: int
) -> None:
    """Of Wan2.2 as in diffusers' pipeline: the last of the clip."""
    request = Request("p", 0, image_path=picture, end_image_path=picture)
    assert appends_end(TASKS[task], family_of(task, kind).prepare(request).request) == bool(frames)


def test_experts_of_different_sizes_are_refused(family_of: FamilyOf, tmp_path: Path) -> None:
    files = replace(
        family_of("t2v-A14B", "t2v").files,
        dit_high_noise=write_dit(tmp_path, tiny_state("t2v", num_layers=3)),
    )
    with pytest.raises(CheckpointError, match=r"--dit_high_noise (?s:.*) 3 blocks .* other has 2 "):
        files.check_dits()


def test_a_high_noise_file_of_another_task_is_named_with_its_option(
    family_of: FamilyOf, tmp_path: Path
) -> None:
    high = write_dit(tmp_path, tiny_state("i2v-2.2"))
    files = replace(family_of("t2v-A14B", "t2v").files, dit_high_noise=high)
    with pytest.raises(CheckpointError, match=r"i2v-A14B, or pass a Wan T2V .* to --dit_high_noise"):
        files.check_dits()


@pytest.mark.parametrize("task", ["t2v-A14B-FC", "i2v-A14B-FC"])
def test_fun_control_is_trained_with_control_mask_and_image(family_of: FamilyOf, task: str) -> None:
    control, image = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 20, 2, 4, 4)
    tensors = {"t5": [torch.zeros(3, 32)], "latents_control": control, "latents_image": image}
    batch = Batch(tensors, ("a cat",), ("one",))

    conditions = family_of(task, "fun-control-2.2").batch_conditions(torch.zeros(1, 16, 2, 4, 4), batch)

    expected = torch.cat([control, image if task.startswith("i2v") else torch.zeros_like(image)], dim=1)
    assert torch.equal(conditions["condition_latents"], expected)  # type: ignore[arg-type]
    assert conditions.keys() == {"t5", "condition_latents"}


def test_features_that_a_task_lacks_are_zeros_where_the_latents_are(family_of: FamilyOf) -> None:
    tensors = {"t5": [torch.zeros(3, 32)], "latents_control": torch.zeros(1, 16, 2, 4, 4)}
    latents = torch.zeros(1, 16, 2, 4, 4, device="meta")

    conditions = family_of("t2v-1.3B-FC", "fun-control").batch_conditions(
        latents, Batch(tensors, ("",), ("",))
    )

    assert conditions["clip"].device == latents.device  # type: ignore[union-attr]


def test_fun_control_names_what_its_cache_lacks(family_of: FamilyOf) -> None:
    batch = Batch({"t5": [torch.zeros(3, 32)], "latents_control": torch.zeros(1)}, ("a cat",), ("one",))
    with pytest.raises(CacheError, match="no latents_image.*i2v-A14B-FC.*wan_cache_latents.py --i2v"):
        family_of("i2v-A14B-FC", "fun-control-2.2").batch_conditions(torch.zeros(1, 16, 2, 4, 4), batch)


def test_a_table_with_several_control_images_for_one_item_is_refused(family_of: FamilyOf) -> None:
    family = family_of("t2v-1.3B", "t2v")
    family.check_table(MediaTable("data.toml", "image", has_control=True, clean_indices=(0,)))
    family.check_table(MediaTable("data.toml", "image", clean_indices=(0, 10)))  # there are none
    with pytest.raises(
        DatasetError, match=r"^data\.toml: Wan uses one control.* fp_1f_clean_indices asks for 2"
    ):
        family.check_table(MediaTable("data.toml", "image", has_control=True, clean_indices=(0, 10)))


def make(folder: Path, *names: str) -> Path:
    """Empty files, and folders for names that end in a slash."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return folder


OFFICIAL = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/")


def test_a_release_of_a14b_has_both_transformers(tmp_path: Path) -> None:
    folder = make(tmp_path, *OFFICIAL, "Wan2.1_VAE.pth", "low_noise_model/", "high_noise_model/")

    files, boundary = read_release(folder, LATENT)

    assert boundary is None, "the task's"
    assert files == {
        "dit": folder / "low_noise_model",
        "dit_high_noise": folder / "high_noise_model",
        "vae": folder / "Wan2.1_VAE.pth",
        "t5": folder / OFFICIAL[0],
        "t5_tokenizer": folder / "google/umt5-xxl",
    }


def test_a_release_of_5b_has_its_own_vae_and_one_transformer(tmp_path: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    folder = make(tmp_path, *OFFICIAL, *shards, "Wan2.2_VAE.pth")

    files, _ = read_release(folder, LATENT_5B)

    assert files["dit"] == folder
    assert files["vae"] == folder / "Wan2.2_VAE.pth"
    assert "dit_high_noise" not in files


@pytest.mark.parametrize("has_experts", [True, False])
def test_the_second_transformer_of_a_pipeline_is_for_little_noise(tmp_path: Path, has_experts: bool) -> None:
    parts = ("vae/", "text_encoder/", "tokenizer/", "transformer/")
    folder = make(tmp_path, *parts, *(("transformer_2/",) if has_experts else ()))
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.7}), encoding="utf-8")

    files, boundary = read_release(folder, LATENT)

    assert boundary == (700.0 if has_experts else None)
    assert files == dict(
        dit=folder / ("transformer_2" if has_experts else "transformer"),
        **({"dit_high_noise": folder / "transformer"} if has_experts else {}),
        vae=folder / "vae",
        t5=folder / "text_encoder",
        t5_tokenizer=folder / "tokenizer",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"boundary_ratio": 875}', "boundary_ratio .* is 875, not a noise level"),
        ('{"boundary_ratio": "__import__"}', "boundary_ratio .* is '__import__', not a noise level"),
        ('{"boundary_ratio": true}', "boundary_ratio .* is True, not a noise level"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    (make(tmp_path, "transformer_2/") / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"--ckpt_dir: .*{message}"):
        read_release(tmp_path, LATENT)


def test_files_that_are_given_go_first_and_dit_alone_stays_alone() -> None:
    release = {"dit": Path("low"), "dit_high_noise": Path("high")}
    release |= {"vae": Path("release/vae"), "t5": Path("release/t5")}
    assert add_release(WanFiles(vae=Path("mine")), release) == WanFiles(
        dit=Path("low"), dit_high_noise=Path("high"), vae=Path("mine"), t5=Path("release/t5")
    )
    assert add_release(WanFiles(dit=Path("one")), release).dit_high_noise is None
    both = add_release(WanFiles(dit_high_noise=Path("mine")), release)
    assert (both.dit, both.dit_high_noise) == (Path("low"), Path("mine"))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", HIGH_NOISE),
        ("wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors", LOW_NOISE),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled.safetensors", HIGH_NOISE),
        ("low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", LOW_NOISE),
        ("HighNoise.safetensors", HIGH_NOISE),
        ("highres-lowlight.safetensors", None),
        ("high_and_low.safetensors", None),
        ("transformer", None),
        ("pipeline/transformer", HIGH_NOISE),
        ("pipeline/transformer_2", LOW_NOISE),
    ],
)
def test_a_name_says_which_expert_a_file_is(tmp_path: Path, name: str, expert: str | None) -> None:
    make(tmp_path, "pipeline/transformer/", "pipeline/transformer_2/", "transformer/")
    assert infer_expert_from_path(tmp_path / name, dict(WAN.experts)) == expert


def test_swapped_files_are_refused() -> None:
    with pytest.raises(OptionError, match="swap the two"):
        check_expert_file_names(Path("a_high_noise.safetensors"), Path("a_low_noise.safetensors"))


@pytest.mark.parametrize(
    ("dit", "high", "message"),
    [
        ("a_high_noise.st", None, "--dit a_high_noise.st is used for all noise levels, but .* high noise"),
        (
            None,
            "a_low_noise.st",
            "--dit_high_noise a_low_noise.st is used for high noise, but .* low noise",
        ),
        ("a_high_noise.st", "b.st", "--dit a_high_noise.st is used for low noise"),
        ("a.st", "a.st", "are the same file"),
        ("a_low_noise.st", "a_high_noise.st", None),
        ("a_low_noise.st", None, None),
    ],
)
def test_one_name_that_contradicts_its_option_is_a_warning(
    caplog: pytest.LogCaptureFixture, dit: str | None, high: str | None, message: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        check_expert_file_names(None if dit is None else Path(dit), None if high is None else Path(high))
    if message is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert re.search(message, record.message)


def test_a_boundary_without_a_second_transformer_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where --ckpt_dir might have had one."""
    words = ["--save_path", "made", "--task", "t2v-A14B", "--dit", "one.st", "--timestep_boundary", "0.5"]
    words += ["--prompt", "a cat"]
    with caplog.at_level(logging.WARNING):
        _, options = read_generation(None, DEFAULTS, WanGenerationOptions, words)
        assert not caplog.records  # the folder is not looked at yet
        files_and_boundary(options)
    assert caplog.text.count("--timestep_boundary is ignored because there is no --dit_high_noise") == 1
    assert caplog.text.count("is ignored") == 1


def test_text_tokens_in_place_of_image_features_are_of_fun_control_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = [
        "--save_path",
        "made",
        "--dit",
        "one.st",
        "--prompt",
        "a cat",
        "--text_as_image_tokens",
        "--task",
    ]
    for task, is_ignored in (("t2v-1.3B", True), ("t2v-1.3B-FC", False)):
        caplog.clear()
        read_generation(None, DEFAULTS, WanGenerationOptions, [*words, task])
        assert ("--text_as_image_tokens is ignored" in caplog.text) == is_ignored
