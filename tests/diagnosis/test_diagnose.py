"""What `diagnose` finds where a fault is planted, and that it finds nothing else."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from data_tools.report.diagnosis.captions import find_caption_findings
from data_tools.report.diagnosis.contract import DatasetCaption, MeasuredDataset, find_shared_beginnings
from data_tools.report.diagnosis.trigger_words import cut_into_pieces, find_trigger_findings, propose_word
from data_tools.report.page import STDOUT
from diagnosis.loras import MeasuredLora, find_lora_findings
from diagnosis.run import DiagnoseOptions, list_diagnoses, run_diagnosis
from modules.errors import CheckpointError, OptionError
from networks.delta import read_deltas
from protocols.rules import TextPiece, TokenCount
from tests.commands import ROOT
from tests.data_tools.report.making import save_copy, save_image, write_config
from tests.pictures import picture
from tests.project.test_kinds_of_folders import POCKET, describe_short
from training.reports.history import THIS_RUN, History, history_path

SUBJECTS = ("a dog in a park", "a red car", "two boats", "an old tower", "a bowl of soup", "the night sky")
SUBJECTS += ("a green door", "a snowy hill", "some books", "a wet street", "three apples", "a tall tree")
VOCABULARY = ("ing", "er", "red", "dog", "cat", "wolf", "olf", "zw", "sks")


def number_of(entry: str) -> int:
    """Number an entry as tokenizers do: the single characters first, the entries that it lists last."""
    return 1000 * (1 + VOCABULARY.index(entry)) if entry in VOCABULARY else ord(entry.lower())


def count_tokens(text: str, limit: int = 77) -> TokenCount:
    """Cut words as a vocabulary of byte pairs does: into its longest entries, and single characters."""
    pieces = []
    for word in text.replace(",", " ,").split():
        rest = word
        while rest:
            lower = rest.lower()
            entry = max((e for e in VOCABULARY if lower.startswith(e)), key=len, default=lower[:1])
            pieces.append(TextPiece(number_of(entry), rest[: len(entry)]))
            rest = rest[len(entry) :]
    num_read = len(text) if len(pieces) <= limit else text.find(" ", limit // 2)
    return TokenCount(text, tokens=len(pieces), limit=limit, num_read=num_read, pieces=tuple(pieces))


def dataset(
    captions: Sequence[str], word: str = "zwolf", regularization: Sequence[str] = (), table: str = "table 1"
) -> MeasuredDataset:
    learned = [DatasetCaption(text, Path(f"{n}.txt"), table, word, False) for n, text in enumerate(captions)]
    others = [
        DatasetCaption(text, Path(f"r{n}.txt"), "table 2", "", True) for n, text in enumerate(regularization)
    ]
    return MeasuredDataset(Path("data.toml"), (), (), [*learned, *others], {"clip": count_tokens})


IDS = (
    *("trigger-pieces", "trigger-known", "trigger-missing", "trigger-capitals", "trigger-shared"),
    *("trigger-subjects", "caption-phrase", "captions-cut", "images-copies", "images-background"),
    *("images-cropped", "images-soft", "buckets-single", "concepts-uneven", "loss-broken", "loss-rises"),
    *("validation-rises", "lora-texts-only", "lora-empty", "lora-one-block", "loras-loud", "loras-overlap"),
    *("lora-rounded", "loras-rounded"),
)
SOUND = [f"zwolf, {subject}" for subject in SUBJECTS]


def find_ids(measured: MeasuredDataset) -> list[str]:
    return [finding.id for finding in (*find_trigger_findings(measured), *find_caption_findings(measured))]


def test_sound_captions_have_no_findings() -> None:
    assert find_ids(dataset(SOUND)) == []


def test_a_token_that_is_among_the_rarest_is_no_known_word() -> None:
    assert find_ids(dataset([text.replace("zwolf", "sks") for text in SOUND], "sks")) == []


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        (dataset([text.replace("zwolf", "mmx26") for text in SOUND], "mmx26"), "trigger-pieces"),
        (dataset([text.replace("zwolf", "cat") for text in SOUND], "cat"), "trigger-known"),
        (dataset([*SOUND[:6], *SUBJECTS[6:]]), "trigger-missing"),
        (dataset(SOUND, regularization=["zwolf, a man", "a man"]), "trigger-shared"),
        (dataset([f"{text}, with round glasses" for text in SOUND]), "caption-phrase"),
        (
            dataset([SOUND[n].replace(",", (" man,", " woman,")[n % 2]) for n in range(12)]),
            "trigger-subjects",
        ),
        (dataset([f"{text}, {'x ' * 80}" for text in SOUND[:6]] + SOUND[6:]), "captions-cut"),
    ],
)
def test_a_planted_fault_is_found_alone(measured: MeasuredDataset, found: str) -> None:
    assert find_ids(measured) == [found]


def test_a_background_is_no_phrase_of_the_concept() -> None:
    wall = [f"{text} before a plain blue wall" for text in SOUND]
    assert find_ids(dataset(wall)) == []
    glasses = [f"{text}, with round glasses before a blue wall" for text in SOUND]
    (phrase,) = find_caption_findings(dataset(glasses))
    assert phrase.subject == "with round glasses"


def test_a_word_for_two_persons_is_named_with_the_captions_of_the_rarer_one() -> None:
    captions = [SOUND[n].replace(",", " woman," if n in (2, 5, 9) else " man,") for n in range(12)]
    (finding,) = find_trigger_findings(dataset(captions))
    assert finding.figure == 0.25
    assert finding.text.endswith("for a man in 9 captions and for a woman in 3.")
    assert list(finding.files) == ["2.txt", "5.txt", "9.txt"]
    # a person behind a comma may be what a style shows, and a pair in a caption is no second subject
    assert (
        find_ids(dataset([SOUND[n].replace(",", (", a man", ", a woman")[n % 2]) for n in range(12)])) == []
    )


def test_capitals_matter_to_tokenizers_that_tell_them() -> None:
    measured = dataset([SOUND[0].replace("zwolf", "Zwolf"), *SOUND[1:]])
    assert find_ids(measured) == []

    def count_with_capitals(text: str) -> TokenCount:
        count = count_tokens(text)
        return replace(
            count, pieces=tuple(TextPiece(ord(piece.text[0]), piece.text) for piece in count.pieces)
        )

    findings = list(find_trigger_findings(replace(measured, counters={"t5": count_with_capitals})))
    assert [finding.id for finding in findings] == ["trigger-capitals"]
    assert findings[0].figure == 1
    assert "as Zwolf" in findings[0].text


def test_pieces_and_phrases_are_named_with_their_figures() -> None:
    (pieces,) = find_trigger_findings(dataset([text.replace("zwolf", "mmx26") for text in SOUND], "mmx26"))
    assert pieces.text == "clip reads the trigger word mmx26 as 5 pieces: m, m, x, 2, 6."
    assert (pieces.figure, pieces.limit) == (5, 3)
    assert "zwolf" in pieces.remedy  # z and w are one piece, olf another: both rare, and no caption has it
    captions = [f"{text}, with round glasses" for text in SOUND[:11]] + [SOUND[11]]
    (phrase,) = find_caption_findings(dataset(captions))
    assert phrase.subject == "with round glasses"
    assert phrase.figure == pytest.approx(11 / 12)
    # in fewer captions it is no fault
    assert find_ids(dataset([*captions[:9], *SOUND[9:]])) == []


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([f"zwolf, {subject}" for subject in SUBJECTS], ["zwolf"]),
        ([f"This image shows {subject}" for subject in SUBJECTS], [""]),
        ([f"1girl, solo, {subject}" for subject in SUBJECTS], [""]),
        ([f"{('zwan', 'vrax')[n % 3 == 0]}, {SUBJECTS[n]}" for n in range(12)], ["zwan", "vrax"]),
        ([f"zwan, {subject}" for subject in SUBJECTS[:8]] + [*SUBJECTS[8:]], ["zwan"]),  # the others lack it
        ([f"{('cat', 'dog')[n % 3 == 0]}, {SUBJECTS[n]}" for n in range(12)], [""]),  # known words
        (SUBJECTS, [""]),
    ],
)
def test_captions_begin_with_a_trigger_word_or_with_names(captions: Sequence[str], words: list[str]) -> None:
    assert find_shared_beginnings(captions, {"clip": count_tokens}) == words


def test_a_proposed_word_has_few_pieces_in_every_tokenizer() -> None:
    assert propose_word({"clip": count_tokens}, ["a dog"]) == "zwolf"
    assert [piece.text for piece in cut_into_pieces("zwolf", {"clip": count_tokens})["clip"]] == ["zw", "olf"]
    assert propose_word({"clip": count_tokens}, ["a zwolf"]) is None  # the others fall apart into letters
    assert propose_word({"clip": count_tokens}, ["a dog"], ["zwing"]) is None  # they would share zw


# --- datasets, by the command


def write_folder(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        save_image(folder / f"{number}.png", number, caption=f"zwolf, {SUBJECTS[number]}")
    return write_config(folder, "image_directory = '{folder}'")


def diagnose(path: Path, capsys: pytest.CaptureFixture[str], *others: Any) -> Mapping[str, Any]:
    run_diagnosis(DiagnoseOptions(path=path, json=Path(STDOUT), **dict(others)))
    content: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    return content


def found_ids(path: Path, capsys: pytest.CaptureFixture[str], *others: Any) -> list[str]:
    return [finding["id"] for finding in diagnose(path, capsys, *others)["findings"]]


def plant_copies(folder: Path) -> None:
    for number in range(4):
        save_copy(folder / "0.png", folder / f"copy {number}.png", (90, 68), f"zwolf, copy {number}")


def plant_crops(folder: Path) -> None:
    for number in range(4):
        save_image(folder / f"wide {number}.png", 20 + number, (400, 40), f"zwolf, wide {number}")
    data = folder / "data.toml"
    data.write_text(data.read_text("utf-8").replace("enable_bucket = true\n", ""), encoding="utf-8")


def plant_softness(folder: Path) -> None:
    for number in range(1, 12):
        small = Image.fromarray(picture(number, (96, 72))).resize((6, 5))
        small.resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def plant_background(folder: Path) -> None:
    for number in range(12):
        image = Image.new("RGB", (96, 72), (235, 235 - number % 3, 230))
        image.paste(Image.fromarray(picture(number, (40, 36))), (30, 20))
        image.save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("plant", "found", "figure", "words"),
    [
        (lambda folder: None, [], 0, ""),
        (plant_copies, ["images-copies"], 5 / 16, "Keep 0.png, and remove the other 4"),
        (plant_crops, ["images-cropped"], 4 / 16, 'the caption of wide 0.png says "wide"'),
        (plant_softness, ["images-soft"], 11 / 12, "only 0.png is sharp"),
        (plant_background, ["images-background"], 1, "3 of 12 captions name one"),
    ],
    ids=["sound", "copies", "crops", "softness", "background"],
)
def test_media_with_a_planted_fault(
    plant: Callable[[Path], None],
    found: list[str],
    figure: float,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_folder(tmp_path)
    plant(tmp_path)
    findings = diagnose(config, capsys)["findings"]
    assert [finding["id"] for finding in findings] == found
    for finding in findings:
        assert finding["figure"] == pytest.approx(figure)
        assert words in finding["text"] + finding["remedy"]
        assert finding["files"]


def test_a_background_that_captions_name_or_a_mask_hides_is_no_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_folder(tmp_path)
    plant_background(tmp_path)
    for number in range(12):
        caption = tmp_path / f"{number}.txt"
        caption.write_text(f"zwolf, {SUBJECTS[number]} on a white background", encoding="utf-8")
    assert found_ids(config, capsys) == []


def test_tables_of_one_concept_share_its_word_and_validation_is_not_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither clips of the same concept nor items held out for validation are another concept."""
    config = write_folder(tmp_path)
    tables = ["image_directory = '{folder}'\ntrigger_word = 'zwolf'"]
    for name, key in (("more", ""), ("held out", "validation = true")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(3):
            save_image(folder / f"{number}.png", 40 + number, caption=f"a zwolf in {SUBJECTS[number]}")
        tables.append(f"image_directory = '{{folder}}/{name}'\n{key}")
    config = write_config(tmp_path, *tables)
    assert found_ids(config, capsys) == []


def test_buckets_of_one_and_uneven_concepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, size in enumerate([(64, 48), (48, 64), (96, 32), (32, 96)]):
        save_image(tmp_path / f"{number}.png", number, size, f"zwolf, {SUBJECTS[number]}")
    other = tmp_path / "other"
    other.mkdir()
    save_image(other / "a.png", 30, caption="vrax, a man")
    tables = [
        "image_directory = '{folder}'\ntrigger_word = 'zwolf'\nnum_repeats = 3",
        "image_directory = '{folder}/other'\ntrigger_word = 'vrax'",
    ]
    content = diagnose(write_config(tmp_path, *tables), capsys)
    findings = {finding["id"]: finding for finding in content["findings"]}
    assert set(findings) == {"buckets-single", "concepts-uneven"}
    assert findings["concepts-uneven"]["figure"] == 12
    assert findings["concepts-uneven"]["remedy"].endswith("with num_repeats = 12.")
    assert any("tokenizers" in remark for remark in content["remarks"])


def test_a_described_folder_is_read_with_its_models_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = describe_short(POCKET, "clips", tmp_path / "models", tmp_path)
    capsys.readouterr()
    data = folder / "dataset.toml"
    text = data.read_text("utf-8").replace("[[datasets]]", '[[datasets]]\ntrigger_word = "mmx26"', 1)
    data.write_text(text, encoding="utf-8")
    content = diagnose(folder, capsys)
    assert content["remarks"] == []
    finding = next(finding for finding in content["findings"] if finding["id"] == "trigger-pieces")
    assert finding["subject"] == "mmx26"
    assert finding["figure"] >= 4


# --- runs


def write_run(
    folder: Path, losses: Sequence[float], validations: Mapping[int, float] | None = None, command: str = ""
) -> Path:
    history = History(history_path(folder, "x"), session=7)
    history.add(0, started=True)
    if command:
        history.add(0, commands=[(THIS_RUN, command, command)])
    if validations and 0 in validations:
        history.add(0, validation={"validation/loss": validations[0]})
    for step, loss in enumerate(losses, 1):
        history.add(step, loss=loss, rates={"lr/unet": 1e-3}, seconds=0.5)
        if validations and step in validations and step > 0:
            history.add(step, validation={"validation/loss": validations[step]})
            (folder / f"x-step{step}.safetensors").touch()
            history.add(step, saved=f"x-step{step}.safetensors")
    history.flush()
    return history.path


FALLING = [1 / (1 + step / 30) for step in range(100)]
UP_AGAIN = {20: 0.5, 40: 0.4, 60: 0.42, 80: 0.46, 100: 0.5}


@pytest.mark.parametrize(
    ("losses", "validations", "found"),
    [
        (FALLING, {step: 1 / step for step in UP_AGAIN}, []),
        (FALLING, UP_AGAIN, ["validation-rises"]),
        (FALLING[::-1], None, ["loss-rises"]),
        # worse than the untrained model from the beginning, so that nothing rises any more
        (FALLING, {0: 0.4, **UP_AGAIN}, ["loss-rises"]),
        (FALLING, {0: 0.5, 20: 0.4, 40: 0.3, 60: 0.2, 80: 0.1}, []),
        ([*FALLING[:50], float("nan"), *FALLING[51:]], None, ["loss-broken"]),
        (FALLING[:30][::-1], None, []),  # too short to judge
    ],
)
def test_runs(
    losses: Sequence[float],
    validations: Mapping[int, float] | None,
    found: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, losses, validations)
    assert found_ids(tmp_path, capsys) == found


def test_the_file_before_the_rise_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, FALLING, UP_AGAIN)
    ((finding,),) = (diagnosis.findings for diagnosis in list_diagnoses(path))
    assert finding.remedy == "Take x-step40.safetensors."
    assert finding.figure == pytest.approx(1.25)


