"""Every option of the generation scripts that changes pixels stands in the metadata of what it made."""

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fpack_generate_video
import hv_generate_video
import ltx2_generate_video
import wan_generate_video
from frame_pack import options as frame_pack
from generation.experts import ExpertOffloader
from generation.loaded_networks import Session
from generation.options import GenerationOptions, generation_parser, read_generation
from generation.request import GenerationRun, make_request
from generation.script_options import ScriptDefaults
from hunyuan_model import options as hunyuan
from ltx_2 import options as ltx_2
from ltx_2.given_media_options import Ltx2GivenMedia
from modules.options import get_option_info
from modules.parser import add_options
from tests.generation.toy_family import ToyFamily
from tests.preparing import prepare
from wan import options as wan


@dataclass(frozen=True)
class Script:
    """A generation script's options."""

    defaults: ScriptDefaults
    record: type[Any]

    @functools.cached_property
    def actions(self) -> Mapping[str, argparse.Action]:
        """Its options by name, without those that are refused."""
        parser = generation_parser(None, self.defaults)
        add_options(parser, self.record)
        supported = [action for action in parser._actions if not hasattr(action, "rejection")]
        return {action.dest: action for action in supported if action.dest != "help"}

    @functools.cached_property
    def facts(self) -> Mapping[str, str]:
        """What of a video's metadata its options are: `setting`, `request`, `decoding` or `nothing`."""
        info = get_option_info(GenerationOptions) | get_option_info(self.record)
        # --optimized turns on options that are recorded
        own = dict.fromkeys(["optimized", "scheduler"], "request")
        return {
            name: info[name].get("record", "setting") if name in info else own[name] for name in self.actions
        }

    def read(self, *arguments: str) -> GenerationOptions:
        return read_generation(None, self.defaults, self.record, ["--save_path", "made", *arguments])[0]


