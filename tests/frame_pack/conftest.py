"""What tests of FramePack's training share."""

import pytest

from tests.frame_pack.projects import ProjectOf, projects_in


@pytest.fixture(scope="session")
def project_of(tmp_path_factory: pytest.TempPathFactory) -> ProjectOf:
    """A family's commands, and a folder with its models and caches. Nothing in it may be changed."""
    return projects_in(tmp_path_factory.mktemp)
