"""minimax_h3_cache_text_encoder_outputs.py against transformers, from files on disk."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.stored.int8 import FEW_TOKENS
from minimax_h3.cache_marks import FORMAT, KEY, TAGS, read_empty_prompt
from minimax_h3.cached_texts import H3CachingEncoder, describe_copy, describe_subjects
from minimax_h3.files import H3_USE, LAYERS, H3TextEncoder
from minimax_h3.presentation import present_clip, present_image, present_keyframes
from modules.errors import CacheError
from modules.media.writing import write_png, write_video
from protocols.requests import Prompt
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.packing import pack_file
from tests.tiny.language_models import write_qwen_tokenizer
from tests.tiny.minimax_h3 import TinyH3, text_encoder, write_tiny_h3
from tests.tiny.project import CAPTIONS, moving_square, write_clips, write_dataset

SCRIPT = "minimax_h3_cache_text_encoder_outputs.py"
STATES, TAG_ROWS = f"varlen_{KEY}_float32", f"varlen_{TAGS}_int64"
SPOKEN = "a cat says <d>[English] hello</d>"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3") / "model ä")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two clips with captions."""
    write_clips(tmp_path / "clips", count=2, frames=5)
    write_dataset(tmp_path, frames=5)
    (tmp_path / "clips" / "clip 1.txt").write_text(SPOKEN, encoding="utf-8")
    return tmp_path


def words_of(files: TinyH3) -> list[str]:
    texts = ["--text_encoder", str(files.text_encoder), "--tokenizer", str(files.tokenizer)]
    return ["--dataset_config", "dataset.toml", *texts, "--device", "cpu"]


def cache(folder: Path, files: TinyH3, *words: str) -> str:
    """Cache in float32."""
    return succeed_here(SCRIPT, *words_of(files), "--text_encoder_dtype", "float32", *words, folder=folder)


def reject(folder: Path, files: TinyH3, *words: str) -> str:
    code, said = run_here(SCRIPT, *words_of(files), *words, folder=folder)
    return assert_one_message(code, said)