# --- LoRA files


def write_lora(path: Path, seed: int = 0, scale: float = 1.0, **changed: float) -> Path:
    """Write a LoRA of Wan with 6 blocks; `changed` scales the up matrices of blocks, as `b3=0`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for block in range(6):
        for part in ("q", "k"):
            name = f"lora_unet_blocks_{block}_self_attn_{part}"
            factor = scale * changed.get(f"b{block}", 1.0)
            tensors[f"{name}.lora_up.weight"] = factor * torch.randn(32, 4, generator=generator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"b2": 0.0}, ["lora-empty"]),
        ({"b4": 10.0}, ["lora-one-block"]),
    ],
)
def test_loras(
    changed: dict[str, float], found: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lora(tmp_path / "a.safetensors", **changed)
    content = diagnose(path, capsys)
    assert [finding["id"] for finding in content["findings"]] == found
    assert [row["block"] for row in content["blocks"]] == [f"blocks_{number}" for number in range(6)]
    # the norm is that of the scaled product: alpha / rank = 0.5
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((32, 4), (4, 32)) * 2]
    products = [0.5 * matrices[index].double() @ matrices[index + 1].double() for index in (0, 2)]
    expected = sum(product.square().sum() for product in products) ** 0.5
    if "b0" not in changed:
        assert content["blocks"][0]["norm"] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("text", "picture_module"),
    [
        ("blocks_{n}_cross_attn_k", "blocks_{n}_cross_attn_q"),  # Wan
        ("double_blocks_{n}_txt_attn_qkv", "double_blocks_{n}_img_attn_qkv"),  # FLUX.1, HunyuanVideo
        ("transformer_blocks_{n}_attn_add_k_proj", "transformer_blocks_{n}_attn_to_k"),  # Qwen-Image
        ("context_refiner_{n}_attention_to_q", "layers_{n}_attention_to_q"),  # Z-Image
        (
            "visual_transformer_blocks_{n}_cross_attention_to_key",
            "visual_transformer_blocks_{n}_self_attention_to_key",
        ),
        (
            "down_blocks_1_attentions_0_transformer_blocks_{n}_attn2_to_k",
            "down_blocks_1_attentions_0_transformer_blocks_{n}_attn1_to_k",
        ),
    ],
    ids=["wan", "flux", "qwen_image", "z_image", "kandinsky", "stable_diffusion"],
)
def test_a_lora_of_the_layers_that_read_the_text_alone(text: str, picture_module: str) -> None:
    def measure(names: Sequence[str]) -> MeasuredLora:
        generator = torch.Generator().manual_seed(0)
        factors = {
            f"lora_unet_{name}": {
                "lora_up.weight": torch.randn(8, 2, generator=generator),
                "lora_down.weight": torch.randn(2, 8, generator=generator),
            }
            for name in names
        }
        return MeasuredLora(Path("a.safetensors"), read_deltas(factors), {})

    texts = [text.format(n=number) for number in range(4)]
    pictures = [picture_module.format(n=number) for number in range(4)]
    assert [finding.id for finding in find_lora_findings(measure(texts))] == ["lora-texts-only"]
    for sound in ([*texts, *pictures], pictures):
        assert list(find_lora_findings(measure(sound))) == []


def test_two_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_lora(tmp_path / "a.safetensors")
    independent = write_lora(tmp_path / "b.safetensors", seed=1)
    content = diagnose(first, capsys, ("with_lora", independent))
    assert content["findings"] == []
    assert all(abs(row["cosine"]) < 0.2 for row in content["blocks"])
    loud = write_lora(tmp_path / "turbo.safetensors", seed=1, scale=10)
    (finding,) = diagnose(first, capsys, ("with_lora", loud))["findings"]
    assert finding["id"] == "loras-loud"
    assert finding["figure"] == pytest.approx(10, rel=0.2)
    # the strengths that the remedy names are those at which nothing is found any more
    strengths = re.search(r"--lora_multiplier (\S+) (\S+), or (\S+) (\S+), for", finding["remedy"])
    assert strengths is not None
    used, higher = [tuple(map(float, strengths.groups()[start : start + 2])) for start in (0, 2)]
    for pair in (used, higher):
        assert diagnose(first, capsys, ("with_lora", loud), ("lora_multiplier", pair))["findings"] == []
    louder = (used[0], used[1] + 0.02)
    (finding,) = diagnose(first, capsys, ("with_lora", loud), ("lora_multiplier", louder))["findings"]
    assert finding["id"] == "loras-loud"
    negative = write_lora(tmp_path / "c.safetensors", scale=-1)
    content = diagnose(first, capsys, ("with_lora", negative))
    (finding,) = content["findings"]
    assert finding["id"] == "loras-overlap"
    assert finding["figure"] == pytest.approx(-1)
    assert "cancel" in finding["meaning"]
    content = diagnose(first, capsys, ("with_lora", negative), ("lora_multiplier", (1.0, -1.0)))
    (finding,) = content["findings"]
    assert finding["figure"] == pytest.approx(1)
    assert "overshoot" in finding["meaning"]


def write_constant_lora(path: Path, value: float) -> Path:
    """Write a LoRA that adds the same value to each weight of the first block."""
    name = "lora_unet_blocks_0_self_attn_q"
    tensors = {f"{name}.lora_up.weight": torch.full((32, 1), value)}
    tensors[f"{name}.lora_down.weight"] = torch.ones(1, 32)
    save_file(tensors, path)
    return path


def test_what_rounding_leaves_of_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit = tmp_path / "dit.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.ones(32, 32, dtype=torch.bfloat16)}, dit)
    # from 1 to 2, numbers of bfloat16 are 2**-7 apart, from 4 to 8 four times as far
    step = write_constant_lora(tmp_path / "step.safetensors", 2**-7)
    content = diagnose(step, capsys, ("dit", dit))
    assert [finding["id"] for finding in content["findings"]] == []
    assert content["remarks"][0].endswith("nearest bf16 value, step.safetensors keeps 100.0% of its change.")
    # 448 is the largest number of float8 and stands for the weight 1: the next one would be 0.07 smaller
    assert content["remarks"][1].endswith("nearest fp8 value, step.safetensors keeps 0.0% of its change.")
    faint = write_constant_lora(tmp_path / "faint.safetensors", 2**-9)
    (finding,) = diagnose(faint, capsys, ("dit", dit))["findings"]
    assert (finding["id"], finding["figure"]) == ("lora-rounded", 0)
    large = write_constant_lora(tmp_path / "large.safetensors", 3.0)
    content = diagnose(step, capsys, ("with_lora", large), ("dit", dit))
    findings = {finding["id"]: finding for finding in content["findings"]}
    assert set(findings) == {"loras-loud", "loras-overlap", "loras-rounded"}
    assert (findings["loras-rounded"]["subject"], findings["loras-rounded"]["figure"]) == (step.name, 1)
    assert f"large.safetensors keeps 100.0% of its change, and {1 - 2**-7 / 3:.1%}" in content["remarks"][1]
    stored = tmp_path / "fp8.safetensors"
    save_file({"blocks.0.self_attn.q.weight": torch.ones(32, 32, dtype=torch.float8_e4m3fn)}, stored)
    with pytest.raises(CheckpointError, match="has weights in 8 or 4 bits"):
        list_diagnoses(step, dit=stored)
    with pytest.raises(OptionError, match="LoRA files are merged into it"):
        list_diagnoses(tmp_path, dit=dit)


def test_wrong_paths_are_one_sentence_each(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "a.safetensors")
    other = tmp_path / "other.safetensors"
    tensors = {"lora_unet_blocks_9_ffn_0.lora_up.weight": torch.ones(8, 2)}
    tensors["lora_unet_blocks_9_ffn_0.lora_down.weight"] = torch.ones(2, 8)
    save_file(tensors, other)
    config = write_folder(tmp_path / "data", 1) if (tmp_path / "data").mkdir() is None else tmp_path
    note = tmp_path / "note.md"
    note.touch()
    elsewhere = tmp_path / "elsewhere"  # the output of a training by another program
    elsewhere.mkdir()
    write_lora(elsewhere / "last.safetensors")
    for path, second, error, words in (
        (note, None, OptionError, "pass a folder"),
        (config, lora, OptionError, "compared with a LoRA file"),
        (tmp_path / "data", None, OptionError, "there is no run in this folder"),
        (lora, other, CheckpointError, "changes no module that"),
        (elsewhere, None, OptionError, "can be diagnosed one by one, such as"),
    ):
        with pytest.raises(error) as caught:
            list_diagnoses(path, second)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value).strip() or words.startswith("there is no run")


def test_findings_are_printed_with_remedy_and_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_diagnosis(DiagnoseOptions(path=write_run(tmp_path, FALLING[::-1])))
    printed = capsys.readouterr().out
    assert "[loss-rises]" in printed
    assert "Train again with a tenth of the rate: --learning_rate 0.0001" in printed
    np.testing.assert_equal(printed.count("The loss rises"), 1)


def test_the_command_of_a_slower_run_is_the_commands_own_with_a_tenth_of_the_rate(tmp_path: Path) -> None:
    command = "python wan_train_network.py --learning_rate 0.001 --output_name x"
    path = write_run(tmp_path, FALLING[::-1], command=command)
    ((finding,),) = (diagnosis.findings for diagnosis in list_diagnoses(path))
    assert finding.remedy.endswith(f"{command} --learning_rate 0.0001 --output_name x-slower")


def test_the_ids_of_findings_stay_and_are_in_the_document() -> None:
    """Scripts select findings by their ids: one may be added here, none may change."""
    written = set()
    for folder in ("diagnosis", "data_tools/report/diagnosis"):
        for path in (ROOT / folder).glob("*.py"):
            written |= set(re.findall(r'Finding\(\s*"([a-z-]+)"', path.read_text("utf-8")))
    table = re.findall(
        r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "diagnose.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(written) == sorted(table) == sorted(IDS)
