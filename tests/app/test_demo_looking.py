"""What the page shows of the inside of a model, against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segmentors.demo.looking import Look, attention, components, features, heads, layers, similar
from segmentors.demo.models import Loaded, Models
from segmentors.demo.recent import Recent
from tests.released import seeded
from tests.tiny import save_sd15

IDS = ["up-level1-repeat1-vit-out", "mid-vit-out"]
LOOK = Look("a photo of a red cat", 60, 2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Models([str(save_sd15(tmp_path_factory.mktemp("model")))])("model0")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray((seeded("looked at", 64, 64, 3).sigmoid() * 255).to(torch.uint8).numpy())


def test_features_are_the_extractors_and_are_kept(loaded: Loaded, picture: Image.Image) -> None:
    kept: Recent = Recent(2)
    found = features(loaded, picture, LOOK, IDS, kept)
    expected = loaded.fx(picture, LOOK.prompt, t=60, seed=2, activations=IDS, size=64)
    assert {*found} == {*IDS} and all(torch.equal(found[id], expected[id][0]) for id in IDS)
    assert features(loaded, picture, LOOK, IDS[::-1], kept) is found
    assert features(loaded, picture, LOOK._replace(prompt="a dog"), IDS, kept) is not found
    drawn = components(found, picture)
    assert [title.split()[0] for _, title in drawn] == [*found] and {image.size for image, _ in drawn} == {(384, 384)}


def test_a_point_is_found_where_it_was_moved() -> None:
    """The second picture's features are the first one's moved by two cells: the point must be found two cells on."""
    cells = seeded("cells", 24, 8, 8)
    one, two = {"x": cells}, {"x": cells.roll((2, 2), (1, 2))}
    picture = Image.new("RGB", (64, 64))
    found = similar(one, picture, (20, 28), (two, picture))
    place = [int(word) for word in found.said.replace(",", "").replace(":", "").split() if word.isdecimal()]
    assert place[:2] == [20, 28] and abs(place[2] - 36) <= 1 and abs(place[3] - 44) <= 1
    assert found.there is not None and found.here.size == found.there.size == (512, 512)
    with pytest.raises(ValueError, match="64, 3 is outside"):
        similar(one, picture, (64, 3))
    large = similar(one, picture, (200, 140), (two, picture), [(640, 320), (128, 64)])  # as they were before reduction
    place = [int(word) for word in large.said.replace(",", "").replace(":", "").split() if word.isdecimal()]
    assert place[:2] == [200, 140] and abs(place[2] - 72) <= 2 and abs(place[3] - 44) <= 1
    with pytest.raises(ValueError, match="640, 3 is outside"):
        similar(one, picture, (640, 3), sizes=[(640, 320)])


def test_similarity_is_brightest_at_the_point_itself() -> None:
    picture = Image.new("RGB", (32, 32))
    found = similar({"x": seeded("one", 16, 4, 4)}, picture, (12, 20))
    assert found.there is None and found.said.endswith("to 1.")
    bright = np.asarray(found.here.convert("L"), dtype=float)
    ring = 12
    x, y = 12.5 * 16, 20.5 * 16
    inside = bright[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3].mean()
    rows, columns = np.mgrid[:512, :512]
    far = np.hypot(rows - y, columns - x) > ring + 100
    assert inside > bright[far].max()


def test_attention_of_a_word_is_the_softmax_over_the_text(loaded: Loaded, picture: Image.Image) -> None:
    told, maps = attention(loaded, picture, LOOK, "cat")
    assert told == LOOK.prompt
    id = "mid-vit-block0-cross-map"
    names = [id, "mid-vit-block0-cross-q", "mid-vit-block0-cross-k"]
    made = loaded.fx(picture, told, t=60, seed=2, activations=names, size=64)
    query, key = made[names[1]][0].flatten(1).T.double(), made[names[2]][0].double()  # (P, C), (T, C)
    count = maps[id].shape[0]
    split = [(a.unflatten(1, (count, -1)).transpose(0, 1)) for a in (query, key)]
    naive = F.softmax(split[0] @ split[1].mT / split[0].shape[-1] ** 0.5, dim=-1)
    column = 1 + told.split().index("cat")  # each word of this prompt is a token, behind the first one
    assert torch.allclose(maps[id].flatten(1).double(), naive[:, :, column], atol=1e-6)
    assert torch.allclose(maps[id].flatten(1), made[id][0, :, :, column], atol=1e-6)


def test_a_word_that_is_not_in_the_prompt_is_written_behind_it(loaded: Loaded, picture: Image.Image) -> None:
    assert attention(loaded, picture, LOOK, "dog")[0] == "a photo of a red cat, dog"
    assert attention(loaded, picture, Look(), "dog")[0] == "dog"


def test_pictures_of_layers_and_heads(loaded: Loaded, picture: Image.Image) -> None:
    _, maps = attention(loaded, picture, LOOK, "cat")
    assert [title for _, title in layers(maps, picture)] == [id.removesuffix("-cross-map") for id in maps]
    assert len(heads(maps, "mid-vit-block0", picture)) == maps["mid-vit-block0-cross-map"].shape[0]
    with pytest.raises(ValueError, match="no layer nowhere; there are down-level0"):
        heads(maps, "nowhere", picture)