def expected_states(files: TinyH3, text: str, model: Any = None) -> Tensor:
    """transformers' states behind layer 50, which no norm has touched: the model has 51 layers."""
    ids = Tokenizer.from_file(str(files.tokenizer / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        output = (model or text_encoder()).model.language_model(
            torch.tensor([ids]), output_hidden_states=True, use_cache=False
        )
    states: Tensor = output.hidden_states[LAYERS][0]
    return states


def text_cache(folder: Path, clip: int = 0) -> dict[str, Tensor]:
    return load_file(folder / "cache" / f"clip {clip}_mmh3_te.safetensors")


def marks(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


def test_states_of_verbatim_captions_are_those_of_transformers(project: Path, files: TinyH3) -> None:
    cache(project, files)

    for clip, caption in enumerate((CAPTIONS[0], SPOKEN)):
        made = text_cache(project, clip)
        assert made.keys() == {STATES, TAG_ROWS}
        expected = expected_states(files, caption)
        torch.testing.assert_close(made[STATES], expected, atol=1e-5, rtol=1e-5)
        assert made[TAG_ROWS].tolist() == [1] * len(expected)
    metadata = marks(project / "cache" / "clip 0_mmh3_te.safetensors")
    assert metadata["task"] == "t2va"
    assert metadata["cache_format"] == FORMAT
    assert metadata["presentation_fingerprint"].startswith("sha256:")


def test_a_stack_that_is_cut_to_50_layers_gives_states_before_the_norm(tmp_path: Path, project: Path) -> None:
    """As single files are; transformers would norm the last state of it."""
    cut = write_tiny_h3(tmp_path / "cut", layers=LAYERS)

    cache(project, cut)

    made = text_cache(project)[STATES]
    # the layers of both models are drawn in turn from one seed, and their norms are no ones
    model = text_encoder(LAYERS)
    norm = model.model.language_model.norm
    normed = expected_states(cut, CAPTIONS[0], model)
    torch.testing.assert_close(norm(made), normed, atol=1e-5, rtol=1e-5)
    assert (made - normed).abs().max() > 0.1


def test_the_probe_is_a_space_in_the_format_of_the_known_tuner(project: Path, files: TinyH3) -> None:
    said = cache(project, files, "--uncond_output", "probes/empty.safetensors")

    made = load_file(project / "probes" / "empty.safetensors")
    assert made.keys() == {"hidden_states", "token_tags"}
    torch.testing.assert_close(made["hidden_states"], expected_states(files, " "), atol=1e-5, rtol=1e-5)
    assert made["token_tags"].tolist() == [1] * len(made["hidden_states"])
    metadata = marks(project / "probes" / "empty.safetensors")
    assert (metadata["cache_format"], metadata["text"]) == ("h3-uncond-probe-v1", " ")
    empty = load_file(project / "cache" / "mmh3_te.empty.safetensors")
    torch.testing.assert_close(empty[STATES], made["hidden_states"], atol=0, rtol=0)
    states, tags = read_empty_prompt(project / "probes" / "empty.safetensors")
    assert torch.equal(states, made["hidden_states"])
    assert torch.equal(tags, made["token_tags"])
    assert said.index("no rights in the USA") < said.index("Caching texts")


@pytest.mark.parametrize("option", ["--cache_guidance_empty", "--empty_prompt"])
def test_other_spellings_cache_the_probe_with_the_texts(project: Path, files: TinyH3, option: str) -> None:
    cache(project, files, option, "--uncond_text", "x")

    empty = load_file(project / "cache" / "mmh3_te.empty.safetensors")
    torch.testing.assert_close(empty[STATES], expected_states(files, "x"), atol=1e-5, rtol=1e-5)
    assert not [*project.glob("*.safetensors")]


def test_a_file_that_is_no_probe_is_refused(tmp_path: Path, files: TinyH3) -> None:
    with pytest.raises(CacheError, match="--uncond_output"):
        read_empty_prompt(files.dit)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CacheError, match="--uncond_output"):
        read_empty_prompt(tmp_path / "broken.safetensors")
    for states in (torch.zeros(2, 3, 4), torch.zeros(0, 4), torch.zeros(2, 4, dtype=torch.int64)):
        tensors = {"hidden_states": states, "token_tags": torch.ones(len(states), dtype=torch.int64)}
        save_file(tensors, tmp_path / "odd.safetensors", {"cache_format": "h3-uncond-probe-v1"})
        with pytest.raises(CacheError, match="not a state for each token"):
            read_empty_prompt(tmp_path / "odd.safetensors")


def test_states_are_kept_in_the_dtype_of_the_caches(project: Path, files: TinyH3) -> None:
    cache(project, files, "--text_cache_dtype", "bf16")

    made = text_cache(project)
    assert made.keys() == {f"varlen_{KEY}_bfloat16", TAG_ROWS}
    expected = expected_states(files, CAPTIONS[0]).bfloat16()
    torch.testing.assert_close(made[f"varlen_{KEY}_bfloat16"], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--task", "ref2va_omni"], ["--task ref2va"]),
        (["--task", "i2va"], ["--task fl2va"]),
        (["--task", "fl2va", "--teacher_conditions", "ref"], ["--task t2va"]),
        (["--text_encoder_quantization", "nvfp4_awq"], ["without an option"]),
        (["--text_encoder_quantization", "int8", "--text_encoder_form", "nf4"], ["--text_encoder_form"]),
        (["--text_encoder_quantization", "int8", "--fp8_vl"], ["--fp8_vl"]),
        (["--nvfp4_scaled_mm"], ["--nvfp4_scaled_mm"]),
        (["--text_encoder_attn_mode", "eager"], ["PyTorch's own"]),
        (["--uncond_text", ""], ["--uncond_text"]),
        (["--uncond_output", "probe.pt"], ["--uncond_output"]),
        (["--text_cache_dtype", "fp16"], ["--text_cache_dtype"]),
    ],
)
def test_what_cannot_be_cached_is_refused(
    project: Path, files: TinyH3, words: list[str], parts: list[str]
) -> None:
    message = reject(project, files, *words)
    assert all(part in message for part in parts), message
    assert not (project / "cache").exists()


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, project: Path, files: TinyH3) -> None:
    folder = write_qwen_tokenizer(tmp_path / "qwen")
    assert "it has no <d>" in reject(project, files, "--tokenizer", str(folder))


def test_a_cache_of_the_known_tuner_is_kept_unless_it_is_for_another_task(
    project: Path, files: TinyH3
) -> None:
    """Without a record of ours, and only with --skip_existing."""
    path = project / "cache" / "clip 0_mmh3_te.safetensors"
    path.parent.mkdir()
    states = {f"varlen_{KEY}_bfloat16": torch.ones(3, 64, dtype=torch.bfloat16)}
    tensors = {**states, TAG_ROWS: torch.tensor([1, 1, 1])}
    metadata = {"architecture": "minimax_h3", "caption1": CAPTIONS[0], "cache_format": FORMAT}
    save_file(tensors, path, {**metadata, "task": "t2va"})
    cache(project, files, "--skip_existing")
    assert load_file(path).keys() == tensors.keys()

    save_file(tensors, path, {**metadata, "task": "fl2va"})
    message = reject(project, files, "--skip_existing")
    assert "cached for --task fl2va" in message
    assert path.name in message
    save_file(tensors, path, {**metadata, "cache_format": "minimax-h3-text-v1"})
    assert "minimax-h3-text-v1" in reject(project, files, "--skip_existing")


