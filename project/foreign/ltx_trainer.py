"""Rules for the YAML of ltx-trainer, the official trainer of LTX-2."""

import re
from collections.abc import Mapping
from typing import Any

from project.foreign import rules
from project.foreign.contract import (
    DATA,
    TRAINING,
    ForeignRun,
    KeyRule,
    Program,
    UnsupportedRun,
    integer,
    is_on,
    number,
    omitted,
    read_switch,
)
from project.foreign.sample_prompts import ForeignSample, drop_missing, group_list, read_sample

_STRATEGY_TABLE = "training_strategy"
# key of a condition; its list index is replaced by its type, so that each type has its own rules
_CONDITION = re.compile(rf"({_STRATEGY_TABLE}\.(?:video|audio)\.conditions)\[\d+\]\.")
_FRAMES = integer(0, 100_000)
_read_fraction = number(0, 1)
# field of a sample -> the key
_SAMPLE_KEYS = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "steps": "inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
}
_CONVERTED = omitted("`new` and `run` make caches of clips; pass their folder")


def _name_conditions(values: dict[str, Any]) -> dict[str, Any]:
    """Rename conditions from their index to their type, as in `video.conditions.prefix.probability`."""
    named = {}
    for key, value in values.items():
        found = _CONDITION.match(key)
        kind = None if found is None else values.get(f"{found[0]}type")
        if found is not None and isinstance(kind, str):
            key = f"{found[1]}.{kind}.{key.removeprefix(found[0])}"
        named[key] = value
    return named


def _find_run(values: Mapping[str, Any]) -> ForeignRun:
    mode = str(values.get("model.training_mode", "lora"))
    if mode not in {"lora", "full"}:
        raise UnsupportedRun(f"model.training_mode = {mode}: `new` does not set up this kind of training")
    return ForeignRun("whole" if mode == "full" else "lora", f"model.training_mode = {mode}")


def _guess_model(values: Mapping[str, Any]) -> tuple[str, str]:
    """Guess the model family and task from the checkpoint's name and the presence of an audio stream."""
    family = "ltx_25" if "2.5" in str(values.get("model.model_path", "")) else "ltx_2"
    has_audio = is_on(values.get(f"{_STRATEGY_TABLE}.with_audio"))  # as older files say it
    has_audio |= any(key.startswith(f"{_STRATEGY_TABLE}.audio.") for key in values)
    return family, "av" if has_audio else "v"


def _read_samples(values: Mapping[str, Any]) -> list[ForeignSample]:
    """Return the samples: a table each, or prompts in a list, with common values."""
    common = {
        key.removeprefix("validation."): value
        for key, value in values.items()
        if key.startswith("validation.")
    }
    size = common.get("video_dims")  # width, height, frames
    if isinstance(size, list) and len(size) == 3:
        common |= dict(zip(("width", "height", "num_frames"), size, strict=True))
    tables = group_list(values, "validation.samples")
    prompts = common.get("prompts")
    tables += [{"prompt": prompt} for prompt in prompts] if isinstance(prompts, list) else []
    return drop_missing([read_sample({**common, **table}, _SAMPLE_KEYS) for table in tables])


def _read_on(_: Any) -> bool:
    return True


def _make_end_rules(stream: str, kind: str) -> dict[str, KeyRule]:
    """Return the rules for keys that condition a model on the first or last frames (or audio) of clips."""
    # `stream` ("video" or "audio") is part of the file's keys; `kind` is part of the names of our options.
    found = {}
    for end in ("prefix", "suffix"):
        start = f"{_STRATEGY_TABLE}.{stream}.conditions.{end}"
        found[f"{start}.type"] = omitted("the frames below it say so")
        found[f"{start}.temporal_boundary"] = KeyRule(TRAINING, f"ltx2_{kind}extend_{end}_frames", _FRAMES)
        found[f"{start}.probability"] = KeyRule(TRAINING, f"ltx2_{kind}extend_{end}_p", _read_fraction)
    return found


