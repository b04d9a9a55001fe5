"""Read how a dropped file was generated, to fill in the Generate form.

Files that this program wrote are read like its results (`result_settings.py`). Images from ComfyUI contain a
graph, images from AUTOMATIC1111's web UI contain text; prompts and plain numbers are read from both.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from browser.pages.generate.result_settings import PROMPT_LINE_KEYS, ResultSettings, find_family, parse_tags
from browser.runs.recipes import IMAGES, ModelRecipe, float_or_one
from modules.errors import OptionError
from modules.pages.language import refusal, say
from modules.text_files import parse_json

MAX_HOPS = 20  # maximum number of links followed in a workflow graph
MAX_GRAPH_LENGTH = 4 << 20  # characters
NO_SETTINGS = say(
    "It contains no settings: programs that edit images often remove them. To start from it, drop "
    "it on the field Start from, or on Edit."
)


@dataclass(frozen=True)
class DroppedSettings:
    """Settings that a file was generated with, read from its metadata."""

    program: str  # program that generated the file
    options: Mapping[str, str] = field(default_factory=dict)  # text of each option key, "prompt" included
    model: str = ""  # name of the model in the metadata
    task: str = ""
    loras: Mapping[str, str] = field(default_factory=dict)  # file name -> strength

    @property
    def family(self) -> str:
        """Model family, by the name that scripts use; "" if it is not known."""
        return find_family(self.model)

    def fields(self, recipe: ModelRecipe) -> dict[str, str]:
        """Return the prompt and the settings that the model supports, by form field."""
        texts = {"prompt": self.options.get("prompt", "")}
        for name, key in recipe.option_keys.items():
            text = self.options.get(key, "")
            if text and name not in IMAGES:
                texts[name] = text
        return texts


def read_dropped_settings(tags: Mapping[str, str]) -> DroppedSettings:
    """Return the settings in the metadata of a file. Raises OptionError if there are none."""
    result_settings = parse_tags(tags)
    if "prompt" in result_settings.values:
        return _convert_result(result_settings)
    for name in ("prompt", "comment"):
        graph = _read_graph(tags.get(name, ""))
        if graph:
            return _read_comfyui(graph)
    parameters = tags.get("parameters", "")
    if "\nSteps: " in parameters or parameters.startswith("Steps: "):
        return _read_parameters(parameters)
    raise OptionError(NO_SETTINGS)


def _convert_result(settings: ResultSettings) -> DroppedSettings:
    """Convert the settings of a file that this program generated into the settings of a form."""
    options = {PROMPT_LINE_KEYS.get(name, name): text for name, text in settings.values.items()}
    if options.get("video_length") == "1":
        del options["video_length"]
    return DroppedSettings(
        program="Reelsmith",
        options=options,
        model=settings.get("model_type"),
        task=settings.get("task"),
        loras={lora.name: f"{float_or_one(lora.strength):g}" for lora in settings.loras},
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_graph(text: str) -> dict[str, Any]:
    """Return the nodes of a ComfyUI graph in JSON by id; {} if the text is not a graph."""
    if not text.lstrip().startswith("{") or len(text) > MAX_GRAPH_LENGTH:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        graph = parse_json(text)
        if isinstance(graph, dict) and isinstance(graph.get("prompt"), str):  # in a video's metadata
            graph = parse_json(graph["prompt"])
        nodes = graph.values() if isinstance(graph, dict) else ()
        if nodes and all(isinstance(node, dict) and "class_type" in node for node in nodes):
            return graph
    return {}


_COMFYUI_NUMBERS = {"seed": "seed", "noise_seed": "seed", "steps": "infer_steps", "cfg": "guidance_scale"}
_COMFYUI_SIZES = {"width": "video_size_width", "height": "video_size_height"}


def _read_comfyui(graph: Mapping[str, Any]) -> DroppedSettings:
    """Return the prompts, numbers and size of the first sampler in a ComfyUI graph."""
    # `graph` contains the nodes by id.
    for node in graph.values():
        inputs = node.get("inputs")
        if not isinstance(inputs, dict):
            continue
        positive = inputs.get("positive")  # only samplers have it: [id of the prompt's node, output number]
        prompt = _follow(graph, positive) if isinstance(positive, list) else ""
        if prompt:
            options = {"prompt": prompt, **_read_sampler_inputs(graph, inputs)}
            return DroppedSettings("ComfyUI", {key: text for key, text in options.items() if text})
    raise refusal(
        "It contains a ComfyUI graph in which no prompt can be identified: copy the prompt from there."
    )


def _read_sampler_inputs(graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return the negative prompt, numbers and size of a sampler in a ComfyUI graph, by option key."""
    options = {"negative_prompt": _follow(graph, inputs.get("negative"))}
    for name, key in _COMFYUI_NUMBERS.items():
        if isinstance(inputs.get(name), (int, float)):
            options[key] = f"{inputs[name]}"
    latent = inputs.get("latent_image")  # [id of the node that creates it, output number]
    sizes = {}
    if isinstance(latent, list) and latent:
        sizes = graph.get(str(latent[0]), {}).get("inputs", {})
    if isinstance(sizes, dict):
        for name, key in _COMFYUI_SIZES.items():
            if isinstance(sizes.get(name), int):
                options[key] = str(sizes[name])
    return options


def _follow(graph: Mapping[str, Any], link: Any) -> str:
    """Return the text to which a node's input link leads in a ComfyUI graph; "" if there is no plain text."""
    for _ in range(MAX_HOPS):
        if isinstance(link, str):
            return link
        if not isinstance(link, list) or not link:
            return ""
        node = graph.get(str(link[0]))
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if not isinstance(inputs, dict):
            return ""
        link = next((inputs[name] for name in FOLLOWED if name in inputs), None)
    return ""


# inputs of workflow nodes that may contain or lead to a text
FOLLOWED = ("text", "clip_l", "t5xxl", "conditioning", "positive", "value", "string", "prompt")


# `Steps: 20, Lora hashes: "a: b, c: d", Size: 512x768`: each part is read once, whatever it contains
SETTINGS = re.compile(r"(?:^|(?<=, ))([\w ]++): (\"(?:\\.|[^\"\\])*+\"|[^,]*+)(?:, |$)")


def _read_parameters(text: str) -> DroppedSettings:
    """Parse AUTOMATIC1111's metadata: the prompt, `Negative prompt:`, and a last line of settings."""
    # the settings are the last line, such as `Steps: 20, Seed: 1, Size: 512x768`
    prompts, _, settings_line = text.rpartition("\n")
    prompt, _, negative = prompts.partition("\nNegative prompt:")
    settings = dict(SETTINGS.findall(settings_line))
    options = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    names = {"Steps": "infer_steps", "CFG scale": "guidance_scale", "Seed": "seed"}
    for name, key in names.items():
        if _is_number(settings.get(name, "")):
            options[key] = settings[name]
    size = re.fullmatch(r"(\d+)x(\d+)", settings.get("Size", ""))
    if size:
        options |= {"video_size_width": size[1], "video_size_height": size[2]}
    return DroppedSettings(
        program="AUTOMATIC1111's web UI", options={key: text for key, text in options.items() if text}
    )