def with_input_scales(packed: Path, plain: Path) -> None:
    """Make of nvfp4 what its AWQ files are: columns of weights that a scale of the input goes with."""
    tensors = load_file(packed)
    values = load_file(plain)
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        layer = name.removesuffix(".weight_scale_2")
        columns = values[f"{layer}.weight"].shape[1]
        scale = torch.rand(columns, generator=generator) + 0.5
        tensors[f"{layer}.pre_quant_scale"] = scale
        values[f"{layer}.weight"] *= scale
    save_file(tensors, packed)
    save_file(values, plain)


@pytest.mark.slow_cases("nvfp4", "nf4")
@pytest.mark.parametrize("form", ["convrot", "nvfp4", "nf4"])
def test_files_in_other_forms_are_read_as_they_are(tmp_path: Path, project: Path, form: str) -> None:
    """int8 ConvRot, nvfp4 with AWQ's scales of the input, and bitsandbytes' 4 bits: the same values, packed.

    A caption is so short that its tokens are not rounded.
    """
    files = write_tiny_h3(tmp_path / "packed")
    packed = pack_file(files.text_encoder, form)
    if form == "nvfp4":
        with_input_scales(packed, files.text_encoder)
    cache(project, files)
    plain = text_cache(project)[STATES]
    assert len(plain) <= FEW_TOKENS

    said = cache(project, replace(files, text_encoder=packed))

    assert re.search(r"\d+ linear layers stay in", said)
    made = text_cache(project)[STATES]
    torch.testing.assert_close(made, plain, atol=2e-4, rtol=2e-4)  # 50 layers of another order of sums


@pytest.mark.slow
@pytest.mark.parametrize(("option", "maximum"), [("int8", 0.05), ("nf4", 0.6)])
def test_layers_are_rounded_while_they_are_loaded(
    project: Path, files: TinyH3, option: str, maximum: float
) -> None:
    """Both spellings do it; the error is that of the form, which grows over 50 layers of random weights."""
    cache(project, files)
    plain = text_cache(project)[STATES]

    cache(project, files, "--text_encoder_quantization", option)

    made = text_cache(project)[STATES]
    error = (made - plain).norm() / plain.norm()
    assert 1e-4 < error < maximum
    said = cache(project, files, "--text_encoder_form", option)
    assert "0 of them to encode" in said


def first_frames(folder: Path) -> list[Tensor]:
    """The frames of the first clip as they are learned, each H W 3."""
    with av.open(str(folder / "clips" / "clip 0.mp4")) as clip:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in clip.decode(video=0)]


def presented(files: TinyH3, text: str, *shown: Any) -> tuple[Tensor, list[int]]:
    """States and tags that H3TextEncoder gives, which its own tests compare with diffusers."""
    encoder = H3TextEncoder(H3_USE, files.text_encoder, torch.float32, files.tokenizer)
    encoder.load(torch.device("cpu"))
    with torch.no_grad():
        (conditions,) = encoder.encode([Prompt(text, media_before_text=shown)])
    return conditions[KEY][0], conditions[TAGS][0].tolist()


@pytest.fixture
def large_project(project: Path) -> Path:
    """Whose sides are whole tokens."""
    path = project / "dataset.toml"
    path.write_text(re.sub(r"resolution = .*", "resolution = [64, 64]", path.read_text("utf-8")), "utf-8")
    for number in range(2):
        path = project / "clips" / f"clip {number}.mp4"
        write_video(path, moving_square(5, 64, 64, number), fps=24)
    return project


def test_keyframes_of_a_clip_are_presented(large_project: Path, files: TinyH3) -> None:
    cache(large_project, files, "--task", "fl2va")

    frames = first_frames(large_project)
    expected = presented(files, CAPTIONS[0], *present_keyframes([frames[0], frames[-1]]))
    made = text_cache(large_project)
    torch.testing.assert_close(made[STATES], expected[0], atol=1e-4, rtol=1e-4)
    assert made[TAG_ROWS].tolist() == expected[1]
    assert 0 in expected[1]
    assert marks(large_project / "cache" / "clip 0_mmh3_te.safetensors")["task"] == "fl2va"


