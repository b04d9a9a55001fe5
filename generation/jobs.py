"""Jobs of a run: those to do, and those done."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from blissful_tuner.latent_preview import LatentPreviews, make_previews
from blissful_tuner.metadata import output_metadata
from blissful_tuner.prompt_rewrite import PromptRewriter
from blissful_tuner.video_to_video_options import SourceOptions
from generation.expert_loras import loras_of
from generation.memory import Peaks
from generation.options import GenerationOptions
from generation.outputs import FrameTools
from generation.prompt_lines import parse_generation_line
from generation.session import Session
from modules.contract.family import Family
from modules.contract.requests import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationJob:
    """One request to generate; `label` names it in messages ("line 3")."""

    label: str
    prepared: Prepared
    stem: str | None = None  # of its files; None: the time, the seed and what the options add
    metadata: Mapping[str, str] | None = None  # None: as the run says


@dataclass(frozen=True)
class Denoised:
    """Latents of a job (1 C F H W, on the CPU), also kept in a file until its pixels are written."""

    job: GenerationJob
    latents: Tensor
    latent_path: Path
    stem: str
    preview: Path  # of the video while it was made, if there is one
    metadata: Mapping[str, str] | None  # of all files of the job: None with --no_metadata


@dataclass(frozen=True)
class GenerationRun:
    """Family, options and session that every mode works with."""

    family: Family
    options: GenerationOptions
    session: Session
    predicted: Peaks | None = None  # where it is known
    rewriter: PromptRewriter | None = None
    previews: LatentPreviews | None = None
    post: FrameTools | None = None  # what decoded frames go through
    now: Callable[[], datetime] = field(default=lambda: datetime.now().astimezone())

    def with_previews(self) -> "GenerationRun":
        """Return the same with the previews that the options ask for. Loads a decoder of 20 MB for them."""
        session, options = self.session, self.options
        made = make_previews(
            options.preview,
            self.family.latent,
            options.output.save_path,
            session.device,
            session.dit_can_stay,
        )
        return replace(self, previews=made)

    def metadata_of(self, job: GenerationJob) -> Mapping[str, str] | None:
        """Return the metadata of a job's files; None with --no_metadata."""
        return job.metadata or self.metadata(job.prepared)

    def metadata(self, prepared: Prepared) -> Mapping[str, str] | None:
        """Return the metadata of an output; None with --no_metadata."""
        if self.options.output.no_metadata:
            return None
        return output_metadata(
            prepared,
            self.family.metadata,
            self.loras,
            self.options.settings,
            self.session.device.type,
            self.now(),
            self.family.experts,
        )

    @property
    def loras(self) -> dict[str, list[tuple[str, float]]]:
        """Return the file name and the strength of each LoRA, by expert as `loras_of` names them."""
        return {
            expert: [
                (path.name, strength)
                for path, strength in zip(lora.lora_weight or (), lora.multipliers(), strict=True)
            ]
            for expert, lora in loras_of(self.options).items()
        }

    def read_line(self, line: str, where: str = "the prompt line") -> Mapping[str, Any]:
        """Parse a prompt line. where: names it in warnings. Raises OptionError."""
        return parse_generation_line(line, self.options.line_options, where)


def tell_unused_sources(options: SourceOptions, jobs: Sequence[GenerationJob]) -> None:
    """Warn of options of video-to-video that no job uses."""
    used = {job.prepared.asked.source.option for job in jobs if job.prepared.asked.source is not None}
    for given, needed in options.unused(used).items():
        logger.warning("%s is ignored because %s is not given", given, needed)
