"""What the HunyuanVideo description asks of requests and caches, and what it gives the transformer."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from generation.denoise import SeededNoise
from hunyuan_model import vae as hunyuan_vae
from hunyuan_model.family import HunyuanVideo
from hunyuan_model.files import HunyuanFiles
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from protocols.data import Batch, MediaTable
from protocols.loading import Placement
from protocols.requests import Request
from protocols.steps import EncodedPrompts
from tests.preparing import prepare
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.hunyuan_dit import tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM
from tests.tiny.project import write_image

CPU = torch.device("cpu")
FamilyOf = Callable[..., HunyuanVideo]
REQUEST = Request(
    "a cat", 3, width=48, height=32, frames=9, steps=2, flow_shift=7.0, solver="euler", embedded_guidance=6.0
)


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    root = tmp_path_factory.mktemp("hunyuan")
    made: dict[tuple[str, torch.dtype], HunyuanFiles] = {}

    def make(kind: str = "t2v", dtype: torch.dtype = torch.float32, **settings: object) -> HunyuanVideo:
        if (kind, dtype) not in made:
            files = write_tiny_hunyuan(root / f"{kind} {dtype}", kind, dtype)
            made[kind, dtype] = HunyuanFiles(
                files.dit, vae=files.vae, text_encoder1=files.text_encoder1, text_encoder2=files.text_encoder2
            )
        files_there = replace(made[kind, dtype], dit_dtype=settings.pop("dit_dtype", None))
        return HunyuanVideo(files_there, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_image(tmp_path / "start.png", 48, 32)
    return tmp_path / "start.png"


def batch(**tensors: Tensor) -> Batch:
    text = {
        "llm": torch.zeros(1, 256, 128),
        "llm_mask": torch.ones(1, 256),
        "clipL": torch.zeros(1, 64),
        "clipL_mask": torch.ones(1, 77),
    }
    return Batch({**text, **tensors}, ("a cat",), ("clip 0",))


class Seen(nn.Module):
    """Keeps what it is called with."""

    def forward(self, noisy: Tensor, timesteps: Tensor, guidance: Tensor, **_: object) -> Tensor:
        self.numbers = (float(timesteps), float(guidance))
        return noisy[:, :16]


# requests


def test_what_is_not_said_is_the_releases_default(family_of: FamilyOf) -> None:
    request = family_of().prepare(Request("a cat", 1))

    assert (request.width, request.height, request.frames) == (256, 256, 129)
    assert (request.steps, request.guidance_scale, request.embedded_guidance, request.flow_shift) == (
        50,
        (1.0,),
        6.0,
        7.0,
    )
    assert (request.solver, request.fps, request.negative_prompt) == ("euler", 24.0, "")


def test_an_undistilled_model_has_no_embedded_guidance(family_of: FamilyOf) -> None:
    assert family_of("undistilled").prepare(replace(REQUEST, embedded_guidance=6.0)).embedded_guidance is None


def test_image_to_video_asks_for_an_image_and_text_to_video_ignores_one(
    family_of: FamilyOf, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OptionError, match="--image_path is missing"):
        family_of("i2v").prepare(REQUEST)
    with caplog.at_level(logging.WARNING):
        request = family_of().prepare(replace(REQUEST, image_path=picture))
    assert "--image_path" in caplog.text
    assert request.request.image_path is None


def test_an_embedded_guidance_that_the_model_has_no_input_for_is_said_to_be_ignored(
    family_of: FamilyOf, caplog: pytest.LogCaptureFixture
) -> None:
    family_of("undistilled").prepare(REQUEST)  # 6 is what the script gives unasked
    family_of().prepare(replace(REQUEST, embedded_guidance=3.0))
    assert "ignored" not in caplog.text
    family_of("undistilled").prepare(replace(REQUEST, embedded_guidance=3.0))
    assert "the embedded guidance 3 (--embedded_cfg_scale) is ignored" in caplog.text


@pytest.mark.parametrize(
    ("width", "option"), [("text_dim", "--text_encoder1"), ("pooled_dim", "--text_encoder2")]
)
def test_text_encoders_of_another_size_are_refused_before_anything_is_loaded(
    family_of: FamilyOf, tmp_path: Path, width: str, option: str
) -> None:
    """As Llama 3.2 3B, or the larger CLIP of SDXL."""
    widths = {"text_dim": LLM_DIM, "pooled_dim": CLIP_DIM} | {width: 96}
    files = replace(family_of().files, dit=write_dit(tmp_path, tiny_state("t2v", **widths)))
    with pytest.raises(
        CheckpointError, match=rf"{option} .* hidden states of width .* takes width 96\. Pass"
    ):
        HunyuanVideo(files).prepare(REQUEST)


def test_channels_that_the_file_does_not_have_are_refused(family_of: FamilyOf) -> None:
    for kind, wrong in (("t2v", 32), ("i2v", 16)):
        assert family_of(kind, dit_channels=48 - wrong).dit_files
        with pytest.raises(OptionError, match=f"--dit_in_channels {wrong}: .* takes {48 - wrong}"):
            _ = family_of(kind, dit_channels=wrong).dit_files


# generation


def text() -> dict[str, Tensor | list[Tensor]]:
    return {
        "llm": torch.zeros(256, 128),
        "llm_mask": torch.ones(256, dtype=torch.int64),
        "clipL": torch.zeros(64),
    }


def test_generation_rounds_timestep_and_guidance_as_the_model_computes_and_training_does_not(
    family_of: FamilyOf,
) -> None:
    family, dit = family_of(dtype=torch.bfloat16), Seen()
    section = next(family.sections(prepare(REQUEST), {0: EncodedPrompts(text())}, {}, SeededNoise(3, CPU)))
    noisy, timesteps = torch.zeros(1, 16, 3, 4, 6), torch.tensor([965.5172])

    family.predict(dit, noisy, timesteps, section.positive)
    assert dit.numbers == (964.0, 6016.0)

    family.predict(dit, noisy, timesteps, family.batch_conditions(noisy, batch()))
    assert dit.numbers == (float(timesteps), 1.0)


def test_a_float32_transformer_has_everything_in_float32(family_of: FamilyOf) -> None:
    def dtypes(family: HunyuanVideo) -> set[torch.dtype]:
        vae = family.media_encoders(CPU).vae
        return {vae.dtype, *(encoder.dtype for encoder in family.text_encoders())}  # type: ignore[attr-defined]

    assert dtypes(family_of()) == {torch.float32}
    assert dtypes(family_of(dtype=torch.bfloat16)) == {torch.float16}
    assert dtypes(family_of(dit_dtype=torch.bfloat16)) == {torch.float16}
    family = family_of()
    asked = replace(family.files, vae_dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    assert dtypes(replace(family, files=asked)) == {torch.bfloat16}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [None, torch.float16])
@pytest.mark.parametrize("placement", [Placement(CPU), Placement(CPU, storage_dtype=torch.float32)])
def test_what_it_will_compute_in_is_known_before_it_is_loaded(
    family_of: FamilyOf, stored: torch.dtype, chosen: torch.dtype | None, placement: Placement
) -> None:
    family = family_of(dtype=stored, dit_dtype=chosen)
    dtype = family.compute_dtype(placement)
    assert family.load_dit(placement).get_parameter("double_blocks.0.img_attn_qkv.weight").dtype == dtype


# SkyReels image-to-video


def test_without_it_the_first_frame_of_the_latents_does_with_one_notice(
    family_of: FamilyOf, caplog: pytest.LogCaptureFixture
) -> None:
    hunyuan_vae._note_missing_image.cache_clear()
    latents = torch.randn(1, 16, 3, 4, 4)

    for _ in range(2):
        condition = family_of("i2v").batch_conditions(latents, batch())["condition_latents"]

    assert isinstance(condition, Tensor)
    assert torch.equal(condition[:, :, 0], latents[:, :, 0])
    assert not condition[:, :, 1:].any()
    assert caplog.text.count("cache_latents.py --i2v") == 1


def test_a_batch_without_one_of_the_texts_names_the_command(family_of: FamilyOf) -> None:
    half = batch()
    with pytest.raises(CacheError, match=r"no clipL,.*cache_text_encoder_outputs.py"):
        family_of().batch_conditions(
            torch.zeros(1, 16, 1, 4, 4),
            replace(half, tensors={name: t for name, t in half.tensors.items() if name != "clipL"}),
        )


@pytest.mark.parametrize(("name", "wide"), [("llm", torch.zeros(1, 256, 96)), ("clipL", torch.zeros(1, 96))])
def test_texts_of_another_encoder_name_the_command(family_of: FamilyOf, name: str, wide: Tensor) -> None:
    with pytest.raises(CacheError, match=rf"{name} in its cache has width 96.*cache_text_encoder_outputs.py"):
        family_of().batch_conditions(torch.zeros(1, 16, 1, 4, 4), batch(**{name: wide}))


def test_the_caching_command_is_that_for_the_transformer(family_of: FamilyOf) -> None:
    assert family_of().caching_switches == ()
    assert family_of("i2v").caching_switches == ("--i2v",)
    assert HunyuanVideo(HunyuanFiles()).caching_switches == ()  # --show_timesteps does without a transformer


def test_control_videos_are_refused(family_of: FamilyOf) -> None:
    family_of().check_table(MediaTable("data.toml"))
    with pytest.raises(DatasetError, match="data.toml: .*control_directory"):
        family_of().check_table(MediaTable("data.toml", has_control=True))
