"""The training-free segmentor on tiny models: its contract, and its result against the naive method on made maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from diffusion_features import FeatureExtractor, UnknownActivation, capture, list_activations
from diffusion_features.activations import select
from diffusion_features.images import as_tensor
from segmentors import Method, Preset, Segmentation, TrainingFreeSegmentor
from segmentors.training_free import PLAIN, PRESETS
from segmentors.training_free.encoders import text_parts
from segmentors.training_free.presets import like_published
from segmentors.training_free.prompts import passes
from segmentors.training_free.rescaling import entity_maps, stretched
from segmentors.training_free.steps import steps
from tests import tiny_dits
from tests.released import seeded
from tests.tiny import sd15_pipe
from tests.tiny_families import save_if


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    return FeatureExtractor.from_pipe(sd15_pipe())


def photo(height: int = 64, width: int = 64, seed: str = "photo") -> Image.Image:
    small = (seeded(seed, 6, 6, 3).sigmoid() * 255).to(torch.uint8).numpy()
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def segment(fx: FeatureExtractor, *args: Any, method: Method | None = None, **kwargs: Any) -> Segmentation:
    found = TrainingFreeSegmentor(fx, method=method)(*args, **kwargs)
    assert isinstance(found, Segmentation)
    return found


def test_contract_without_background(fx: FeatureExtractor) -> None:
    found = segment(fx, photo(50, 91), classes=["cat", "grass", "red dog"])
    assert found.classes == ("cat", "grass", "red dog") and found.prompts == ("cat, grass, red dog",)
    assert found.labels.dtype == torch.int64 and found.labels.shape == (50, 91)
    assert found.scores.dtype == torch.float32 and found.scores.shape == (3, 50, 91)
    assert found.scores.min() >= 0 and found.scores.max() <= 1
    assert torch.equal(found.labels, found.scores.argmax(0))
    assert set(found.seconds) == {"model", "rescale", "refine", "label"}
    assert len(found.layer_weights) == 16 and sum(found.layer_weights.values()) == pytest.approx(1)
    shapes = {tuple(weights.shape) for weights in found.head_weights.values()}
    assert len(found.head_weights) == 16 and (4, 6, 11) in shapes  # 64² pixels in the shape of the image: 48x88
    assert all(torch.allclose(w.sum(0), torch.ones(()), atol=1e-4) for w in found.head_weights.values())


def test_contract_with_background(fx: FeatureExtractor) -> None:
    found = segment(fx, photo(), classes=["cat"], background=["grass", "dog"])
    assert found.classes == ("background", "cat") and found.scores.shape == (2, 64, 64)
    assert found.prompts == ("cat, grass, dog",)
    by_threshold = segment(fx, photo(), classes=["cat", "dog"], background=[], method=Method(threshold=0.4))
    assert by_threshold.classes == ("background", "cat", "dog")
    assert torch.allclose(by_threshold.scores[0], torch.tensor(0.4))


def test_a_list_gives_a_list_and_each_is_as_alone(fx: FeatureExtractor) -> None:
    segmentor = TrainingFreeSegmentor(fx)
    images = [photo(64, 64), photo(48, 96, "other")]
    several = segmentor(images, ["cat", "dog"])
    assert isinstance(several, list) and len(several) == 2
    for image, one in zip(images, several, strict=True):
        alone = segmentor(image, ["cat", "dog"])
        assert isinstance(alone, Segmentation)
        assert torch.allclose(alone.scores, one.scores, atol=1e-3) and one.labels.shape == (image.height, image.width)


def naive_tokens(maps: dict[str, Tensor], outs: dict[str, tuple[Tensor, Tensor]], reference: Tensor) -> Tensor:
    """A of arXiv 2603.06178 from stored maps, with renormalised rows and all channels: float64 (T, h, w)."""
    f = reference[0].double().flatten(1)
    affinity = (f.T @ f / f.shape[0] ** 0.5).softmax(-1)
    grid, total, weights = reference.shape[-2:], 0, []
    layers = []
    for id, cross in maps.items():
        if not id.endswith("cross-map"):
            continue
        out, weight = (tensor.double() for tensor in outs[id])
        heads = cross.shape[1]
        each = torch.einsum("nhd,chd->hnc", out[0].unflatten(-1, (heads, -1)), weight.unflatten(1, (heads, -1)))
        share = (each * each.sum(0)).sum(-1)
        a = (share / share.sum(0))[..., None] * cross[0].double()
        cells = cross.shape[2]
        side = (round(cells**0.5),) * 2
        own = maps[id.replace("cross-map", "self-map")][0].double().mean(0)
        own = F.interpolate(own.view(1, cells, *side), grid, mode="bilinear")[0].flatten(1)
        own = F.interpolate(own.T.reshape(1, -1, *side), grid, mode="nearest")[0].flatten(1).T
        weights.append((affinity * own / own.sum(-1, keepdim=True)).sum())
        layers.append(F.interpolate(a.sum(0).T.reshape(1, -1, *side), (8, 8), mode="bilinear")[0])
    total = sum(w * layer for w, layer in zip(weights, layers, strict=True)).clamp(min=0)
    return total / total.sum(0)


def test_equals_the_method_on_stored_maps(fx: FeatureExtractor) -> None:
    """Everything at once: t, prompt, layers, heads, rescaling, refinement; here every map is made and kept."""
    prompt, unet, reference = "cat, dog, grass", fx.denoiser, "up-level2-repeat1-vit-block0-cross-q"
    outs: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for a in fx.available:
        if a.id.endswith("cross-map"):
            out = unet.get_submodule(a.module).to_out[0]
            hooks.append(out.register_forward_pre_hook(lambda m, x, id=a.id: outs.update({id: (x[0], m.weight)})))
    # up to the end, so that the last output projection runs too
    maps = fx(photo(), prompt, t=101, activations=["*-cross-map", "*-self-map", reference, "unet-out"])
    for hook in hooks:
        hook.remove()
    tokens = naive_tokens({k: v for k, v in maps.items() if k.endswith("map")}, outs, maps[reference])
    expected = entity_maps(tokens, [[1], [3], [5]], [1, 3, 5], "sum")
    refiners = ["up-level3-repeat0", "up-level3-repeat1", "down-level0-repeat1"]
    s = torch.stack([maps[f"{place}-vit-block0-self-map"][0].double().mean(0) for place in refiners]).mean(0)
    expected = stretched((s @ s @ expected.flatten(1).T).T.unflatten(1, (8, 8)))
    expected = F.interpolate(expected[None], (64, 64), mode="bilinear")[0].clamp(0, 1)
    found = segment(fx, photo(), classes=["cat", "dog", "grass"])
    assert torch.allclose(found.scores.double(), expected, atol=2e-3)


def test_no_large_map_is_made(fx: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor any attention function returns stays below a self-attention map that is too large to keep."""
    from segmentors.training_free import heads, layers, refinement

    monkeypatch.setattr(heads, "BLOCK_ELEMENTS", 4096)
    monkeypatch.setattr(layers, "BLOCK_ELEMENTS", 1024)
    monkeypatch.setattr(refinement, "KEPT_ELEMENTS", 256 * 256 - 1)
    largest = 0
    from diffusion_features import attention_call

    original = attention_call.attention_map

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        out = original(*args, **kwargs)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(attention_call, "attention_map", watched)
    often = TrainingFreeSegmentor(fx, replace(PRESETS["sd15"], k=3))
    often(photo(), classes=["cat", "dog"], size=128)
    assert 0 < largest <= 16 * 256 * 2  # a self-map of 16x16 cells and one head has 256 * 256


