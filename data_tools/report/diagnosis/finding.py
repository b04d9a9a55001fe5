"""What a diagnosis finds; standard library only, for `import reelsmith`."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A measured property that explains why a training falls short, and how to change it."""

    id: str  # stays the same in later versions: scripts select findings by it
    subject: str  # the word, file, table or block that it is about
    figure: float  # the measured value
    limit: float  # the value from which it is reported
    text: str  # a sentence with the figure
    meaning: str  # what follows for the training
    remedy: str  # the key, option or command that changes it
    files: Sequence[str] = ()  # captions or media files that the remedy is about, if they are some of many

    @property
    def lines(self) -> list[str]:
        """The finding as printed, with its id, meaning and remedy."""
        return [f"{self.text} [{self.id}]", f"  {self.meaning}", f"  {self.remedy}"]