SCRIPTS = {
    "wan": Script(wan_generate_video.DEFAULTS, wan.WanGenerationOptions),
    "hv": Script(hv_generate_video.DEFAULTS, hunyuan.HunyuanGenerationOptions),
    "fpack": Script(fpack_generate_video.DEFAULTS, frame_pack.FramePackGenerationOptions),
    "ltx2": Script(ltx2_generate_video.DEFAULTS, ltx_2.Ltx2GenerationOptions),
}
# said by the family when it has settled a request, and by the run
FROM_FAMILY = {
    *("task", "device", "f1", "latent_window_size", "one_frame_auto_resize"),
    # of LTX-2; its tests of references and stages see them
    *("reference_video", "reference_videos", "reference_strength", "video_conditioning"),
    *("conditioning_attention_mask", "distilled_lora"),
    *("reference_audio", "audio_ref_identity_guidance_scale"),
    *get_option_info(Ltx2GivenMedia),  # tests/ltx_2/test_given_media_options.py
}
SAID_AS = {  # where the metadata has another name for it
    "seed": ("seeds",),
    "video_size": ("height", "width"),
    "one_frame_inference": ("one_frame",),
    "lora_weight": ("lora_0",),
    "lora_multiplier": ("lora_0",),
    "lora_weight_high_noise": ("lora_high_noise_0",),
    "lora_multiplier_high_noise": ("lora_high_noise_0",),
    "optimized": ("attn_mode", "compile", "fp8_scaled"),
    "scheduler": ("sample_solver",),
}
RECORDED = [
    (name, option)
    for name, script in SCRIPTS.items()
    for option, kind in script.facts.items()
    if kind != "nothing" and option not in FROM_FAMILY
    if script.actions[option].default is not True  # a switch that is always on
]
SHARES = {
    "magcache_retention_ratio",
    "strength",
    "v2v_denoise",
    "guidance_rescale",
    "cfg_apply_ratio",
    "slg_start",
    "slg_end",
    "nag_alpha",
    *("rescale_scale", "video_rescale_scale", "audio_rescale_scale"),
}  # not above 1
LORA = __file__  # a file that is there
VALUES = {  # where any value of the right type does not do
    "seed": ["5"],
    "prompt_wildcards": [str(Path(__file__).parent)],
    "scheduler": ["dpm++"],
    "video_size": ["48", "64"],
    "vae_spatial_tile_sample_min_size": ["64"],
    "te_multiplier": ["1.5", "0.5"],
    "slg_layers": ["9,10"],
    "latent_paddings": ["3,2,0"],
    "compile_args": ["inductor", "default", "True", "False"],
    "compile_mode": ["max-autotune"],
    "lora_weight": [LORA],
    "lora_blocks": ["0=0.5"],
    "lora_weight_high_noise": [LORA],
    "ltx_mode": ["av"],
    **dict.fromkeys(
        ["drive_video", "spatial_upsampler_path", "temporal_upsampler_path", "distilled_lora_path"], [LORA]
    ),
    "post": ["upscaler model=x.pth"],
    "textual_inversion_embeddings": [LORA],
}
WITH = {  # what has to be given too
    "cfg_skip_mode": ["--cfg_apply_ratio", "0.25"],
    "cfg_apply_ratio": ["--cfg_skip_mode", "late"],
    "upcast_linear": ["--fp8_scaled"],
    "upcast_quantization": ["--fp8_scaled"],
    **dict.fromkeys(
        ["compile_args", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph"],
        ["--compile"],
    ),
    **dict.fromkeys(
        ["strength", "v2v_denoise", "v2v_noise_mode", "v2v_pad_mode", "v2v_extra_noise"],
        ["--video_path", "clip.mp4"],
    ),
    "drive_video": ["--ltx2_mode", "av"],
    "sample_two_stage": ["--spatial_upsampler_path", LORA],
    "i2_extra_noise": ["--i2i_path", "start.png"],
    "rope_scaling_factor": ["--rope_scaling_timestep_threshold", "800"],
    **dict.fromkeys(["lora_blocks", "lora_multiplier", "lora_rounding"], ["--lora_weight", LORA]),
    "lora_multiplier_high_noise": ["--lora_weight_high_noise", LORA],
    "wan riflex_index": ["--rope_func", "comfy"],
    "teacache_coefficients": ["--teacache_threshold", "0.1"],
    "wan one_frame_inference": ["--task", "i2v-14B"],
    **dict.fromkeys(
        ["vace", "wan control_path", "src_mask", "wan control_image_path", "vace_scale"],
        ["--task", "vace-14B"],
    ),
    "vace_high_noise": ["--task", "vace-A14B", "--vace", "x", "--dit_high_noise", "x"],
}


def recorded(options: GenerationOptions) -> Mapping[str, str]:
    """The metadata of the video that the options ask for, as of a family that records its own options as they
    are.
    """
    device = torch.device("cpu")
    dits = ExpertOffloader(ToyFamily().experts, device, lambda expert: torch.nn.Identity())
    run = GenerationRun(ToyFamily(), options, Session(ToyFamily(), device, dits))
    request = make_request(options.request)
    metadata = run.metadata(replace(prepare(request), extra_metadata=request.extra))
    assert metadata is not None
    return metadata


def another_value(action: argparse.Action) -> list[str]:
    """What may stand behind an option, and is not what it has by itself."""
    if action.nargs == 0 or action.dest in VALUES:
        return VALUES.get(action.dest, [])
    if action.choices is not None:
        return [next(str(choice) for choice in action.choices if choice != action.default)]
    if action.dest in SHARES:
        return ["0.75"]
    return ["8" if action.type in {int, float} else "x"]


@pytest.mark.parametrize(("name", "option"), RECORDED)
def test_every_option_that_changes_pixels_is_recorded(name: str, option: str) -> None:
    script = SCRIPTS[name]
    values, prompt = another_value(script.actions[option]), ["--prompt", "a cat"]
    needed = WITH.get(f"{name} {option}", WITH.get(option, []))
    metadata = recorded(script.read(*prompt, *needed, script.actions[option].option_strings[0], *values))
    keys = SAID_AS.get(option, (option,))
    said = [metadata[f"bt_{key}"] for key in keys]
    for value in values or ["True"]:
        assert any(Path(value).name in text for text in said), f"{option} {value} is not in {said}"
    assert not any(str(Path(LORA).parent) in text for text in metadata.values())  # files without folders
    assert said != [recorded(script.read(*prompt)).get(f"bt_{key}") for key in keys]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_option_that_is_not_given_is_not_recorded_unless_the_known_tools_do(name: str) -> None:
    found = recorded(SCRIPTS[name].read("--prompt", "a cat"))
    # Wan itself records the last with VACE only
    extra = {"bt_embedded_cfg_scale", "bt_video_seconds", "bt_guidance_rescale", "bt_vace_scale"}
    always = """
        model_type task tunerver seeds prompt negative_prompt infer_steps device creation_timestamp
        guidance_scale cfg_schedule flow_shift height width video_length fps sample_solver
    """
    assert found.keys() - extra == {f"bt_{name}" for name in always.split()}