def test_passes_are_compared_as_one(fx: FeatureExtractor) -> None:
    segmentor = TrainingFreeSegmentor(fx)
    segmentor.parts = [segmentor.parts[0]._replace(limit=6)]
    found = segmentor(photo(), ["cat", "dog", "red"], ["grass"])
    assert isinstance(found, Segmentation)
    assert found.prompts == ("cat, dog", "red, grass") and found.classes == ("background", "cat", "dog", "red")
    assert torch.isfinite(found.scores).all()


def test_methods_differ_and_the_plain_one_weighs_nothing(fx: FeatureExtractor) -> None:
    plain = segment(fx, photo(), classes=["cat", "dog"], method=PLAIN)
    assert plain.head_weights == {} and set(plain.layer_weights.values()) == {1 / 16}
    ways = [Method(), Method(heads="l2"), Method(layers="iou"), Method(rescale="none"), Method(refine=False),
            Method(renormalise=False), Method(as_released=True)]  # fmt: skip
    scores = [plain.scores, *(segment(fx, photo(), classes=["cat", "dog"], method=way).scores for way in ways)]
    for i, one in enumerate(scores):
        assert torch.isfinite(one).all() and not any(torch.allclose(one, other) for other in scores[:i])


def test_a_batch_goes_through_the_model_once(fx: FeatureExtractor) -> None:
    segmentor, calls = TrainingFreeSegmentor(fx), []
    handle = fx.denoiser.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    images = torch.stack([as_tensor(photo(seed=s))[0] for s in ("a", "b", "c")])
    together = segmentor(images, ["cat", "dog"], ["grass"])
    handle.remove()
    assert isinstance(together, list) and calls == [3]
    for image, one in zip(images, together, strict=True):
        alone = segmentor(image, ["cat", "dog"], ["grass"])
        assert isinstance(alone, Segmentation) and torch.allclose(alone.scores, one.scores, atol=1e-3)
        assert one.layer_weights == pytest.approx(dict(alone.layer_weights), rel=1e-4)