def _make_video_rules() -> dict[str, KeyRule]:
    """Return the rules for LTX-Trainer's video condition keys: training options, or reasons to omit keys."""
    start = f"{_STRATEGY_TABLE}.video.conditions"
    return {
        f"{start}.first_frame.type": omitted("its probability says so"),
        f"{start}.first_frame.probability": KeyRule(
            TRAINING, "ltx2_first_frame_conditioning_p", _read_fraction
        ),
        f"{start}.spatial_crop.type": KeyRule(TRAINING, "ltx2_spatial_crop", _read_on),
        f"{start}.spatial_crop.probability": KeyRule(TRAINING, "ltx2_spatial_crop_p", _read_fraction),
        f"{start}.spatial_crop.spatial_region*": omitted("spatial_crop_region in a table of dataset.toml"),
        f"{start}.mask.type": KeyRule(TRAINING, "ltx2_inpaint_mask", _read_on),
        f"{start}.mask.probability": KeyRule(TRAINING, "ltx2_inpaint_mask_p", _read_fraction),
        f"{start}.mask.*": rules.MASKS,
        f"{start}.reference.*": omitted(
            "references are in reference_directory of dataset.toml: docs/ltx2.md"
        ),
        **_make_end_rules("video", ""),
    }


PROGRAM = Program(
    title="ltx-trainer",
    suffixes=(".yaml", ".yml"),
    default_alpha=None,
    identifying_keys=(f"{_STRATEGY_TABLE}.name", "model.training_mode"),
    find_run=_find_run,
    guess_model=_guess_model,
    rename_keys=_name_conditions,
    read_samples=_read_samples,
    rules={
        "model.training_mode": omitted("it says what is trained"),
        "model.model_path": rules.own_file(
            "ltx2_checkpoint", "dit"
        ),  # the same file in both tasks of a release
        "model.text_encoder_path": rules.own_file("gemma_root", "ltx2_text_encoder_checkpoint"),
        "model.load_checkpoint": rules.START,
        "lora.rank": rules.RANK,
        "lora.alpha": rules.ALPHA,
        "lora.dropout": rules.DROPOUT,
        "lora.target_modules*": rules.LAYERS,
        f"{_STRATEGY_TABLE}.name": omitted("the conditions below it define the inputs"),
        **_make_video_rules(),
        **_make_end_rules("audio", "audio_"),
        f"{_STRATEGY_TABLE}.audio.conditions.mask.*": omitted(
            "audio_cond_mask_directory in dataset.toml and ltx2_audio_inpaint_mask below [training]"
        ),
        **{
            f"{_STRATEGY_TABLE}.{stream}.is_generated": omitted(
                "ltx2_train_direction below [training] says it"
            )
            for stream in ("video", "audio")
        },
        f"{_STRATEGY_TABLE}.first_frame_conditioning_p": KeyRule(
            TRAINING, "ltx2_first_frame_conditioning_p", _read_fraction
        ),
        f"{_STRATEGY_TABLE}.with_audio": omitted("the model's task follows from it"),
        f"{_STRATEGY_TABLE}.*": _CONVERTED,
        "optimization.learning_rate": rules.LEARNING_RATE,
        "optimization.steps": rules.STEPS,
        "optimization.batch_size": KeyRule(DATA, "batch_size", rules.BATCH_SIZE.read),
        "optimization.gradient_accumulation_steps": rules.ACCUMULATED,
        "optimization.max_grad_norm": rules.GRADIENT_LIMIT,
        "optimization.optimizer_type": rules.OPTIMIZER,
        "optimization.scheduler_type": rules.SCHEDULER,
        "optimization.scheduler_params.*": omitted("lr_scheduler_args below [training]"),
        "optimization.enable_gradient_checkpointing": rules.CHOSEN_BY_NEW,
        "acceleration.*": rules.CHOSEN_BY_NEW,
        "data.preprocessed_data_root": _CONVERTED,
        "data.num_dataloader_workers": rules.CHOSEN_BY_NEW,
        "validation.interval": rules.SAMPLE_STEPS,
        **{f"validation.{key}": rules.SAMPLES for key in (*_SAMPLE_KEYS.values(), "prompts", "video_dims")},
        "validation.samples[].prompt": rules.SAMPLES,
        "validation.samples[].*": omitted("samples of prompts.txt may have images by --i: docs/ltx2.md"),
        "validation.skip_initial_validation": KeyRule(
            TRAINING, "sample_at_first", lambda value: not read_switch(value)
        ),
        "validation.*": rules.SAMPLERS,
        "checkpoints.interval": rules.SAVE_STEPS,
        "checkpoints.keep_last_n": rules.KEPT_FILES,
        "checkpoints.precision": rules.CHOSEN_BY_NEW,
        "flow_matching.timestep_sampling_mode": rules.DISTRIBUTION,
        "flow_matching.*": rules.TIMESTEPS,
        "hub.*": rules.UPLOADS,
        "wandb.*": rules.LOGS,
        "seed": rules.SEED,
        "output_dir": rules.OUTPUT_FOLDER,
    },
    model_by_name={},
)
