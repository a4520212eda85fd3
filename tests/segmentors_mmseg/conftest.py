import pytest

from tests.tiny import save_sd15


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Drawn scenes of 64 pixels, in the layout of the embedded dataset."""
    from diffusion_features.embedded.dataset import write

    folder = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 8), ("validation", 2), ("test", 2)):
        write(folder, split, count, 64)
    return folder