def test_steps_end_with_what_the_segmentor_scores(fx: FeatureExtractor) -> None:
    segmentor = TrainingFreeSegmentor(fx)
    found = steps(segmentor, photo(), ["cat", "dog"])
    assert [*found] == ["raw", "aggregated", "rescaled", "refined"]
    assert all(maps.shape == (2, 8, 8) and maps.min() >= 0 and maps.max() <= 1 for maps in found.values())
    end = F.interpolate(found["refined"][None], (64, 64), mode="bilinear")[0]
    assert torch.allclose(end, segment(fx, photo(), classes=["cat", "dog"]).scores, atol=1e-5)
    plain = segment(fx, photo(), classes=["cat", "dog"], method=replace(PLAIN, refine=False)).scores
    assert torch.allclose(F.interpolate(found["raw"][None], (64, 64), mode="bilinear")[0], plain, atol=1e-5)


@pytest.mark.parametrize("rescale", ["sum", "sum-raw"])
def test_a_preset_that_does_not_refine_has_no_such_step(fx: FeatureExtractor, rescale: Any) -> None:
    method = Method(rescale=rescale)
    preset = replace(TrainingFreeSegmentor(fx).preset, k=0)
    segmentor = TrainingFreeSegmentor(fx, preset, method)
    found = steps(segmentor, photo(), ["cat", "dog"])
    assert [*found] == ["raw", "aggregated", "rescaled"]
    end = F.interpolate(found["rescaled"][None], (64, 64), mode="bilinear")[0]
    assert torch.allclose(end, segmentor(photo(), ["cat", "dog"]).scores, atol=1e-5)
    without = TrainingFreeSegmentor(fx, preset, replace(method, refine=False))(photo(), ["cat", "dog"])
    assert torch.equal(segmentor(photo(), ["cat", "dog"]).scores, without.scores)


def test_steps_with_a_background_are_those_of_the_same_call(fx: FeatureExtractor) -> None:
    result = segment(fx, photo(), classes=["cat", "dog"], background=["grass", "red"])
    found = steps(TrainingFreeSegmentor(fx), photo(), ["cat", "dog"], ["grass", "red"])
    end = F.interpolate(found["refined"][None], (64, 64), mode="bilinear")[0]
    assert torch.allclose(end[[2, 0, 1]], result.scores, atol=1e-5)  # the background is last there, first here
    assert all(maps.shape == (3, 8, 8) for maps in found.values())
    bare = steps(TrainingFreeSegmentor(fx, method=Method(threshold=0.5)), photo(), ["cat", "dog"], [])
    assert bare["refined"].shape == (2, 8, 8)


def test_in_inference_mode_it_finds_the_same(fx: FeatureExtractor) -> None:
    names = dict(classes=["cat", "dog"], background=["grass"])
    expected = segment(fx, as_tensor(photo(50, 91))[0], **names)
    with torch.inference_mode():
        found = segment(fx, as_tensor(photo(50, 91))[0], **names)
        assert found.scores.is_inference()
    assert torch.equal(found.scores, expected.scores)


def test_undefined_attention_is_an_error_and_no_segmentation() -> None:
    fx = FeatureExtractor.from_pipe(sd15_pipe())
    segmentor = TrainingFreeSegmentor(fx)
    fx.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"attention has infinite or undefined values in torch\.float32\.$"):
        segmentor(photo(), ["cat", "dog"])
    with pytest.raises(FloatingPointError, match="infinite or undefined"):
        steps(segmentor, photo(), ["cat", "dog"])


