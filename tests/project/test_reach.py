"""docs/new_and_run.md lists what a folder of somebody else can do: every option and key that reaches a file,
a site or code stands there, and a new one has to be put there too.
"""

import argparse
import re
from pathlib import Path

import pytest

from dataset import config_keys as forms
from dataset.forms.composing import KEYS, SOURCES, SOURCES_WITH_ADDRESSES
from dataset.subset_options import SUBSET_KEYS
from generation.prompt_lines import (
    EMBEDDED_GENERATION_OPTIONS,
    IMAGE_GENERATION_OPTIONS,
    NAMED_OPTIONS,
    SECTIONED_GENERATION_OPTIONS,
    read_path,
)
from generation.sample_lines import SAMPLE_OPTIONS
from modules.options import IMPORTS, STARTS
from modules.parser import METAVARS
from protocols.families import with_scripts
from tests.commands import ROOT
from tests.test_command_line import parser_of

PAGE = ROOT / "docs" / "new_and_run.md"
# texts that reach nothing: numbers, sizes, prompts, names below a folder of ours, words of metadata
PLAIN = {
    *("audio_inpaint_interval", "outpaint_region", "retake"),
    "block_lr",
    *("blocks_to_swap", "caption_extension", "caption_extention"),
    *("caption_prefix", "caption_separator", "caption_suffix"),
    *("cfg_schedule", "compile_args", "compile_backend"),
    *("console_back", "custom_system_prompt", "device", "score_device"),
    *("dit_dtype", "embedding_init_word", "exclude_patterns", "face_crop_aug_range", "family"),
    *("huggingface_path_in_repo", "huggingface_repo_type", "huggingface_repo_visibility"),
    *("huggingface_token", "include_patterns", "keep_tokens_separator"),
    "layout_bboxes",
    *("latent_paddings", "log_prefix", "log_tracker_name"),
    *("lr_decay_steps", "lr_scheduler", "lr_scheduler_args"),
    *("lr_warmup_steps", "metadata_arch", "metadata_author"),
    *("max_shard_size", "metadata_description", "metadata_is_negative_embedding", "metadata_license"),
    *("metadata_merged_from", "metadata_preprocessor", "metadata_reso"),
    *("metadata_tags", "metadata_thumbnail", "metadata_title"),
    *("h3_teacher_conditions", "max_timestep", "metadata_trigger_phrase", "metadata_usage_hint"),
    *("min_timestep", "nag_prompt", "uncond_text"),
    *("negative_prompt", "negative_skip_blocks", "network_args", "one_frame_inference"),
    *("optimizer_args", "output_name", "plan"),
    *("prompt", "prompt_2", "resolution"),
    *("secondary_separator", "seed", "sheet"),
    *("slg_layers", "system_prompt", "task"),
    *("te_multiplier", "text_encoder_dtype", "train_embedding", "trainable_modules"),
    *("training_comment", "vae_dtype", "wandb_api_key", "wandb_run_name", "without"),
}
SWITCHES = {"repair_captions"}  # what it writes stands in the text
NUMBERS = {int, float}


def section() -> dict[str, set[str]]:
    """The names in each point of the list, by its first word."""
    text = PAGE.read_text(encoding="utf-8").partition("## A folder from somebody else")[2]
    points = re.split(r"\n- \*\*", text.partition("Reading is safe")[0])[1:]
    return {point.split()[0].strip("*,"): set(re.findall(r"`(\w+)`", point)) for point in points}


def actions(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.Action]:
    """All options of the scripts that `run` runs."""
    names = ["tools/download"]
    for entry in with_scripts().values():
        names += [f"{entry.cache}_latents", f"{entry.cache}_text_encoder_outputs"]
        names.append(entry.generation_script)
        names += [entry.training_script, f"{entry.script}_train"]
    scripts = [f"{name}.py" for name in names if (ROOT / f"{name}.py").is_file()]
    found: dict[str, argparse.Action] = {}
    for script in scripts:
        with monkeypatch.context() as patched:
            parser = parser_of(script, patched)
        for action in parser._actions:
            is_value = action.nargs != 0 and not action.choices and action.type not in NUMBERS
            if is_value and not hasattr(action, "rejection"):
                found.setdefault(action.dest, action)
    return found


def test_every_option_with_a_path_or_a_name_is_listed_for_what_it_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed, found = section(), actions(monkeypatch)
    reaches = {name: getattr(action, "reach", "") for name, action in found.items()}
    paths = {name for name, action in found.items() if action.metavar == METAVARS[Path]}
    by_reach = {
        "Write": {name for name, reach in reaches.items() if reach in ("writes", "appends")},
        "Send": {name for name, reach in reaches.items() if reach in ("sends", "configures")},
        "Start": {name for name, reach in reaches.items() if reach == STARTS["reach"]},
        "Import": {name for name, reach in reaches.items() if reach in IMPORTS},
    }
    for kind, names in by_reach.items():
        assert names <= listed[kind], f"{kind}: {sorted(names - listed[kind])}"
    rest = found.keys() - set().union(*by_reach.values())
    assert paths & rest <= listed["Read"], sorted(paths & rest - listed["Read"])
    unknown = rest - listed["Read"] - PLAIN - SWITCHES
    assert not unknown, f"say in {PAGE.name}, or in PLAIN, what these reach: {sorted(unknown)}"
    assert not PLAIN & (paths | listed["Read"] | listed["Write"] | listed["Import"])


def test_every_key_of_a_dataset_with_a_path_is_listed() -> None:
    listed = section()
    made = {"cache_directory", "download_directory"}
    of_paths = forms.PATH, forms.PATHS, forms.LIST_PATH, forms.TARS
    keys = {name for name, key in {**KEYS, **SUBSET_KEYS}.items() if key.value_type in of_paths}
    assert made <= keys & listed["Write"]
    assert keys - made <= listed["Read"], sorted(keys - made - listed["Read"])
    assert keys >= {*SOURCES}
    assert "allow_urls" in SOURCES_WITH_ADDRESSES or "allow_urls" in KEYS


def test_every_path_in_a_line_of_prompts_is_listed() -> None:
    tables = SAMPLE_OPTIONS, EMBEDDED_GENERATION_OPTIONS, SECTIONED_GENERATION_OPTIONS
    tables = (*tables, IMAGE_GENERATION_OPTIONS, NAMED_OPTIONS)
    names = {one.key for table in tables for one in table.values() if one.read is read_path}
    assert names <= section()["Read"], sorted(names - section()["Read"])


def test_no_other_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (
        actions(monkeypatch).keys()
        | KEYS.keys()
        | SUBSET_KEYS.keys()
        | {"log_with", "max_train_steps", "resume_from_huggingface"}
    )
    tables = SAMPLE_OPTIONS, SECTIONED_GENERATION_OPTIONS, NAMED_OPTIONS
    known |= {one.key for table in tables for one in table.values()} | {"create_network", "networks"}
    for names in section().values():
        assert names <= known, sorted(names - known)
