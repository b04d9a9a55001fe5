"""FLUX.1 and Chroma as data: the dimensions of a transformer, the releases, their settings."""

from dataclasses import dataclass

from protocols.rules import ModelRelease

DEV, SCHNELL, CHROMA = "dev", "schnell", "chroma"  # kinds of transformer
FLUX_DEV = ModelRelease(
    ("black-forest-labs/FLUX.1-dev",),
    "FLUX.1 [dev] Non-Commercial License",
    "other",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)
FLUX_SCHNELL = ModelRelease(
    ("black-forest-labs/FLUX.1-schnell",),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
CHROMA1 = ModelRelease(
    ("lodestones/Chroma1-HD",),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
RELEASES = {DEV: FLUX_DEV, SCHNELL: FLUX_SCHNELL, CHROMA: CHROMA1}
ARCHITECTURES = {DEV: "flux-1-dev", SCHNELL: "flux-1-schnell", CHROMA: "chroma"}  # modelspec.architecture
BASE_VERSIONS = {DEV: "flux1", SCHNELL: "flux1", CHROMA: "chroma"}  # ss_base_model_version
# tokens that T5 reads, as trained
T5_TOKENS = {DEV: 512, SCHNELL: 256, CHROMA: 512}
EMBEDDED_GUIDANCE = {DEV: 3.5, SCHNELL: None, CHROMA: 0.0}  # default; None if the model has no such input
STEPS = {DEV: 50, SCHNELL: 4, CHROMA: 50}
PATCH = 2  # height and width of the latents in a token


@dataclass(frozen=True)
class ApproximatorConfig:
    """Dimensions of Chroma's network that computes all modulations."""

    in_dim: int  # a quarter each for timestep and guidance, half for the number of the modulation
    dim: int
    layers: int


@dataclass(frozen=True)
class FluxConfig:
    """Dimensions of a FLUX.1 or Chroma transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    double_blocks: int
    single_blocks: int
    token_dim: int  # width of a token: latent channels x 2 x 2
    text_dim: int  # width of T5's states
    pooled_dim: int = 0  # width of CLIP-L's pooled output; 0: the model takes none
    freq_dim: int = 256
    has_guidance: bool = False  # guidance is an input of the model
    approximator: ApproximatorConfig | None = None  # for Chroma only
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def kind(self) -> str:
        """Kind of the model: Chroma, dev (with guidance as an input) or schnell."""
        if self.approximator is not None:
            return CHROMA
        return DEV if self.has_guidance else SCHNELL

    @property
    def channels(self) -> int:
        """Return the number of latent channels."""
        return self.token_dim // PATCH**2

    @property
    def modulations(self) -> int:
        """Return how many rows Chroma's approximator computes: 344 for the published model."""
        return 3 * self.single_blocks + 12 * self.double_blocks + 2