def test_a_background_that_means_nothing_or_two_things(fx: FeatureExtractor) -> None:
    for method in (Method(), Method(background="threshold"), Method(background="max"), Method(threshold=-0.5)):
        with pytest.raises(ValueError, match=r"this background scores its threshold, which is -?0"):
            segment(fx, photo(), classes=["cat"], background=[], method=method)
    with pytest.raises(ValueError, match=r"never be found: give a threshold between 0 and 1$"):
        segment(fx, photo(), classes=["cat"], background=["sky"], method=Method(background="threshold"))
    with pytest.raises(ValueError, match='"background" is nothing to look for'):
        segment(fx, photo(), classes=["cat", "Background"], background=["grass"])
    assert segment(fx, photo(), classes=["cat"], background=["grass"], method=Method(threshold=-0.5)).labels.numel()
    exact = segment(fx, photo(), classes=["cat"], background=[], method=Method(background="exact"))
    assert exact.scores[0].max() == 0


def test_a_transformer_that_was_loaded_in_part() -> None:
    few = FeatureExtractor.from_pretrained("embedded-dit-small", "vit-block1-out")
    with pytest.raises(ValueError, match=r"vit-block3-self-map was not loaded, .* the model with activations='\*'"):
        TrainingFreeSegmentor(few)
    cut = Preset(("*-cross-map",), "vit-block1-cross-q", (), 0, 100)
    with pytest.raises(ValueError, match="vit-block3-cross-map was not loaded"):
        TrainingFreeSegmentor(few, cut)
    told = replace(cut, cross=("vit-block0-cross-map", "vit-block1-cross-map"))
    assert segment_with(few, told).classes == ("cat", "sky")


def segment_with(fx: FeatureExtractor, preset: Preset) -> Segmentation:
    found = TrainingFreeSegmentor(fx, preset)(photo(128, 128), ["cat", "sky"])
    assert isinstance(found, Segmentation)
    return found


