"""The tables of docs/whole_models.md: what the plan counts for released models, and which cards follow."""

import re
from pathlib import Path

import pytest
import torch

from modules.options import read_options
from modules.parser import add_options
from project.kinds.whole_model import GIB_BESIDES_WEIGHTS
from protocols.families import FAMILIES
from runtime.planning import dry_run as dry
from tests.manifests import tensor_list, write_hollow
from training.experts import choose_placement
from training.learning_options import FullDitOptions
from training.options import TrainingOptions, read_arguments, training_parser
from training.planning.rehearsal import set_up_trainable

GIB = 2**30
PAGE = Path(__file__).resolve().parent.parent / "docs" / "whole_models.md"
NEEDED = (
    "--dataset_config",
    "d.toml",
    "--output_dir",
    "o",
    "--output_name",
    "x",
    "--mixed_precision",
    "bf16",
)
ADAFACTOR = (
    "--optimizer_type",
    "adafactor",
    "--optimizer_args",
    "relative_step=False",
    "scale_parameter=False",
)
FUSED = "--fused_backward_pass"
COLUMNS = (
    ("--full_bf16", FUSED, *ADAFACTOR),
    ("--full_bf16", FUSED, "--optimizer_type", "adamw8bit"),
    (FUSED, *ADAFACTOR),
    (),
)
# row -> family whose options read its file, the list of its tensors, further options
MODELS = {
    "FLUX.2 klein 4B": ("flux_2", "flux2-klein-4b-dit", ("--model_version", "klein-base-4b")),
    "FLUX.2 klein 9B": ("flux_2", "flux2-klein-9b-dit", ("--model_version", "klein-base-9b")),
    "FLUX 3 Klein": ("flux_3", "flux3-klein-base-dit", ()),
    "Qwen-Image-2.1": ("qwen_image_21", "qwen-image-2.1-dit", ()),
    "MOSS-Image": ("moss_image", "moss-image-dit", ()),
    "Fibo 2.0": ("fibo_2", "fibo-2-dit", ()),
    "Kandinsky 5 Lite": ("kandinsky", "kandinsky5-lite-dit", ()),
    "Kandinsky 5 Image": ("kandinsky", "kandinsky5-lite-t2i-dit", ()),
    "HiDream-O1-Image": ("hidream_o1", "hidream-o1-comfy", ()),
    "HunyuanVideo 1.5": ("hunyuan_video_1_5", "hunyuanvideo1.5-dit-comfy", ()),
    "ERNIE-Image": ("ernie_image", "ernie-image-dit", ()),
    "Ideogram 4": ("ideogram4", "ideogram4-dit", ()),
    "FLUX.1": ("flux_kontext", "flux1-dev-dit", ()),
    "Krea 2": ("krea2", "krea2-dit", ()),
}
CASES = [
    pytest.param(name, column, marks=[pytest.mark.slow] * ((name, column) != ("FLUX.2 klein 4B", 1)))
    for name in MODELS
    for column in range(len(COLUMNS))
]


def rows_of_page() -> dict[str, list[float]]:
    """The GiB of each model, by its name and by those that share its row."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"\[([^]]*)\]\(", cells[0]) if len(cells) == 5 else ():
            rows[name] = [float(cell) for cell in cells[1:]]
    return rows


def cards_of_page() -> dict[int, tuple[set[str], set[str]]]:
    """The models that the page names for a card or a smaller one, with 2 and with 4 bytes for each weight."""
    cards, fitting = {}, (set[str](), set[str]())
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \d+ GB", line):
            card, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            for models, cell in zip(fitting, cells, strict=True):
                models.update(filter(None, cell.removeprefix("also ").split("; ")))
            cards[int(card.split()[0])] = (set(fitting[0]), set(fitting[1]))
    return cards


@pytest.mark.parametrize(("name", "column"), CASES)
def test_the_plan_counts_what_the_page_says(name: str, column: int, tmp_path: Path) -> None:
    """Weights, states and, if they are kept, gradients, made by the code of a step without content."""
    family_name, manifest, more = MODELS[name]
    path = write_hollow(tmp_path / "dit.safetensors", tensor_list(manifest))
    entry = FAMILIES[family_name]
    record = entry.options_record("Training")
    parser = training_parser("", FullDitOptions)
    add_options(parser, record)
    words = [*NEEDED, *COLUMNS[column], *more, "--dit", str(path)]
    args = read_arguments(parser, words, {})
    options, own = read_options(TrainingOptions, args), read_options(record, args)
    family = entry.make_family("training", own)
    dit = family.load_dit(choose_placement(options, torch.device("meta"), None))

    with dry.dry_run() as ledger:
        rehearsal = set_up_trainable(family, options, dit, ledger=ledger)
        moments = rehearsal.rehearse_optimizer()
        moment = moments.get("optimizer step", ledger.bytes_by_kind)
        counted = sum(moment.get(part, 0) for part in (dry.WEIGHTS, dry.OPTIMIZER, dry.GRADIENTS))

    assert counted / GIB == pytest.approx(rows_of_page()[name][column], rel=0.025)


def test_the_cards_of_the_page_follow_from_its_numbers() -> None:
    rows, cards = rows_of_page(), cards_of_page()
    assert sorted(cards) == [16, 24, 48, 80]
    assert {*MODELS} <= rows.keys()
    for card, (narrow, wide) in cards.items():
        room = card - GIB_BESIDES_WEIGHTS
        assert narrow == {name for name, columns in rows.items() if columns[0] <= room}, card
        assert wide == {name for name, columns in rows.items() if max(columns[1:3]) <= room}, card
