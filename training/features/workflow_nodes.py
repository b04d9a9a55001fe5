"""The nodes of a ComfyUI workflow that generates a run's samples; loaded by `workflow.py` when needed.

A file is in ComfyUI's API form: nodes by number, each with `class_type` and `inputs`; a link is the number of
a node and that of its output. ComfyUI opens this form too, and places the nodes itself. Source: ComfyUI's
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
# fields of `Request` that the nodes can represent; `typed` and `settings` only concern command lines
_HELD = {
    *("prompt", "seed", "width", "height", "frames", "steps", "guidance_scale", "embedded_guidance"),
    *("flow_shift", "solver", "fps", "negative_prompt", "expert_guidance", "typed", "settings"),
}
_READ = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"}  # suffixes of files that ComfyUI lists
CONVERTED = "_comfyui"  # suffix of the name of a LoRA that `convert_lora.py` has converted


@dataclass(frozen=True)
class ComfyLora:
    """File name and strength of a LoRA in a ComfyUI loader node."""

    name: str  # name of the file
    strength: float = 1.0


class HasComfyNodes(Protocol):
    """A family that knows which ComfyUI nodes generate its samples."""

    def comfy_model(self) -> ComfyModel:
        """Return how ComfyUI runs this model.

        Raises:
            OptionError: If this variant of the model needs nodes that are not known here; the message is the
                reason alone.
        """


def find_model(family: Family, others: OtherFamilies) -> ComfyModel:
    """Return the description of the ComfyUI nodes that run the model of a run.

    Raises:
        OptionError: If the nodes are not known, or if samples use transformers that are not trained.
    """
    if others.sampling is not None:
        raise OptionError(
            f"{FLAG} with {family.can.sample_apart}: its workflow has the transformers that learn, and "
            "samples are made with another one. Leave out one of the two"
        )
    if not family.can.tell_nodes:
        raise OptionError(
            f"{FLAG}: which nodes of ComfyUI make the samples of {family.name} is not certain. Leave it out"
        )
    try:
        return cast("HasComfyNodes", family).comfy_model()
    except OptionError as error:
        raise OptionError(f"{FLAG}: of the nodes of ComfyUI, {error}. Leave it out") from None


def plan_workflows(plan: PlannedRun) -> "Workflows":
    """Return the writer of a run's workflows.

    Raises:
        OptionError: If ComfyUI reads no LoRA of the kind, or if no sample can be made there.
    """
    options = plan.options
    assert options.network is not None  # a full model has no such option
    for kind in options.network.kinds:
        if kind.not_in_comfyui:
            raise OptionError(f"{FLAG}: {kind.not_in_comfyui}. Leave it out")
    lora_format = plan.lora_format
    if lora_format is None:
        raise OptionError(
            f"{FLAG} with --network_module {options.network.network_module}: whether ComfyUI reads that "
            "package's files is not known here. Leave it out"
        )
    lora_names = lora_format.family
    # the known tensor names can be read by ComfyUI, unless this family's LoRAs must be converted for it
    reads_known = lora_names is None or COMFYUI.lower() not in lora_names.converted_for.lower()
    prompts = options.samples.sample_prompts
    assert prompts is not None  # else the feature is not on
    # kinds whose files can be converted for ComfyUI only with the model's weights
    needs_weights = any(kind.needs_weight for kind in options.network.kinds)
    workflows = Workflows(
        plan,
        find_model(plan.family, OtherFamilies()),
        prompts,
        is_read=lora_format.name == COMFYUI
        or (lora_format.name == KNOWN and reads_known and not needs_weights),
        needs_weights=needs_weights,
        more_loras=tuple(ComfyLora(path.name, strength) for path, strength in options.samples.loras()),
    )
    workflows.read_samples()
    if not workflows.samples:
        reasons = "; ".join(workflows.left_out.values())
        raise OptionError(f"{FLAG}: no sample of {prompts} can be in it: {reasons}. Leave it out")
    return workflows


@dataclass
class Workflows:
    """Write a ComfyUI workflow next to the files of each save."""

    plan: PlannedRun
    model: ComfyModel
    prompts: Path
    is_read: bool  # ComfyUI reads the LoRA files as they are saved
    needs_weights: bool = False  # converting them takes the model
    more_loras: Sequence[ComfyLora] = ()  # LoRAs of --sample_lora
    samples: dict[int, Prepared] = field(default_factory=dict)  # by index in the prompt file
    left_out: dict[int, str] = field(default_factory=dict)  # why a prompt is not in the workflow, by index
    _text: str = ""  # content of the prompt file

    def read_samples(self) -> None:
        """Read the prompt file, which may change while the run trains; a faulty one keeps the last samples.

        Raises:
            OptionError: If it cannot be used, and never could.
        """
        try:
            text = read_sample_file(self.prompts)
            if text == self._text:
                return
            with quiet():  # the sampler logs the same warnings
                _, requests = parse_requests(self.plan.family, text, self.prompts)
        except OptionError:
            if not self.samples:
                raise
            return
        self._text, self.samples, self.left_out = text, {}, {}
        for index, prepared in enumerate(requests):
            reason = find_obstacle(self.model, prepared)  # why ComfyUI cannot make it, "" if it can
            if reason:
                self.left_out[index] = reason
            else:
                self.samples[index] = prepared

    def say_limits(self) -> None:
        """Log what the workflows lack, and what has to be done before they can be used."""
        for index, reason in self.left_out.items():
            logger.warning("%s: prompt %d is not in the workflow: %s", FLAG, index + 1, reason)
        if not self.is_read:
            logger.info(
                "%s: ComfyUI reads this run's LoRAs once they are converted, and the workflow names the "
                "converted file: python convert_lora.py --input NAME.safetensors --output "
                "NAME%s.safetensors --target %s%s",
                FLAG,
                CONVERTED,
                COMFYUI,
                " --dit MODEL" if self.needs_weights else "",
            )
        for path in self.plan.family.dit_files:
            if path.suffix not in _READ:
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
        self.read_samples()
        names = self.plan.names
        for stem, files in groupby(sorted(paths), names.stem_of):
            # a file is named STEM or STEM_PART; the key is PART, or ""
            by_part = {names.full_stem(path)[len(stem) + 1 :]: path for path in files}
            path = names.folder / f"{stem}{WORKFLOW}"
            nodes = self.make_nodes(by_part)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(nodes, ensure_ascii=False, indent=2), encoding="utf-8")
            logger.info("Saved %s", path)

    def make_nodes(self, by_part: Mapping[str, Path]) -> dict[str, Any]:
        """Return the ComfyUI nodes of a workflow by their keys: those of all samples that it can generate.

        Args:
            by_part: LoRA files by the name of their expert; "" for a file for all experts.
        """
        family = self.plan.family
        loras = []
        for expert in family.experts:
            path = by_part.get(expert.name) or by_part.get("")
            trained = [] if path is None else [ComfyLora(self._name_of(path))]
            loras.append([*trained, *self.more_loras])
        files = [path.name for path in family.dit_files]
        graph = ComfyGraph(self.model, files, loras)
        for index, prepared in self.samples.items():
            with quiet():
                # index of the expert that denoises each step
                turns = experts_by_step(family, prepared) if len(files) > 1 else [0] * prepared.steps
            graph.add_sample(prepared, turns, f"{self.plan.names.name}_{index:02d}")
        return graph.nodes

    def _name_of(self, path: Path) -> str:
        return path.name if self.is_read else f"{path.stem}{CONVERTED}{path.suffix}"


def find_obstacle(model: ComfyModel, prepared: Prepared) -> str:
    """Return why the nodes cannot generate a sample; "" if they can."""
    request = prepared.request
    plain = Request(request.prompt, request.seed)
    others = [one.name for one in fields(Request) if one.name not in _HELD]
    used = [name for name in others if getattr(request, name) != getattr(plain, name)]
    if used:
        return f"its nodes have no {', '.join(used)}"
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

    def add(self, name: str, **inputs: Any) -> str:
        """Return the ID of the node with this name and these inputs; create the node if it is missing."""
        node = {"class_type": name, "inputs": inputs}
        for number, other in self.nodes.items():
            if node == other:
                return number
        number = str(len(self.nodes) + 1)
        self.nodes[number] = node
        return number

    def add_sample(self, prepared: Prepared, turns: Sequence[int], prefix: str) -> None:
        """Add the ComfyUI nodes of a sample: loaders, texts, latents, samplers, decoder and output.

        Args:
            prepared: Settings of the sample.
            turns: For each step, the index of the transformer that takes it.
            prefix: Prefix of the sample's file name.
        """
        models, text_encoders, vae = self._load(prepared)
        inputs: dict[str, Any] = {
            "positive": self._encode(prepared, text_encoders, prepared.prompts[0].positive.text),
            "negative": self._encode(prepared, text_encoders, prepared.negative_prompt),
        }
        size = {"width": prepared.width, "height": prepared.height}
        if self.model.has_length:
            size["length"] = prepared.frames
        latents: Link = [self.add(self.model.latent, **size, batch_size=1), 0]
        for part in _parts_of(turns):
            inputs |= {"model": models[part.expert], "latent_image": latents}
            latents = self._sample(prepared, part, inputs)
        pixels: Link = [self.add("VAEDecode", samples=latents, vae=vae), 0]
        if prepared.frames == 1:
            self.add("SaveImage", images=pixels, filename_prefix=prefix)
            return
        video: Link = [self.add("CreateVideo", images=pixels, fps=float(prepared.fps)), 0]
        # older releases take the codec by itself, newer ones as a part of the format
        codec = {"codec": "auto", "format": "auto", "format.codec": "auto"}
        self.add("SaveVideo", video=video, filename_prefix=prefix, **codec)

    def _load(self, prepared: Prepared) -> tuple[list[Link], Link, Link]:
        """Add the nodes that load the model and its LoRAs; return the links to models, text encoders and VAE.

        A link is a pair: the key of a node and the index of its output.
        """
        model = self.model
        if model.text_encoders:
            text_encoders: Link = [self._load_texts(), 0]
            models: list[Link] = [
                [self.add("UNETLoader", unet_name=name, weight_dtype="default"), 0] for name in self.files
            ]
        else:
            checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=self.files[0])
            models, text_encoders = [[checkpoint, 0]], [checkpoint, 1]
        vae: Link = [self.add("VAELoader", vae_name=model.vae), 0] if model.vae else [checkpoint, 2]
        for index, loras in enumerate(self.loras):
            for lora in loras:
                strength = {"lora_name": lora.name, "strength_model": lora.strength}
                if len(models) > 1:  # no LoRA for one of two transformers has text encoders
                    node = self.add("LoraLoaderModelOnly", model=models[index], **strength)
                    models[index] = [node, 0]
                    continue
                strength["strength_clip"] = lora.strength
                node = self.add("LoraLoader", model=models[index], clip=text_encoders, **strength)
                models[index], text_encoders = [node, 0], [node, 1]
        models = [self._patch("model", link, model.patches(prepared)) for link in models]
        return models, self._patch("clip", text_encoders, model.text_patches), vae

    def _load_texts(self) -> str:
        """Add the node that loads the text encoders, whose type depends on their number; return its ID."""
        names, text_type = self.model.text_encoders, self.model.text_type
        if len(names) == 1:
            return self.add("CLIPLoader", clip_name=names[0], type=text_type, device="default")
        first, second = names
        files = {"clip_name1": first, "clip_name2": second}
        return self.add("DualCLIPLoader", **files, type=text_type, device="default")

    def _patch(self, name: str, link: Link, patches: Sequence[ComfyNode]) -> Link:
        """Add nodes in a row that each change an output, such as a model; return the link to the last node.

        `name` is the input through which each node gets the output of the node before.
        """
        for patch in patches:
            link = [self.add(patch.name, **{name: link}, **patch.inputs), 0]
        return link

    def _encode(self, prepared: Prepared, text_encoders: Link, text: str) -> Link:
        """Add the nodes that encode a text, with embedded guidance if the model has it; return their link."""
        if (
            self.model.weighs_words and not self.model.is_weighted
        ):  # escape parentheses, which ComfyUI would read as weights
            text = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        encoded: Link = [self.add("CLIPTextEncode", text=text, clip=text_encoders), 0]
        guidance = prepared.embedded_guidance
        if not self.model.guidance or guidance is None:
            return encoded
        return [self.add(self.model.guidance, conditioning=encoded, guidance=guidance), 0]

    def _sample(self, prepared: Prepared, part: "ComfySteps", inputs: Mapping[str, Any]) -> Link:
        """Add a ComfyUI sampler node for a range of steps of one expert; return the link to its latents."""
        sampler = self.model.samplers[prepared.solver]
        sampler_inputs = {
            "steps": prepared.steps,
            "cfg": usual_scale(prepared, part.expert),
            "sampler_name": sampler,
            "scheduler": self.model.schedulers.get(sampler, self.model.scheduler),
            **inputs,
        }
        if part.is_whole:
            return [self.add("KSampler", seed=prepared.seed, denoise=1.0, **sampler_inputs), 0]
        # only the first range of steps adds noise, and only the last one removes all that is left
        node = self.add(
            "KSamplerAdvanced",
            add_noise="enable" if part.first == 0 else "disable",
            noise_seed=prepared.seed,
            start_at_step=part.first,
            end_at_step=part.end,
            return_with_leftover_noise="disable" if part.end == prepared.steps else "enable",
            **sampler_inputs,
        )
        return [node, 0]


def usual_scale(prepared: Prepared, expert: int) -> float:
    """Return the guidance scale of a transformer in the usual convention: 1 means no guidance."""
    scale = prepared.guidance_scale[expert]
    return scale + 1 - prepared.rules.off_at


@dataclass(frozen=True)
class ComfySteps:
    """A range of consecutive denoising steps that one transformer computes in ComfyUI."""

    expert: int
    first: int
    end: int  # exclusive
    is_whole: bool  # whether these are all steps of the sample


def _parts_of(turns: Sequence[int]) -> Iterator[ComfySteps]:
    first = 0
    for expert, steps in groupby(turns):
        end = first + len(list(steps))
        yield ComfySteps(expert, first, end, is_whole=end - first == len(turns))
        first = end
