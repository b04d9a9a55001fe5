"""A request that a family has settled and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modules.contract.generation import Prompts, Request
from modules.contract.guidance import AS_PLAIN, GuidanceRules
from modules.layers.rope import Slow


@dataclass(frozen=True)
class Prepared:
    """One video or image that can be made, as `Family.prepare` returns it: nothing is left open or parsed
    again.
    """

    asked: Request  # without the media that the model does not take
    seed: int
    prompts: Mapping[int, Prompts]  # by section; 0 is always there
    negative_prompt: str
    width: int  # pixels
    height: int
    frames: int
    steps: int  # of the solver's schedule
    fps: float
    solver: str  # as `modules.flow.solvers` names it
    flow_shift: float
    guidance_scale: tuple[float, ...]  # one for each of `Family.experts`, in their order; 1: no guidance
    embedded_guidance: float | None  # None: the model has no input for it
    slow_frames: Slow | None = None  # a frequency of the frames' positions, for a long video
    first_step: int = 0  # that is made; later than 0 if denoising starts from a video; set by the shared loop
    rules: GuidanceRules = AS_PLAIN  # of the model's guidance
    own: Any = None  # what only the family reads, in a record of its own
    own_metadata: Mapping[str, str] = field(default_factory=dict)  # what outputs say of it, by name

    @property
    def num_steps(self) -> int:
        """How many steps are made."""
        return self.steps - self.first_step
