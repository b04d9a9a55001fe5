"""The options of the family: Wan's."""

from reelsmith.wan.options import *  # noqa: F403