def test_seed_and_size(fx: FeatureExtractor) -> None:
    one, same, other = (segment(fx, photo(), classes=["cat", "dog"], seed=s).scores for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    sized = segment(fx, photo(), classes=["cat", "dog"], size=(32, 96))
    assert sized.labels.shape == (64, 64) and (4, 4, 12) in {tuple(w.shape) for w in sized.head_weights.values()}
    with pytest.raises(ValueError, match="multiples of 8"):
        segment(fx, photo(), classes=["cat"], size=30)


def test_black_and_single_class(fx: FeatureExtractor) -> None:
    black = segment(fx, Image.new("RGB", (64, 64)), classes=["cat", "dog"], background=["grass"])
    assert torch.isfinite(black.scores).all()
    alone = segment(fx, photo(), classes=["cat"])
    assert torch.equal(alone.labels, torch.zeros(64, 64, dtype=torch.int64)) and alone.scores.max() > 0.9


def test_the_model_is_the_same_afterwards(fx: FeatureExtractor) -> None:
    before = {name: weight.clone() for name, weight in fx.denoiser.state_dict().items()}
    segment(fx, photo(), classes=["cat", "dog"])
    assert all(torch.equal(before[name], weight) for name, weight in fx.denoiser.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fx.denoiser.modules())


def test_bad_input(fx: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="at least one class"):
        segment(fx, photo(), classes=[])
    with pytest.raises(ValueError, match="given twice"):
        segment(fx, photo(), classes=["cat", "cat "])
    with pytest.raises(UnknownActivation, match="did you mean"):
        TrainingFreeSegmentor(fx, Preset(("*-cross-map",), "up-level2-repeat1-vit-block0-cros-q", (), 2, 100))


DITS = {
    "pixart_sigma": Preset(
        ("*-cross-map",), "vit-block1-cross-q", ("vit-block1-self-map", "vit-block2-self-map"), 2, 100
    ),
    "hunyuan": Preset(("*-cross-map",), "vit-block2-cross-q", ("vit-block1-self-map",), 2, 100),
    "sd3": Preset(("*-cross-map",), "vit-block1-attn-out", ("vit-block0-self-map",), 2, 400),
    "sd35_medium": Preset(("*-cross-map",), "vit-block1-attn-out", ("vit-block0-self-map",), 2, 400),
    "flux_dev": Preset(("*-cross-map",), "vit-block2-attn-out", ("vit-block0-self-map", "vit-block3-self-map"), 2, 400),
}


@pytest.mark.parametrize(("family", "layers"), [("sd15", 16), ("pixart", 28), ("hunyuan", 10), ("flux", 57)])
def test_presets_name_layers_of_the_released_models(family: str, layers: int) -> None:
    """The numbers of layers are those of the paper's settings; the architectures are whole, without memory."""
    with torch.device("meta"):
        model = {
            "sd15": lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            "pixart": lambda: PixArtTransformer2DModel(num_layers=28, sample_size=64),
            "hunyuan": lambda: HunyuanDiT2DModel(in_channels=4, patch_size=2, sample_size=128, num_layers=40),
            "flux": lambda: FluxTransformer2DModel(num_layers=19, num_single_layers=38),
        }[family]()
    preset, available = PRESETS[family], list_activations(model)
    wanted = [*preset.cross, preset.reference, *preset.refiners]
    cross = [a for a in select(available, wanted) if a.id.endswith("cross-map")]
    assert len(cross) == layers
    assert next(a for a in available if a.id == preset.reference).kind == "spatial"


OTHERS = ("auraflow", "lumina2", "qwen", "zimage", "flux2_klein", "sana")


def test_a_model_that_is_no_transformer_and_has_no_preset(tmp_path: Path) -> None:
    fx = FeatureExtractor.from_pretrained(save_if(tmp_path), "*", device="cpu")
    with pytest.raises(ValueError, match="there is no preset to segment with IFPipeline"):
        TrainingFreeSegmentor(fx)


@pytest.mark.parametrize(("blocks", "reference", "refiners"), [(57, 27, (12, 18)), (24, 11, (5, 8)), (38, 18, (8, 12))])
def test_other_transformers_are_read_where_flux_is(blocks: int, reference: int, refiners: tuple[int, int]) -> None:
    """57: Flux.1 itself, as published; 24 and 38: Stable Diffusion 3 medium and 3.5 large."""
    kinds = ("attn-out", "self-map", "cross-map")
    found = like_published([f"vit-block{i}-{kind}" for i in range(blocks) for kind in kinds])
    assert found == Preset(
        ("*-cross-map",), f"vit-block{reference}-attn-out", tuple(f"vit-block{i}-self-map" for i in refiners), 2, 407
    )
    if blocks == 57:
        assert found == PRESETS["flux"]


@pytest.mark.parametrize("name", [*DITS, *OTHERS])
def test_transformers(name: str) -> None:
    """Each family from end to end, and its head weights against the module's own output."""
    pipe = tiny_dits.build(name)
    fx = FeatureExtractor.from_pipe(pipe, "vit-block0-*-map")
    preset, method = DITS.get(name), Method()
    if name == "sana":  # its self-attention is linear
        with pytest.raises(ValueError, match=r"no self-attention maps to weigh layers by: use Method\(layers='equal'"):
            TrainingFreeSegmentor(fx, preset)
        method = Method(layers="equal")
    if name == "hunyuan":  # its BERT knows one word, so that nothing is left for the background
        method = Method(threshold=0.5)
    segmentor = TrainingFreeSegmentor(fx, preset, method)
    classes = ["cat"] if name == "hunyuan" else ["cat", "red dog"]
    found = segmentor(photo(64, 96), classes, [] if name == "hunyuan" else ["grass"], size=(64, 96))
    assert isinstance(found, Segmentation)
    assert found.scores.shape == (len(classes) + 1, 64, 96) and torch.isfinite(found.scores).all()
    grid = (2, 3) if name == "sana" else (4, 6)
    for weights in found.head_weights.values():
        assert weights.shape[1:] == grid and torch.allclose(weights.sum(0), torch.ones(grid), atol=1e-4)


LOOKING_BACK = [(name, "right") for name in ("sd15", "lumina2", "qwen", "zimage", "sana", "flux2_klein", "flux2_dev")]


# the other pipelines set the side of the padding themselves, or drop the padding
@pytest.mark.parametrize(("name", "padding"), [*LOOKING_BACK, ("flux2_klein", "left"), ("flux2_dev", "left")])
def test_columns_are_where_the_model_reads_the_word(name: str, padding: str) -> None:
    """These text encoders look back only: states differ from the word on in which two prompts do, and not before.

    What the pipelines write around a prompt, what they drop of it, and on which side they pad is all in the states.
    """
    pipe = sd15_pipe() if name == "sd15" else tiny_dits.build(name)
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    tokenizer.padding_side = padding
    fx = FeatureExtractor.from_pipe(pipe, "*")
    with torch.no_grad():
        one, other = fx.family.encode_prompts(pipe, ["a red cat on grass", "a red dog on grass"])
    differs = (one.text - other.text).abs().amax(-1) > 0
    (column, *_) = differs.nonzero()[:, 0].tolist()
    found = passes(text_parts(fx), {"cat": ["cat"]}, caption=" a red cat on grass")[0].entities["cat"]
    assert found == [column]


@pytest.mark.parametrize(
    ("name", "encoders"),
    [("pixart_sigma", ["text_encoder"]), ("flux_dev", ["text_encoder_2"]), ("auraflow", ["text_encoder"]),
     ("sd3", ["text_encoder", "text_encoder_3"]), ("hunyuan", ["text_encoder", "text_encoder_2"])],
)  # fmt: skip
def test_columns_hold_the_tokens_that_the_encoders_were_given(name: str, encoders: list[str]) -> None:
    """Their encoders look both ways; what they are given, one after the other, is what the denoiser attends to."""
    pipe = tiny_dits.build(name)
    fx = FeatureExtractor.from_pipe(pipe, "*")
    given: dict[str, Tensor] = {}

    def keep(encoder: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(encoder, args[0] if args else kwargs["input_ids"])

    for encoder in encoders:
        getattr(pipe, encoder).register_forward_pre_hook(
            lambda module, args, kwargs, encoder=encoder: keep(encoder, args, kwargs), with_kwargs=True
        )
    with torch.no_grad():
        fx.family.encode_prompts(pipe, ["a red Cat on grass"])
    pieces: list[str] = []
    for encoder in encoders:
        tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        pieces += tokenizer.convert_ids_to_tokens(given[encoder][0])
    found = passes(text_parts(fx), {"Cat": ["Cat"]}, caption="a red Cat on grass")[0].entities["Cat"]
    text = "".join(pieces[column].removesuffix("</w>").strip("▁") for column in found)
    assert text.lower() == "cat" * len(encoders)


def test_projection_of_a_single_stream_block() -> None:
    """Heads and feed-forward share one layer in Flux: what the heads contribute is its first columns."""
    from segmentors.training_free.aggregation import output_projection
    from tests.test_attention_call import flux

    transformer, call = flux()
    fx_ids = ["vit-block3-cross-map"]
    block = transformer.single_transformer_blocks[1]
    (activation,) = [a for a in list_activations(transformer) if a.id == fx_ids[0]]
    seen: list[Tensor] = []

    def keep(id: str, found: Any) -> None:
        seen.append(found.output)

    with torch.no_grad(), capture(transformer, fx_ids, reduce=keep):
        transformer(**call)
    check_first_columns(seen[0], output_projection(transformer, activation), block.proj_out.weight)


def check_first_columns(output: Tensor, projection: Any, weight: Tensor) -> None:
    """Head weights by a projection are those by the first columns of its weight."""
    from segmentors.training_free.heads import head_weights

    out = output.double()
    columns = weight.detach().double()[:, : out.shape[1] * out.shape[3]].unflatten(1, (out.shape[1], -1))
    each = torch.einsum("bhnd,chd->bhnc", out, columns)
    expected = (each * each.sum(1, keepdim=True)).sum(-1)
    found = head_weights(output, projection)
    assert torch.allclose(found.double(), expected / expected.sum(1, keepdim=True), atol=1e-4)


def test_projection_of_a_single_stream_block_of_flux2() -> None:
    """There the shared layer is the attention's own."""
    from segmentors.training_free.aggregation import output_projection

    fx = FeatureExtractor.from_pipe(tiny_dits.build("flux2_klein"), "*")
    (activation,) = [a for a in fx.available if a.id == "vit-block3-cross-map"]
    seen: list[Tensor] = []
    fx.stream(photo(), lambda id, found: seen.append(found.output), "a cat", t=400, activations=[activation.id])
    layer = fx.pipe.transformer.single_transformer_blocks[1].attn.to_out
    assert layer.in_features > seen[0].shape[1] * seen[0].shape[3]
    check_first_columns(seen[0], output_projection(fx.denoiser, activation), layer.weight)


@pytest.mark.parametrize("field", ["heads", "layers", "rescale", "edges", "background"])
def test_a_choice_that_a_method_does_not_have(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} of a Method is .*, not 'best'$"):
        Method(**{field: "best"})  # type: ignore[arg-type]
