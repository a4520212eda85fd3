"""The real server through its API: right answers for many at once, plain sentences for the hostile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from diffusion_features import FeatureExtractor
from diffusion_features.embedded import render
from segmentors import TrainingFreeSegmentor
from segmentors.demo import Settings, running, scenes, shifting
from segmentors.demo.looking import Look
from segmentors.demo.models import Models
from segmentors.training_free.encoders import fits
from segmentors.training_free.pictures import palette
from tests.app.hostile import BROKEN
from tests.app.serving import Server

UNSAID = re.compile(r"Traceback|File \"|site-packages|/tmp/|/home/|\.py\b")
"""What no visitor is ever told."""


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(server.address, verbose=False, download_files=str(tmp_path_factory.mktemp("fetched")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        render(20_000_000 + number, 96).image.save(file)
    return list(map(str, files))


def test_segment_is_the_segmentors_answer(client: Client, pictures: list[str]) -> None:
    *_, files = client.predict(handle_file(pictures[0]), ["tree", "red house"], ["sky"], api_name="/segment")
    segmentor = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"))
    expected: Any = segmentor(pictures[0], ["tree", "red house"], ["sky"])
    labels, overlay, scores = map(Path, files)
    assert [file.name for file in (labels, overlay, scores)] == ["labels.png", "overlay.png", "scores.npy"]
    image = Image.open(labels)
    assert image.mode == "P" and np.array_equal(np.array(image), expected.labels.numpy())
    colours = [value for colour in palette(expected.classes) for value in colour]
    assert image.getpalette()[: len(colours)] == colours  # type: ignore[index]
    assert np.load(scores).dtype == np.float32 and np.array_equal(np.load(scores), expected.scores.numpy())
    assert Image.open(overlay).width == 96


def named(answer: Any) -> set[str]:
    """The paths, on the server, of all files in an answer that were not fetched."""
    if isinstance(answer, dict) and isinstance(answer.get("path"), str):
        return {answer["path"]}
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (list, tuple)) else ()
    return {path for part in parts for path in named(part)}


def test_no_answer_writes_into_the_files_of_another(server: Server, pictures: list[str]) -> None:
    """A second visitor with the same question, whose answer comes while the first still fetches."""
    client = Client(server.address, verbose=False, download_files=False)
    for api, given in (("/segment", (["tree"],)), ("/components", ("embedded",)), ("/similar", ("embedded",))):
        first, second = (client.predict(handle_file(pictures[0]), *given, api_name=api) for _ in range(2))
        assert named(first) and not named(first) & named(second), api
    first, second = (client.predict("test", 3, api_name="/scene") for _ in range(2))
    assert len(named(first)) > 3 and not named(first) & named(second)


def test_gate_is_that_of_the_package(client: Client, server: Server, tiny_model: str, pictures: list[str]) -> None:
    call: dict[str, Any] = dict(prompt="a cat", techniques=["denoise"], t=200, draws=1, seed=5)
    drawn, table, words = client.predict(handle_file(pictures[0]), server.tiny, **call, api_name="/gate")
    with Image.open(pictures[0]) as picture:
        expected = shifting.test(
            Models([tiny_model])(server.tiny), picture.convert("RGB"), Look("a cat", 200, 5), ["denoise"], "", 1
        )
    assert table["data"] == expected.table and words == expected.said
    assert [one["caption"] for one in drawn] == [title for _, title in expected.pictures]
    for one, (image, _) in zip(drawn, expected.pictures, strict=True):
        assert np.array_equal(np.array(Image.open(one["image"])), np.array(image))


def test_a_scene_whose_caption_is_too_long_is_told_its_beginning(client: Client) -> None:
    segmentor = TrainingFreeSegmentor(FeatureExtractor.from_pretrained("embedded"))
    number, scene = next(
        (n, one) for n in range(1024) if not fits(segmentor.parts, (one := scenes.scene("test", n)).caption)
    )
    *_, table, said = client.predict("test", number, True, api_name="/scene")
    assert [row[0] for row in table["data"]] == [*scene.classes] and "Mean IoU" in said
    assert scene.caption in said


def question(number: int, server: Server, pictures: list[str]) -> Callable[[Client], Any]:
    """One of many questions; neighbours differ in model, picture, words and what is asked."""
    generator = random.Random(number)
    file = handle_file(generator.choice(pictures))
    model, seed = generator.choice(["embedded", server.tiny]), generator.randrange(2)
    words = generator.sample(["cat", "dog", "grass", "red car"], 2)
    if number % 4 == 3:
        call = dict(prompt=words[0], seed=seed, column=generator.randrange(96), row=5)
        return lambda client: client.predict(file, model, **call, api_name="/similar")
    if number % 4 == 2:
        return lambda client: client.predict(file, model, words[1], word=words[0], api_name="/attention")
    call = dict(background=[], caption=words[0] if seed else "", model=model, seed=seed, threshold=seed / 4)
    return lambda client: client.predict(file, words, **call, api_name="/segment")


def content(value: Any) -> Any:
    """An answer with each file as its bytes, and without what differs from run to run: times and places."""
    if isinstance(value, (list, tuple)):
        return [content(one) for one in value]
    if isinstance(value, dict):
        return {key: content(one) for key, one in value.items()}
    if isinstance(value, str) and value.startswith("/") and Path(value).is_file():
        return Path(value).read_bytes()
    return re.sub(r"^[\d.]+ s, [a-z ]+", "", value) if isinstance(value, str) else value


def many_at_once(server: Server, pictures: list[str], folder: Path, requests: int, clients: int) -> None:
    questions = [question(number, server, pictures) for number in range(requests)]
    patient = {"timeout": 60}  # while models load, a busy machine takes longer than the usual five seconds
    made = [
        Client(server.address, verbose=False, download_files=str(folder / str(i)), httpx_kwargs=patient)
        for i in range(clients)
    ]
    own = threading.local()
    free = iter(made)

    def ask(one: Callable[[Client], Any]) -> Any:
        if not hasattr(own, "client"):
            own.client = next(free)
        return content(one(own.client))

    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(ask, questions))
    for number, one in enumerate(questions):
        assert content(one(made[0])) == together[number], f"question {number} was answered otherwise"


def test_many_at_once_get_what_each_gets_alone(server: Server, pictures: list[str], tmp_path: Path) -> None:
    many_at_once(server, pictures, tmp_path, requests=24, clients=8)


@contextlib.contextmanager
def apart(model: str, folder: Path) -> Iterator[tuple[Server, psutil.Process]]:
    """The page in a process of its own, so that its memory is not that of its clients, started as a user would."""
    command = [sys.executable, "-m", "diffusion_features", "app", "--model", "embedded", "--model", model]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            yield Server(address, folder, Path(model).name), psutil.Process(process.pid)
        finally:
            process.terminate()


@pytest.mark.slow
def test_many_more_at_once(tiny_model: str, pictures: list[str], tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    with apart(tiny_model, served) as (server, process):
        many_at_once(server, pictures, tmp_path / "first", requests=10, clients=8)
        before = process.memory_info().rss
        many_at_once(server, pictures, tmp_path / "all", requests=200, clients=8)
        assert process.memory_info().rss < before + 150 * 2**20
    assert not [path for path in served.rglob("*") if path.is_file()], "the page left files behind"


# ---- the hostile ----------------------------------------------------------------------------------------------------


def refused(client: Client, *given: Any, api_name: str = "/segment", **more: Any) -> str:
    """The sentence with which a request is refused."""
    with pytest.raises(AppError) as caught:
        client.predict(*given, api_name=api_name, **more)
    said = str(caught.value)
    assert said and not UNSAID.search(said), said
    return said


def test_refusals_are_sentences(client: Client, pictures: list[str]) -> None:
    file = handle_file(pictures[0])
    assert "Choose a picture first." in refused(client, None, ["cat"])
    assert "Name at least one class" in refused(client, file, [])
    assert "'CAT' is given twice" in refused(client, file, ["cat", "CAT"])
    assert "&lt;img" in refused(client, file, ["<img src=x onerror=alert(1)>"] * 2)
    assert "at most 60 characters" in refused(client, file, ["x" * 100])
    assert "whole number from 0 to 999" in refused(client, file, ["cat"], t=1e9)
    assert "head weights" in refused(client, file, ["cat"], heads="__import__")
    assert "and no other model" in refused(client, file, ["cat"], model="/etc")
    assert "column is a whole number from 0 to 95" in refused(client, file, column=96, api_name="/similar")
    assert "no activation of embedded" in refused(
        client, file, activations=["../../../../etc/passwd"], api_name="/components"
    )
    assert "Write the word first" in refused(client, file, word=" ", api_name="/attention")
    for given, message in (
        (dict(techniques=["lora=/etc/passwd"]), "is not at hand for this model"),
        (dict(techniques=[]), "Choose at least one technique"),
        (dict(techniques="denoise"), "The techniques are a list of texts"),
        (dict(words=" "), "Write the words of the finer prompt"),
        (dict(draws=99), "number of draws is a whole number from 1 to 8"),
    ):
        assert message in refused(client, file, **given, api_name="/gate")


TEXTS = [
    "", " ", "\x00", "\u202e", "🐈" * 30, "a" * 10_000, "' OR 1=1 --", "{}", "{0.__class__}", "%s%n", "../" * 20,
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "\ud800", "cat, dog", "ﬀ" * 59, "\n\n", "$(id)",
    "__init__",
]  # fmt: skip


def hostile(generator: random.Random, folder: Path, pictures: list[str]) -> dict[str, Any]:
    """The arguments of a broken request: a file, a text, or a number that should not be."""
    data = generator.choice([*BROKEN.values()])
    file = folder / f"{generator.randrange(10**9)}{generator.choice(['.png', '.jpg', '.gif', '.txt', '.svg', ''])}"
    file.write_bytes(generator.choice([data, data, Path(pictures[0]).read_bytes()]))
    words = [generator.choice(TEXTS) for _ in range(generator.randrange(4))]
    return dict(
        picture=handle_file(str(file)), classes=words, background=[generator.choice(TEXTS)],
        caption=generator.choice([*TEXTS, None]), t=generator.choice([None, -1, 10**12, 3.5, 999, "", "x", "5"]),
        seed=generator.choice([0, -5, 2**63, 1.5]), k=generator.choice([None, 10**6, -1]),
        threshold=generator.choice([0, 2, -1, 1e308]), rescale=generator.choice(["sum", "none", "", "raw"]),
        edges=generator.choice(["none", "pamr", "crf", "\x00"]),
    )  # fmt: skip


def fuzz(server: Server, client: Client, pictures: list[str], folder: Path, requests: int, capture: Any) -> None:
    generator = random.Random(requests)
    for _ in range(requests):
        given = hostile(generator, folder, pictures)
        try:
            client.predict(**given, api_name="/segment")
        except AppError as error:
            assert str(error) and not UNSAID.search(str(error)), (given, str(error))
        except (UnicodeEncodeError, ValueError) as error:  # the client itself cannot send it
            assert "surrogate" in str(error) or "utf-8" in str(error), error
    *_, files = client.predict(handle_file(pictures[0]), ["cat", "tree"], api_name="/segment")
    assert len(files) == 3, "the page no longer works"
    said = capture.readouterr()
    assert "Traceback" not in said.err + said.out


def test_fuzz(server: Server, client: Client, pictures: list[str], tmp_path: Path, capfd: Any) -> None:
    fuzz(server, client, pictures, tmp_path, 50, capfd)


@pytest.mark.slow
def test_fuzz_long(server: Server, client: Client, pictures: list[str], tmp_path: Path, capfd: Any) -> None:
    fuzz(server, client, pictures, tmp_path, 500, capfd)


def posted(server: Server, picture: Any, route: str = "queue/join") -> httpx.Response:
    body = {"data": [picture, ["cat"]], "fn_index": 0, "session_hash": "abc"}
    return httpx.post(f"{server.address}gradio_api/{route}", json=body)


@pytest.mark.parametrize(
    "picture",
    [
        {"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "HTTPS://example.com/x.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "file:///etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "x", "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
        [{"deep": [{"path": "ftp://x/y"}]}],
    ],
)
def test_nothing_is_fetched_for_a_client(server: Server, picture: Any) -> None:
    for route in ("queue/join", "call/segment"):
        answer = posted(server, picture, route)
        assert answer.status_code == 400 and "fetches none" in answer.text


def test_only_uploaded_files_are_read(server: Server, client: Client, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (32, 32)).save(outside)
    for path in (str(outside), "/etc/passwd", str(server.folder / ".." / "x.png")):
        data = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [data, ["cat"]]}
        begun = httpx.post(f"{server.address}gradio_api/call/segment", json=body)
        event = begun.json()["event_id"]
        said = httpx.get(f"{server.address}gradio_api/call/segment/{event}", timeout=60).text
        assert "event: error" in said and "labels.png" not in said
        served = httpx.get(f"{server.address}gradio_api/file={path}")
        assert served.status_code in (403, 404)


def test_long_requests_and_other_addresses_are_refused(server: Server) -> None:
    assert posted(server, "x" * 100_000).status_code == 413
    assert posted(server, None, "process_recording").status_code == 404
    assert posted(server, None, "component_server").status_code == 404
    assert httpx.post(f"{server.address}gradio_api/queue/join", content=b"{" * 2000).status_code == 400
    assert httpx.post(f"{server.address}gradio_api/queue/join", content=b"[" * 60_000).status_code == 400
    large = httpx.post(f"{server.address}gradio_api/upload", files={"files": bytes(21 * 2**20)}, timeout=60)
    assert large.status_code == 413


def test_files_are_removed_in_time(
    tiny_model: str, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads, broken ones too, and results: after their time there is nothing but the examples."""
    place = tmp_path / "served"
    place.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with running(Settings(models=(tiny_model,), kept=2)) as address:
        before = {path for path in place.rglob("*") if path.is_file()}
        client = Client(address, verbose=False, download_files=str(tmp_path / "fetched"))
        for file in (pictures[0], str(broken)):
            with contextlib.suppress(AppError):
                client.predict(handle_file(file), ["cat"], api_name="/segment")
        deadline = time.monotonic() + 30
        while (left := {path for path in place.rglob("*") if path.is_file()} - before) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left
    assert not list(place.iterdir())
