"""Options of sliders. Standard library only."""

from pathlib import Path

from modules.options import HABIT, Options, option


class SliderOptions(Options, title="slider"):
    """Which captions a slider moves between."""

    slider: Path | None = option(
        "TOML file with captions: at strength 1 the network moves a neutral caption's result towards the "
        "positive one, at -1 towards the negative one. Captions of the dataset are not used. Three more "
        "passes in each step without gradients, and one more with gradients",
        place="there",
        often=False,
        facts=HABIT,
    )


NO_SLIDER = SliderOptions.usual()