def test_a_changed_clip_makes_its_text_stale_and_the_caption_alone_does_not(
    large_project: Path, files: TinyH3
) -> None:
    words = ["--task", "fl2va", "--empty_prompt"]
    cache(large_project, files, *words)
    before = text_cache(large_project)[STATES]
    assert "3 captions, 0 of them to encode" in cache(large_project, files, *words)
    write_video(large_project / "clips" / "clip 0.mp4", moving_square(5, 64, 64, 9), fps=24)

    assert "3 captions, 1 of them to encode" in cache(large_project, files, *words)

    assert not torch.equal(text_cache(large_project)[STATES], before)
    empty = load_file(large_project / "cache" / "mmh3_te.empty.safetensors")
    assert empty[TAG_ROWS].tolist() == [1] * len(empty[TAG_ROWS])  # nothing is shown with it


def test_a_cache_of_another_task_is_made_again(large_project: Path, files: TinyH3) -> None:
    cache(large_project, files)
    said = cache(large_project, files, "--task", "fl2va")
    assert "2 captions, 2 of them to encode" in said


def test_a_teacher_reads_first_and_last_frame(large_project: Path, files: TinyH3) -> None:
    cache(large_project, files, "--teacher_conditions", "first,last")

    made = text_cache(large_project)
    torch.testing.assert_close(made[STATES], expected_states(files, CAPTIONS[0]), atol=1e-5, rtol=1e-5)
    frames = first_frames(large_project)
    states, tags = presented(files, CAPTIONS[0], *present_keyframes([frames[0], frames[-1]]))
    rows = {"varlen_mmh3_teacher_hidden_states_float32", "varlen_mmh3_teacher_token_tags_int64"}
    assert made.keys() == {STATES, TAG_ROWS, *rows}
    torch.testing.assert_close(
        made["varlen_mmh3_teacher_hidden_states_float32"], states, atol=1e-4, rtol=1e-4
    )
    assert made["varlen_mmh3_teacher_token_tags_int64"].tolist() == tags
    metadata = marks(large_project / "cache" / "clip 0_mmh3_te.safetensors")
    assert (metadata["task"], metadata["teacher_conditions"]) == ("t2va", "first,last")
    assert "0 of them to encode" in cache(large_project, files, "--teacher_conditions", "first,last")
    cache(large_project, files)
    assert text_cache(large_project).keys() == {STATES, TAG_ROWS}  # none of an earlier caption stay
    assert not marks(large_project / "cache" / "clip 0_mmh3_te.safetensors")["teacher_conditions"]


def caching_encoder(files: TinyH3, teacher: str) -> H3CachingEncoder:
    encoder = H3CachingEncoder(H3_USE, files.text_encoder, torch.float32, files.tokenizer)
    encoder.set_task("t2va", teacher, None)
    encoder.load(torch.device("cpu"))
    return encoder


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_a_teacher_reads_the_clip_itself_with_its_sound(files: TinyH3) -> None:
    """The clip, two frames a second, and sound that it is told to copy."""
    clip = pixels(22, 64, 64)
    encoder = caching_encoder(files, "ref")
    assert encoder.abilities.encodes_clip

    with torch.no_grad():
        (made,) = encoder.encode([Prompt("a cat", clip=clip)])

    states, tags = presented(files, describe_copy("a cat"), present_clip(clip, has_audio=True))
    torch.testing.assert_close(made["mmh3_teacher_ref_hidden_states"][0], states, atol=1e-4, rtol=1e-4)
    assert made["mmh3_teacher_ref_token_tags"][0].tolist() == tags
    assert made[TAGS][0].tolist() == [1] * len(made[KEY][0])
    copied = describe_copy("a cat")
    assert "fully_copy" in copied
    assert copied.endswith("detailed_description:\na cat")


def test_a_teacher_reads_pictures_of_the_subjects(files: TinyH3) -> None:
    images = (pixels(64, 64), pixels(64, 96))
    with torch.no_grad():
        (made,) = caching_encoder(files, "subject_ref").encode(
            [Prompt("a cat", clip=pixels(1, 64, 64), image_pixels=images)]
        )

    text = describe_subjects("a cat", 2, is_still=True)
    states, tags = presented(files, text, *map(present_image, images))
    torch.testing.assert_close(
        made["mmh3_teacher_subject_ref_hidden_states"][0], states, atol=1e-4, rtol=1e-4
    )
    assert made["mmh3_teacher_subject_ref_token_tags"][0].tolist() == tags
    assert text.count("attribute_transfer") == 2
    assert "<Subject 1> and <Subject 2>" in text
    assert "a still image" in text
    assert "a video" in describe_subjects("a cat", 1, is_still=False)


