"""The nodes of a ComfyUI workflow that generates a run's samples; loaded by `workflow.py` when needed.

A file is in ComfyUI's API format: nodes by number, each with `class_type` and `inputs`; a link is the number
of a node and that of its output. ComfyUI can open this format, and places the nodes itself. Source: ComfyUI's
documentation, "Workflow API format", and the `INPUT_TYPES` of its nodes.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, cast

from generation.experts import experts_by_step
from generation.sample_lines import read_sample_file
from modules.atomic_write import atomic_path
from modules.console import quiet
from modules.errors import OptionError
from networks.formats.comfyui import describe_kind
from networks.lora_format import LoraFormat
from networks.names.layouts import COMFYUI, KNOWN
from protocols.family import Family
from protocols.requests import Prepared, Request
from protocols.workflows import ComfyModel, ComfyNode
from training.features.hooks import PlannedRun
from training.other_models import OtherFamilies
from training.reports.history import WORKFLOW
from training.samples import parse_requests

logger = logging.getLogger(__name__)

FLAG = "--save_workflow"
Link = list[str | int]
# fields of `Request` that the nodes can represent; `typed_texts` and `settings` only concern command lines
_REPRESENTED_FIELDS = {
    *("prompt", "seed", "width", "height", "frames", "steps", "guidance_scale", "embedded_guidance"),
    *("flow_shift", "solver", "fps", "negative_prompt", "expert_guidance", "typed_texts", "settings"),
}
# suffixes of files that ComfyUI lists
_LISTED_SUFFIXES = {
    ".safetensors",
    ".sft",
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
}
CONVERTED_SUFFIX = "_comfyui"  # suffix of the name of a LoRA that `convert_lora.py` has converted


@dataclass(frozen=True)
class ComfyLora:
    """File name and strength of a LoRA in a ComfyUI loader node."""

    name: str  # name of the file
    strength: float = 1.0


class HasComfyNodes(Protocol):
    """A family that knows which ComfyUI nodes generate its samples."""

    def comfy_model(self) -> ComfyModel:
        """Return the ComfyUI loader settings and nodes for this model.

        Raises:
            OptionError: If this variant of the model needs ComfyUI nodes that this program does not know.
                The message contains only the reason.
        """


def find_model(family: Family, others: OtherFamilies) -> ComfyModel:
    """Return the description of the ComfyUI nodes that generate with a run's model.

    Raises:
        OptionError: If the nodes are not known, or if samples use transformers that are not trained.
    """
    if others.sampling is not None:
        raise OptionError(
            f"{FLAG} with {family.abilities.sampling_dit_option}: its workflow has the trained "
            "transformers, but samples are made with another one. Omit one of the two"
        )
    if not family.abilities.has_comfy_nodes:
        raise OptionError(
            f"{FLAG}: it is not known which ComfyUI nodes generate the samples of {family.name}. Omit it"
        )
    try:
        return cast("HasComfyNodes", family).comfy_model()
    except OptionError as error:
        raise OptionError(f"{FLAG}: for ComfyUI's nodes, {error}. Omit it") from None


def plan_workflows(plan: PlannedRun) -> "Workflows":
    """Return the writer of a run's workflows.

    Raises:
        OptionError: If ComfyUI cannot load this kind of LoRA, or cannot generate any of the samples.
    """
    options = plan.options
    assert options.network is not None  # a full model has no such option
    for kind in options.network.kinds:
        error = describe_kind(kind).module_error
        if error:
            raise OptionError(f"{FLAG}: {error}. Omit it")
    lora_format = plan.lora_format
    if lora_format is None:
        raise OptionError(
            f"{FLAG} with --network_module {options.network.network_module}: it is not known whether ComfyUI "
            "reads that package's files. Omit it"
        )
    prompts = options.samples.sample_prompts
    assert prompts is not None  # otherwise the feature is not on
    # kinds whose files can be converted for ComfyUI only with the model's weights
    needs_weights = any(kind.needs_weight for kind in options.network.kinds)
    reads_saved_files = _reads_tensor_names(lora_format) and (
        lora_format.name == COMFYUI or not needs_weights
    )
    workflows = Workflows(
        plan,
        find_model(plan.family, OtherFamilies()),
        prompts,
        reads_saved_files=reads_saved_files,
        needs_weights=needs_weights,
        sample_loras=tuple(ComfyLora(path.name, strength) for path, strength in options.samples.loras()),
    )
    workflows.update_samples()
    if not workflows.samples:
        reasons = "; ".join(workflows.skipped_prompts.values())
        raise OptionError(f"{FLAG}: no sample of {prompts} can be in it: {reasons}. Omit it")
    return workflows


def _reads_tensor_names(lora_format: LoraFormat) -> bool:
    """Return whether ComfyUI can load LoRA files with the tensor names of `lora_format`."""
    if lora_format.name == COMFYUI:
        return True
    lora_names = lora_format.family
    must_be_converted = lora_names is not None and COMFYUI.lower() in lora_names.converted_for.lower()
    return lora_format.name == KNOWN and not must_be_converted


@dataclass
class Workflows:
    """Write a ComfyUI workflow next to the files of each save."""

    plan: PlannedRun
    model: ComfyModel
    prompts: Path
    reads_saved_files: bool  # whether ComfyUI reads the LoRA files without conversion
    needs_weights: bool = False  # converting them requires the model
    sample_loras: Sequence[ComfyLora] = ()  # LoRAs of --sample_lora
    samples: dict[int, Prepared] = field(default_factory=dict)  # by index in the prompt file
    # why a prompt is not in the workflow, by index
    skipped_prompts: dict[int, str] = field(default_factory=dict)
    _text: str = ""  # content of the prompt file

    def update_samples(self) -> None:
        """Read the prompt file again if it has changed; set `samples` and `skipped_prompts`.

        If the file cannot be used, the samples of the last call are kept.

        Raises:
            OptionError: If the file cannot be used, and there are no samples of an earlier call.
        """
        try:
            text = read_sample_file(self.prompts)
            if text == self._text:
                return
            with quiet():  # the sampler logs the same warnings
                _, requests = parse_requests(self.plan.family, text, self.prompts)
        except OptionError:
            if self.samples:
                return
            raise
        self._text, self.samples, self.skipped_prompts = text, {}, {}
        for index, prepared in enumerate(requests):
            reason = find_obstacle(self.model, prepared)
            if reason:
                self.skipped_prompts[index] = reason
            else:
                self.samples[index] = prepared

    def log_limits(self) -> None:
        """Log what the workflows lack, and what has to be done before they can be used."""
        for index, reason in self.skipped_prompts.items():
            logger.warning("%s: prompt %d is not in the workflow: %s", FLAG, index + 1, reason)
        if not self.reads_saved_files:
            logger.info(
                "%s: ComfyUI reads this run's LoRAs once they are converted, and the workflow names the "
                "converted file: python convert_lora.py --input NAME.safetensors --output "
                "NAME%s.safetensors --target %s%s",
                FLAG,
                CONVERTED_SUFFIX,
                COMFYUI,
                " --dit MODEL" if self.needs_weights else "",
            )
        for path in self.plan.family.dit_files:
            if path.suffix not in _LISTED_SUFFIXES:
                logger.warning(
                    "%s: ComfyUI's own nodes do not load %s: choose the released model there",
                    FLAG,
                    path,
                )

    def write(self, paths: Sequence[Path]) -> None:
        """Write one workflow file per LoRA. The two LoRAs of a model with two transformers share one.

        Args:
            paths: Files of a save.
        """
        self.update_samples()
        names = self.plan.names
        for stem, files in groupby(sorted(paths), names.get_stem):
            # a LoRA file is named STEM or STEM_EXPERT
            lora_files = {names.full_stem(path)[len(stem) + 1 :]: path for path in files}
            path = names.folder / f"{stem}{WORKFLOW}"
            nodes = self.make_nodes(lora_files)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(nodes, ensure_ascii=False, indent=2), encoding="utf-8")
            logger.info("Saved %s", path)

    def make_nodes(self, lora_files: Mapping[str, Path]) -> dict[str, Any]:
        """Return the ComfyUI nodes of a workflow, by key, for all samples that it can generate.

        Args:
            lora_files: LoRA files by the name of their expert; "" for a file for all experts.
        """
        family = self.plan.family
        loras = []
        for expert in family.experts:
            path = lora_files.get(expert.name) or lora_files.get("")
            trained_loras = [] if path is None else [ComfyLora(self._lora_name(path))]
            loras.append([*trained_loras, *self.sample_loras])
        files = [path.name for path in family.dit_files]
        graph = ComfyGraph(self.model, files, loras)
        for index, prepared in self.samples.items():
            expert_by_step = [0] * prepared.steps
            if len(files) > 1:
                with quiet():
                    expert_by_step = list(experts_by_step(family, prepared))
            graph.add_sample(prepared, expert_by_step, f"{self.plan.names.name}_{index:02d}")
        return graph.nodes

    def _lora_name(self, path: Path) -> str:
        return path.name if self.reads_saved_files else f"{path.stem}{CONVERTED_SUFFIX}{path.suffix}"


def find_obstacle(model: ComfyModel, prepared: Prepared) -> str:
    """Return why the ComfyUI nodes of a model cannot generate a sample; "" if they can."""
    request = prepared.request
    default = Request(request.prompt, request.seed)
    names = [field.name for field in fields(Request) if field.name not in _REPRESENTED_FIELDS]
    unsupported = [name for name in names if getattr(request, name) != getattr(default, name)]
    if unsupported:
        return f"its nodes have no {', '.join(unsupported)}"
    if prepared.solver not in model.samplers:
        return f"ComfyUI has no sampler like {prepared.solver}"
    return ""


@dataclass
class ComfyGraph:
    """Nodes of a ComfyUI workflow by ID; equal nodes are added only once, so that samples share loaders."""

    model: ComfyModel
    files: Sequence[str]  # file names of the transformers, or of the checkpoint
    loras: Sequence[Sequence[ComfyLora]]  # LoRAs of each file
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add_node(self, name: str, **inputs: Any) -> str:
        """Return the ID of the node with class `name` and these inputs; create it if it does not exist."""
        node = {"class_type": name, "inputs": inputs}
        for number, other in self.nodes.items():
            if node == other:
                return number
        number = str(len(self.nodes) + 1)
        self.nodes[number] = node
        return number

    def add_sample(self, prepared: Prepared, expert_by_step: Sequence[int], prefix: str) -> None:
        """Add the ComfyUI nodes of a sample: loaders, text encoding, latents, samplers, decoder and output.

        Args:
            prepared: Settings of the sample.
            expert_by_step: For each step, the index of the transformer that computes it.
            prefix: Prefix of the sample's file name.
        """
        models, text_encoders, vae = self._add_loaders(prepared)
        inputs: dict[str, Any] = {
            "positive": self._encode(prepared, text_encoders, prepared.prompts[0].positive.text),
            "negative": self._encode(prepared, text_encoders, prepared.negative_prompt),
        }
        size = {"width": prepared.width, "height": prepared.height}
        if self.model.has_length:
            size["length"] = prepared.frames
        latents: Link = [self.add_node(self.model.latent, **size, batch_size=1), 0]
        for steps in _step_ranges(expert_by_step):
            inputs |= {"model": models[steps.expert], "latent_image": latents}
            latents = self._sample(prepared, steps, inputs)
        pixels: Link = [self.add_node("VAEDecode", samples=latents, vae=vae), 0]
        if prepared.frames == 1:
            self.add_node("SaveImage", images=pixels, filename_prefix=prefix)
            return
        video: Link = [self.add_node("CreateVideo", images=pixels, fps=float(prepared.fps)), 0]
        # older releases take the codec as a separate input, newer ones as part of the format
        codec = {"codec": "auto", "format": "auto", "format.codec": "auto"}
        self.add_node("SaveVideo", video=video, filename_prefix=prefix, **codec)

    def _add_loaders(self, prepared: Prepared) -> tuple[list[Link], Link, Link]:
        """Add the nodes that load the model and its LoRAs."""
        # Return the links to models, text encoders and VAE.
        # A link is a pair: the key of a node and the index of its output.
        model = self.model
        if model.text_encoders:
            models, text_encoders, vae = self._load_separate_files()
        else:
            models, text_encoders, vae = self._load_single_file()
        models, text_encoders = self._add_loras(models, text_encoders)
        models = [self._patch("model", link, model.patches(prepared)) for link in models]
        return models, self._patch("clip", text_encoders, model.text_patches), vae

    def _load_separate_files(self) -> tuple[list[Link], Link, Link]:
        """Add nodes that load transformers, text encoders and VAE from a file each; return the links."""
        text_encoders: Link = [self._load_texts(), 0]
        models: list[Link] = []
        for name in self.files:
            models.append([self.add_node("UNETLoader", unet_name=name, weight_dtype="default"), 0])
        return models, text_encoders, [self.add_node("VAELoader", vae_name=self.model.vae), 0]

    def _load_single_file(self) -> tuple[list[Link], Link, Link]:
        """Add the node that loads a checkpoint file with all parts; return the links to them."""
        # Output 0 of the node is the model, 1 the text encoder, and 2 the VAE, unless the VAE has its own
        # file.
        checkpoint = self.add_node("CheckpointLoaderSimple", ckpt_name=self.files[0])
        vae: Link = [checkpoint, 2]
        if self.model.vae:
            vae = [self.add_node("VAELoader", vae_name=self.model.vae), 0]
        return [[checkpoint, 0]], [checkpoint, 1], vae

    def _add_loras(self, models: Sequence[Link], text_encoders: Link) -> tuple[list[Link], Link]:
        """Add nodes that load the LoRAs; return the links to the changed models and text encoders."""
        changed_models = list(models)
        for index, loras in enumerate(self.loras):
            for lora in loras:
                inputs = {"lora_name": lora.name, "strength_model": lora.strength}
                model = changed_models[index]
                if len(models) > 1:  # a LoRA for one of two transformers never has text encoders
                    node = self.add_node("LoraLoaderModelOnly", model=model, **inputs)
                else:
                    inputs["strength_clip"] = lora.strength
                    node = self.add_node("LoraLoader", model=model, clip=text_encoders, **inputs)
                    text_encoders = [node, 1]
                changed_models[index] = [node, 0]
        return changed_models, text_encoders

    def _load_texts(self) -> str:
        """Add the node that loads the text encoders, whose type depends on their number; return its ID."""
        names, text_type = self.model.text_encoders, self.model.text_type
        if len(names) == 1:
            return self.add_node("CLIPLoader", clip_name=names[0], type=text_type, device="default")
        first, second = names
        files = {"clip_name1": first, "clip_name2": second}
        return self.add_node("DualCLIPLoader", **files, type=text_type, device="default")

    def _patch(self, name: str, link: Link, patches: Sequence[ComfyNode]) -> Link:
        """Add nodes in a row that each change an output, such as a model."""
        # Return the link to the last node.
        # `name` is the input through which each node gets the output of the node before.
        for patch in patches:
            link = [self.add_node(patch.name, **{name: link}, **patch.inputs), 0]
        return link

    def _encode(self, prepared: Prepared, text_encoders: Link, text: str) -> Link:
        """Add nodes that encode a prompt, with embedded guidance if the model has it; return the output."""
        reads_weights_only_in_comfyui = self.model.weighs_words and not self.model.is_weighted
        if reads_weights_only_in_comfyui:  # escape parentheses, which mark weights there
            text = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        encoded: Link = [self.add_node("CLIPTextEncode", text=text, clip=text_encoders), 0]
        guidance = prepared.embedded_guidance
        if not self.model.guidance or guidance is None:
            return encoded
        return [self.add_node(self.model.guidance, conditioning=encoded, guidance=guidance), 0]

    def _sample(self, prepared: Prepared, steps: "ComfySteps", inputs: Mapping[str, Any]) -> Link:
        """Add a ComfyUI sampler node for a range of steps of one expert; return the link to its latents."""
        sampler = self.model.samplers[prepared.solver]
        sampler_inputs = {
            "steps": prepared.steps,
            "cfg": cfg_scale(prepared, steps.expert),
            "sampler_name": sampler,
            "scheduler": self.model.schedulers.get(sampler, self.model.scheduler),
            **inputs,
        }
        if steps.are_all:
            return [self.add_node("KSampler", seed=prepared.seed, denoise=1.0, **sampler_inputs), 0]
        # only the first range of steps adds noise, and only the last one removes all that is left
        node = self.add_node(
            "KSamplerAdvanced",
            add_noise="enable" if steps.first == 0 else "disable",
            noise_seed=prepared.seed,
            start_at_step=steps.first,
            end_at_step=steps.end,
            return_with_leftover_noise="disable" if steps.end == prepared.steps else "enable",
            **sampler_inputs,
        )
        return [node, 0]


def cfg_scale(prepared: Prepared, expert: int) -> float:
    """Return the guidance scale of a transformer in the usual convention: 1 means no guidance."""
    scale = prepared.guidance_scale[expert]
    return scale + 1 - prepared.rules.neutral_scale


@dataclass(frozen=True)
class ComfySteps:
    """A range of consecutive denoising steps that one transformer computes in ComfyUI."""

    expert: int
    first: int
    end: int  # exclusive
    are_all: bool  # whether these are all steps of the sample


def _step_ranges(expert_by_step: Sequence[int]) -> Iterator[ComfySteps]:
    first = 0
    for expert, steps in groupby(expert_by_step):
        end = first + len(list(steps))
        yield ComfySteps(expert, first, end, are_all=end - first == len(expert_by_step))
        first = end
