"""The vocabulary against the papers' lists and against what diffusers models really make; and its selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffusion_features.activations import (
    Activation,
    UnknownActivation,
    is_glob,
    match,
    preset_folder,
    presets,
    select,
)
from diffusion_features.families import list_activations
from diffusion_features.families.unet import preset_model

PUBLISHED = json.loads((Path(__file__).parent / "data" / "sd15_ids.json").read_text())

# ---- the released models' configurations, built without memory on the meta device -----------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": dict(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    "sd21": dict(
        sample_size=96,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "if": dict(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        block_out_channels=(320, 640, 960, 1280),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        only_cross_attention=True,
        cross_attention_dim=1280,
        cross_attention_norm="group_norm",
        encoder_hid_dim=4096,
        attention_head_dim=64,
        addition_embed_type="text",
        addition_embed_type_num_heads=64,
        resnet_time_scale_shift="scale_shift",
        resnet_skip_time_act=True,
        time_embedding_act_fn="gelu",
        act_fn="gelu",
    ),
}


def build(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name]).eval()


def call(unet: UNet2DConditionModel) -> None:
    """One forward on the meta device: shapes and the order of modules, no numbers."""
    config = unet.config
    side = config.sample_size
    added = None
    if config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.empty(1, 1280, device="meta"), "time_ids": torch.empty(1, 6, device="meta")}
    width = config.encoder_hid_dim or config.cross_attention_dim
    with torch.no_grad():
        unet(
            torch.empty(1, config.in_channels, side, side, device="meta"),
            torch.empty(1, device="meta"),
            encoder_hidden_states=torch.empty(1, 77, width, device="meta"),
            added_cond_kwargs=added,
        )


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet2DConditionModel]:
    return {name: build(name) for name in CONFIGS}


@pytest.fixture(scope="module")
def sd15(unets: dict[str, UNet2DConditionModel]) -> list[Activation]:
    return list_activations(unets["sd15"])


def ids(found: list[Activation]) -> list[str]:
    return [a.id for a in found]


# ---- the ids, written down a second time from the papers' tables ----------------------------------------------------


def res(prefix: str) -> list[str]:
    return [f"{prefix}-increment", f"{prefix}-out"]


def vit(prefix: str, blocks: int) -> list[str]:
    parts = ["self-q", "self-k", "self-v", "self-map", "cross-q", "cross-k", "cross-v", "cross-map", "ffn-inner", "out"]
    return [f"{prefix}-block{b}-{part}" for b in range(blocks) for part in parts] + [f"{prefix}-out"]


def expected(down: list[int], mid: int, up: list[int], repeats: int, *, residual_samplers: bool = False) -> list[str]:
    """Ids of a UNet, given the transformer blocks in each repeat of each level; 0 where a level has none."""
    found = ["unet-in", "unet-after-conv-in"]
    for stage, levels, count in (("down", down, repeats), ("mid", [mid], 0), ("up", up, repeats + 1)):
        if stage == "mid":
            found += [*res("mid-repeat0-res"), *(vit("mid-vit", mid) if mid else []), *res("mid-repeat1-res")]
        for level, blocks in enumerate(levels):
            for repeat in range(count):
                prefix = f"{stage}-level{level}-repeat{repeat}"
                found += [*res(f"{prefix}-res"), *(vit(f"{prefix}-vit", blocks) if blocks else [])]
            if count and level < len(levels) - 1:
                sampler = f"{stage}-level{level}-{stage}sampler"
                found += res(sampler) if residual_samplers else [f"{sampler}-out"]
    return [*found, "unet-out"]


EXPECTED = {
    "sd15": expected([1, 1, 1, 0], 1, [0, 1, 1, 1], 2),
    "sd21": expected([1, 1, 1, 0], 1, [0, 1, 1, 1], 2),
    "sdxl": expected([0, 2, 10], 10, [10, 2, 0], 2),
    "if": expected([0] * 4, 0, [0] * 4, 3, residual_samplers=True),
}
COUNTS = {"sd15": (197, 32), "sd21": (197, 32), "sdxl": (612, 140), "if": (75, 0)}


@pytest.mark.parametrize("name", CONFIGS)
def test_ids(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    found = ids(list_activations(unets[name]))
    assert found == EXPECTED[name]
    text = [i for i in found if i.endswith(("cross-k", "cross-v"))]
    assert (len(found) - len(text), len(text)) == COUNTS[name]
    assert len(set(found)) == len(found)


def test_the_published_ids_of_sd15_in_the_published_order(sd15: list[Activation]) -> None:
    assert len(PUBLISHED) == 197
    text = [a.id for a in sd15 if a.kind == "text"]
    assert [i for i in ids(sd15) if i not in text] == PUBLISHED
    assert len(text) == 32 and all(i.endswith(("-cross-k", "-cross-v")) for i in text)


# ---- channels, strides and order against a run of the model itself --------------------------------------------------


def watch(unet: nn.Module) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shape of each module's output and the order in which modules end, by hooks of the test's own."""
    shapes: dict[str, tuple[int, ...]] = {}
    order: list[str] = []

    def hook(path: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(tensor, Tensor):
                shapes[path] = tuple(tensor.shape)
                order.append(path)

        return note

    handles = [module.register_forward_hook(hook(path)) for path, module in unet.named_modules() if path]
    call(unet)
    for handle in handles:
        handle.remove()
    return shapes, order


def assert_true_of(unet: Any, found: list[Activation]) -> None:
    shapes, order = watch(unet)
    side = unet.config.sample_size
    for a in found:
        shape = shapes[a.module]
        if a.kind == "map":
            module = unet.get_submodule(a.module)
            assert a.channels == module.heads, a.id
            assert a.stride is not None and shape[1] == (side // a.stride) ** 2, a.id
        elif a.tap == "input":
            assert (a.channels, a.stride) == (unet.config.in_channels, 1)
        elif a.kind == "text":
            assert shape == (1, 77, a.channels) and a.stride is None, a.id
        elif len(shape) == 4:
            assert a.stride is not None and shape == (1, a.channels, side // a.stride, side // a.stride), a.id
        else:
            assert a.stride is not None and shape == (1, (side // a.stride) ** 2, a.channels), a.id
    ends = [order.index(a.module) for a in found if a.tap == "output"]
    assert ends == sorted(ends)


@pytest.mark.parametrize("name", CONFIGS)
def test_channels_strides_and_order_at_real_size(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    assert_true_of(unets[name], list_activations(unets[name]))


HEADS = {"sd15": {8}, "sd21": {5, 10, 20}, "sdxl": {10, 20}}


@pytest.mark.parametrize("name", HEADS)
def test_heads(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    assert {a.channels for a in list_activations(unets[name]) if a.kind == "map"} == HEADS[name]


def test_a_unet_with_other_numbers() -> None:
    """Nothing is taken from a table of known models: three levels, one repeat, two blocks, two heads of other width."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=5,
            block_out_channels=(32, 64, 96),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            transformer_layers_per_block=(2, 1, 3),
            attention_head_dim=2,
            cross_attention_dim=24,
        ).eval()
    found = list_activations(unet)
    assert ids(found) == expected([2, 0, 3], 3, [3, 0, 2], 1)
    assert_true_of(unet, found)


def test_no_family_for_a_stranger() -> None:
    with pytest.raises(
        TypeError, match=r"Linear is not a denoiser this library knows; known are .*UNet2DConditionModel"
    ):
        list_activations(nn.Linear(2, 2))


def test_roles(sd15: list[Activation]) -> None:
    roles = {a.role for a in sd15}
    assert {"res-increment", "res-out", "vit-out", "self-q", "cross-map", "ffn-inner", "downsampler-out"} <= roles


# ---- presets --------------------------------------------------------------------------------------------------------

# {cells along a side of the released model's own latents: channels}, from the papers' tables of levels
LEVELS = {
    ("sd15", "practical"): {16: 2560, 32: 640, 64: 320},
    ("sd15", "legacy"): {16: 1280, 32: 1280, 64: 640 + 320},
    ("sd15", "amalgamation"): {16: 1280, 32: 640, 64: 640 + 320},
    ("sd15", "amalgamation-small"): {32: 640, 64: 640 + 320},
    ("sd15", "vpd"): {8: 1280, 16: 1280, 32: 640},
    ("sdxl", "practical"): {32: 2560, 64: 1280},
    ("sdxl", "legacy"): {64: 1280, 128: 960},
    ("sdxl", "full"): {32: 2560, 64: 1280, 128: 640},
    ("pgv2", "amalgamation"): {32: 1280},
    ("pgv2", "full"): {32: 1280, 64: 640, 128: 640},
}
SUMS = {
    ("sd15", "practical"): 3520,
    ("sd15", "legacy"): 3520,
    ("sd15", "amalgamation"): 2880,
    ("sd15", "amalgamation-small"): 1600,
    ("sd15", "vpd"): 3200,
    ("sdxl", "practical"): 3840,
    ("sdxl", "legacy"): 2240,
    ("sdxl", "full"): 4480,
    ("pgv2", "amalgamation"): 1280,
    ("pgv2", "full"): 2560,
}


def test_these_are_all_presets() -> None:
    shipped = {(file.stem, name) for file in preset_folder().glob("*.json") for name in presets(file.stem)}
    others = ("goca", "dift")  # of other papers
    assert {key for key in shipped if key[0] in ("sd15", "sdxl", "pgv2") and key[1] not in others} == set(SUMS)
    assert presets(None) == {} and presets("a model without presets") == {}


@pytest.mark.parametrize(("model", "name"), SUMS)
def test_channels_of_presets(unets: dict[str, UNet2DConditionModel], model: str, name: str) -> None:
    unet = unets["sd15" if model == "sd15" else "sdxl"]
    chosen = select(list_activations(unet), name, presets(model))
    levels: dict[int, int] = {}
    for a in chosen:
        assert a.kind == "spatial" and a.stride is not None
        side = unet.config.sample_size // a.stride
        levels[side] = levels.get(side, 0) + a.channels
    assert levels == LEVELS[model, name]
    assert sum(levels.values()) == SUMS[model, name]


def test_the_channels_of_ours_xl_t() -> None:
    """3840 of SDXL, 2880 + 154 of SD1.5 and 1280 of Playground v2 make the published 8154."""
    assert SUMS["sdxl", "practical"] + SUMS["sd15", "amalgamation"] + 154 + SUMS["pgv2", "amalgamation"] == 8154


@pytest.mark.parametrize(
    ("name", "model", "key"),
    [
        ("sd15", "runwayml/stable-diffusion-v1-5", "sd15"),
        ("sd21", "", "sd15"),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("sdxl", "/home/me/playground/sdxl-base", "sdxl"),
        ("sdxl", "playgroundai/playground-v2-1024px-aesthetic", "pgv2"),
        ("sdxl", "/models/Playground_v2", "pgv2"),
        ("if", "DeepFloyd/IF-I-L-v1.0", None),
    ],
)
def test_which_presets_a_model_has(
    unets: dict[str, UNet2DConditionModel], name: str, model: str, key: str | None
) -> None:
    assert preset_model(unets[name], model) == key


# ---- selection ------------------------------------------------------------------------------------------------------

PRESETS = {"two": ["mid-vit-out", "unet-in"], "broken": ["unet-in", "mid-vit-oot"]}
Q, OUT = "mid-vit-block0-cross-q", "mid-vit-out"


def chosen(sd15: list[Activation], spec: Any) -> list[str]:
    return ids(select(sd15, spec, PRESETS))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "list.json": json.dumps([OUT, "unet-*"]),
        "tabs.json": '[\n\t"mid-vit-out",\n\t"unet-*"\n]',
        "bom.json": "\ufeff" + json.dumps([OUT, "unet-*"]),
        "bool.json": json.dumps({OUT: True, "unet-*": True, Q: False}),
        "list.yaml": yaml.safe_dump([OUT, "unet-*"]),
        "bool.YML": f"# chosen by hand\n{OUT}: yes\n{Q}: no\nunet-*: true\n",
        "preset.yaml": "- two\n- unet-after-conv-in\n- unet-out\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "files.yml").write_text(yaml.safe_dump([str(tmp_path / "list.json"), "unet-out"]))
    return {path.name: path for path in tmp_path.iterdir()}


def test_every_form_of_a_spec(sd15: list[Activation], files: dict[str, Path]) -> None:
    three = ["unet-in", "unet-after-conv-in", OUT, "unet-out"]
    assert chosen(sd15, OUT) == [OUT]
    assert chosen(sd15, "two") == ["unet-in", OUT]
    assert chosen(sd15, "unet-*") == ["unet-in", "unet-after-conv-in", "unet-out"]
    assert chosen(sd15, ["unet-*", OUT]) == three
    assert chosen(sd15, ("unet-*", OUT)) == three
    assert chosen(sd15, [["unet-*"], [[OUT], "two"]]) == three
    assert chosen(sd15, {OUT: True, "unet-*": True, Q: False, "no such id": False}) == three
    assert chosen(sd15, ["two", {"unet-*": True}]) == three
    for path in files.values():
        assert chosen(sd15, path) == three, path
        assert chosen(sd15, str(path)) == three, path
    assert chosen(sd15, [files["list.json"], Q]) == ["unet-in", "unet-after-conv-in", Q, OUT, "unet-out"]


def test_forward_order_and_each_once(sd15: list[Activation]) -> None:
    backwards = list(reversed(PUBLISHED))
    assert chosen(sd15, backwards + backwards[:50]) == PUBLISHED


NOT_MAPS = ["self-q", "self-k", "self-v", "cross-q", "cross-k", "cross-v", "ffn-inner", "out"]
GLOBS = {
    "mid-vit-*": [f"mid-vit-block0-{x}" for x in NOT_MAPS] + ["mid-vit-out"],
    "mid-vit-*-map": ["mid-vit-block0-self-map", "mid-vit-block0-cross-map"],
    "mid-vit-*map": ["mid-vit-block0-self-map", "mid-vit-block0-cross-map"],
    "mid-vit-block0-self-[qk]": ["mid-vit-block0-self-q", "mid-vit-block0-self-k"],
    "up-level?-upsampler-out": [f"up-level{i}-upsampler-out" for i in range(3)],
    "up-level3-repeat2-*-cross-ma?": [],
    "mid-*-*q": ["mid-vit-block0-self-q", "mid-vit-block0-cross-q"],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs(sd15: list[Activation], pattern: str) -> None:
    assert is_glob(pattern)
    assert ids(match(pattern, sd15)) == GLOBS[pattern]


def test_a_glob_takes_maps_only_if_its_last_component_says_so(sd15: list[Activation]) -> None:
    maps = [a for a in sd15 if a.kind == "map"]
    assert len(maps) == 32
    assert match("*", sd15) == [a for a in sd15 if a.kind != "map"]
    assert match("*-map", sd15) == match("*map*", sd15) == maps
    assert match("*map*-q", sd15) == []


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_an_unknown_id_names_the_nearest(sd15: list[Activation]) -> None:
    with pytest.raises(UnknownActivation) as caught:
        chosen(sd15, "up-level1-repeat1-vit-block0-crossq")
    text = str(caught.value)
    assert "'up-level1-repeat1-vit-block0-crossq'" in text and "up-level1-repeat1-vit-block0-cross-q" in text
    assert isinstance(caught.value, ValueError)


def test_an_unknown_name_lists_the_presets(sd15: list[Activation]) -> None:
    with pytest.raises(UnknownActivation, match="Presets for it: two, broken"):
        chosen(sd15, "zzz")
    with pytest.raises(UnknownActivation, match="did you mean practical"):
        select(sd15, "practcal", presets("sd15"))
    with pytest.raises(UnknownActivation, match="It has no presets"):
        select(sd15, "practical")


def test_one_wrong_part_of_a_list_is_enough(sd15: list[Activation]) -> None:
    with pytest.raises(UnknownActivation, match="mid-vit-block0-cross-y"):
        chosen(sd15, [OUT, {"unet-in": True, "mid-vit-block0-cross-y": True}])
    with pytest.raises(UnknownActivation, match=r"mid-vit-oot.*did you mean mid-vit-out"):
        chosen(sd15, "broken")


def test_an_empty_glob_names_the_nearest(sd15: list[Activation]) -> None:
    with pytest.raises(UnknownActivation, match=r"no activation matches 'up-level9-\*'; the nearest ids are up-level"):
        chosen(sd15, "up-level9-*")
    with pytest.raises(UnknownActivation, match="matches only attention maps; ask for them by a glob ending in 'map'"):
        chosen(sd15, "mid-vit-block0-cross-ma*")


@pytest.mark.parametrize("spec", [[], {}, [[]], {OUT: False}, ()])
def test_nothing_asked_for(sd15: list[Activation], spec: Any) -> None:
    with pytest.raises(ValueError, match="no activation is asked for"):
        chosen(sd15, spec)


WRONG = {
    "missing.json": (None, FileNotFoundError, "there is no activation file"),
    "text.json": ("{", ValueError, "is neither JSON nor YAML"),
    "text.yaml": ("a: [", ValueError, "is neither JSON nor YAML"),
    "bytes.yml": (b"\xff\xfe\x00", ValueError, "is neither JSON nor YAML"),
    "number.json": ("3", ValueError, "must hold a list of ids"),
    "numbers.yaml": ("- 3\n- unet-in\n", ValueError, "must hold a list of ids"),
    "nothing.yaml": ("", ValueError, "must hold a list of ids"),
    "strings.json": ('{"unet-in": "yes"}', ValueError, "must hold a list of ids"),
    "number-keys.yaml": ("3: true\n", ValueError, "must hold a list of ids"),
    "empty.json": ("[]", ValueError, "no activation is asked for"),
    "unknown.json": ('["mid-vit-outt"]', UnknownActivation, "did you mean mid-vit-out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(sd15: list[Activation], tmp_path: Path, name: str) -> None:
    content, error, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        chosen(sd15, tmp_path / name)


def test_files_that_name_each_other(sd15: list[Activation], tmp_path: Path) -> None:
    alone, one, other = (tmp_path / n for n in ("alone.json", "one.json", "other.yaml"))
    alone.write_text(json.dumps([str(alone)]))
    one.write_text(json.dumps(["unet-in", str(other)]))
    other.write_text(json.dumps([str(one)]))
    for path in (alone, one):
        with pytest.raises(ValueError, match=f"activation file {path} names itself"):
            chosen(sd15, path)


def test_a_file_in_a_file_is_looked_for_beside_it(
    sd15: list[Activation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "specs" / "outer.yaml").write_text("- inner.yaml\n- only_here.yaml\n")
    (tmp_path / "specs" / "inner.yaml").write_text("- mid-vit-out\n")
    (tmp_path / "here" / "inner.yaml").write_text("- unet-out\n")
    (tmp_path / "here" / "only_here.yaml").write_text("- unet-in\n")
    assert chosen(sd15, "../specs/outer.yaml") == ["unet-in", "mid-vit-out"]
    (tmp_path / "specs" / "round.yaml").write_text("- ../specs/round.yaml\n")
    with pytest.raises(ValueError, match="names itself"):
        chosen(sd15, tmp_path / "specs" / "round.yaml")


def test_activations_themselves_can_be_asked_for(sd15: list[Activation]) -> None:
    some = [a for a in sd15 if a.role == "res-out"]
    ids = [a.id for a in some]
    assert chosen(sd15, some) == chosen(sd15, tuple(some)) == ids
    assert chosen(sd15, some[0]) == ids[:1]
    assert chosen(sd15, ["mid-vit-out", some[0]]) == [ids[0], "mid-vit-out"]


def test_a_folder_is_no_file(sd15: list[Activation], tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no activation file"):
        chosen(sd15, tmp_path / "folder.json")


def test_a_file_of_another_kind_says_so(sd15: list[Activation], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text(OUT)
    with pytest.raises(UnknownActivation, match=r"ids\.txt"):
        chosen(sd15, tmp_path / "ids.txt")