def test_a_row_says_what_the_teacher_of_subjects_reads(large_project: Path, files: TinyH3) -> None:
    """`teacher_caption` is read as it is. If it changes, it is encoded again; a blank one is refused."""
    subject = pixels(64, 64)
    write_png(large_project / "subject.png", subject.numpy())
    row: dict[str, Any] = {"image_path": "subject.png", "caption": CAPTIONS[0]}
    row |= {"references": [{"type": "image", "path": "subject.png"}], "teacher_caption": SPOKEN}
    path = large_project / "dataset.toml"
    content = re.sub(r"video_directory = .*", 'image_jsonl_file = "rows.jsonl"', path.read_text("utf-8"))
    content = re.sub(r"(target_frames|frame_extraction) = .*\n", "", content)
    path.write_text(content, "utf-8")
    words = ["--teacher_conditions", "subject_ref", "--reference_image_short_edge", "64"]

    def write(teacher_caption: str) -> None:
        text = json.dumps({**row, "teacher_caption": teacher_caption})
        (large_project / "rows.jsonl").write_text(text, encoding="utf-8")

    write(SPOKEN)
    cache(large_project, files, *words)

    (cached,) = (large_project / "cache").glob("*_mmh3_te.safetensors")
    made = load_file(cached)
    states, tags = presented(files, SPOKEN, present_image(subject))
    name = "varlen_mmh3_teacher_subject_ref_hidden_states_float32"
    torch.testing.assert_close(made[name], states, atol=1e-4, rtol=1e-4)
    assert made["varlen_mmh3_teacher_subject_ref_token_tags_int64"].tolist() == tags
    expected = expected_states(files, CAPTIONS[0])
    torch.testing.assert_close(made[STATES], expected, atol=1e-5, rtol=1e-5)
    assert "1 captions, 0 of them" in cache(large_project, files, *words)
    write("another text")
    assert "1 captions, 1 of them" in cache(large_project, files, *words)
    write(" ")
    assert "teacher_caption" in reject(large_project, files, *words)


def test_references_of_a_row_are_presented_in_their_order(large_project: Path, files: TinyH3) -> None:
    """A picture and a silent clip, whose files and order count for the cache."""
    for number in range(2):
        write_video(large_project / "clips" / f"clip {number}.mp4", moving_square(22, 64, 64, number), fps=24)
    style = pixels(64, 96)
    write_png(large_project / "style.png", style.numpy())
    rows = []
    for number in range(2):
        entries = [{"type": "image", "path": "style.png"}]
        if number:
            entries.append({"type": "video", "path": "motion.mp4", "audio_path": None})
        clip = {"video_path": f"clips/clip {number}.mp4", "caption": CAPTIONS[0], "references": entries}
        rows.append(json.dumps(clip))
    write_video(large_project / "motion.mp4", moving_square(22, 64, 64, 3), fps=24)
    (large_project / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    path = large_project / "dataset.toml"
    content = re.sub(r"video_directory = .*", 'video_jsonl_file = "rows.jsonl"', path.read_text("utf-8"))
    path.write_text(content.replace("[5]", "[22]"), "utf-8")
    edges = ["--reference_image_short_edge", "64", "--reference_video_short_edge", "64"]

    cache(large_project, files, "--task", "ref2va", *edges)

    states, tags = presented(files, CAPTIONS[0], present_image(style))
    torch.testing.assert_close(text_cache(large_project)[STATES], states, atol=1e-4, rtol=1e-4)
    assert text_cache(large_project)[TAG_ROWS].tolist() == tags
    with_clip = text_cache(large_project, 1)[TAG_ROWS].tolist()
    assert with_clip.count(0) > tags.count(0)
    assert "0 of them to encode" in cache(large_project, files, "--task", "ref2va", *edges)
    write_png(large_project / "style.png", 255 - style.numpy())
    assert "2 captions, 2 of them" in cache(large_project, files, "--task", "ref2va", *edges)


def test_a_clip_with_several_items_has_no_text_of_one(large_project: Path, files: TinyH3) -> None:
    path = large_project / "dataset.toml"
    content = path.read_text("utf-8").replace('"head"', '"chunk"')
    path.write_text(content, "utf-8")
    write_video(large_project / "clips" / "clip 1.mp4", moving_square(10, 64, 64, 1), fps=24)

    message = reject(large_project, files, "--task", "fl2va")

    assert "2 items are cut out of it" in message
    assert "reference image" not in message
