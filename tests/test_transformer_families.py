"""Every transformer family through one body: a new one is a new row in ``tiny_dits.PIPELINES``."""

import inspect
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffusion_features import FeatureExtractor, UnknownActivation, capture, list_activations
from diffusion_features.activations import select, spans
from diffusion_features.attention_map import attention_map
from diffusion_features.truncating import blocks_of
from tests.released import digest, reproducible, seeded
from tests.tiny_dits import PIPELINES, build

HEIGHT, WIDTH = 64, 96
TIMES = {"Flux": 0.3, "AuraFlow": 0.3, "Lumina2": 0.7, "QwenImage": 0.3, "ZImage": 0.7}
"""What the denoiser is told at t=300, where it is not 300."""


def of_family(pipe, table, default):
    """The entry of a table whose name the pipeline's class begins with."""
    name = type(pipe).__name__.removesuffix("Pipeline")
    return next((value for key, value in table.items() if name.startswith(key)), default)


def positions(pipe, total, tokens):
    """Where the image and the text stand in the joint attention of one image; ``tokens`` are the image's."""
    if of_family(pipe, {"Flux": True, "Lumina2": True, "QwenImage": True}, False):
        return slice(total - tokens, total), slice(0, total - tokens)
    if of_family(pipe, {"AuraFlow": True}, False):
        return slice(total - tokens, total), slice(8, total - tokens)
    if of_family(pipe, {"ZImage": True}, False):
        length = len(pipe.encode_prompt("a photo of a cat", do_classifier_free_guidance=False)[0][0])
        assert tokens == 24 and total == 32 + length + -length % 32
        return slice(0, 24), slice(32, 32 + length)
    return slice(0, tokens), slice(tokens, total)


@contextmanager
def calls_of(transformer):
    """The arguments of each call, by name."""
    calls, forward = [], inspect.signature(transformer.forward)
    handle = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(forward.bind(*args, **kwargs).arguments), with_kwargs=True
    )
    yield calls
    handle.remove()


def clean_latents(pipe, image):
    config = pipe.vae.config
    if of_family(pipe, {"QwenImage": True}, False):  # the mean and deviation of each channel; one frame
        mean = pipe.vae.encode(image[:, :, None]).latent_dist.mean[:, :, 0]
        center, width = (torch.tensor(x)[:, None, None] for x in (config.latents_mean, config.latents_std))
        return (mean - center) / width
    encoded = pipe.vae.encode(image)
    if of_family(pipe, {"Flux2": True}, False):  # the same of each channel of two by two cells
        mean, bn = F.pixel_unshuffle(encoded.latent_dist.mean, 2), pipe.vae.bn
        return (mean - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + config.batch_norm_eps).sqrt()
    mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    return (mean - (config.get("shift_factor") or 0)) * config.scaling_factor


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    return build(request.param)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def every(pipe, image):
    """Everything captured at once, and the (query, key, mask) of every attention call, seen by the test's own patch."""
    calls = []
    sdpa = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *args, **kwargs):
        calls.append((query.detach(), key.detach(), attn_mask))
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    fx = FeatureExtractor.from_pipe(pipe, "*")
    plain = fx(image, "a photo of a cat", t=300)
    transformer = pipe.transformer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        fx(image, "a photo of a cat", t=300, activations=[last(transformer)])
    return {"plain": plain, "maps": fx(image, "a photo of a cat", t=300, activations="*-map"), "calls": calls, "fx": fx}


def last(transformer):
    return list_activations(transformer)[-1].id


def test_whole_id_list_captures(pipe, every):
    ids = [a.id for a in list_activations(pipe.transformer)]
    assert len(set(ids)) == len(ids)
    assert {**every["plain"], **every["maps"]}.keys() == set(ids)
    assert list(every["plain"]) == [i for i in ids if not i.endswith("map")]


def test_shapes_and_info(pipe, every):
    cell = every["fx"].feature_info
    for a in list_activations(pipe.transformer):
        tensor = {**every["plain"], **every["maps"]}[a.id]
        assert torch.isfinite(tensor).all() and tensor.is_contiguous()
        assert tensor.shape[2 if a.kind == "text" else 1] == a.channels
        if a.kind == "spatial":
            assert tensor.shape[2:] == (HEIGHT // cell[a.id].stride, WIDTH // cell[a.id].stride)
            assert tensor.std() > 0


def test_maps_are_blocks_of_the_softmax_of_what_attention_was_called_with(pipe, every):
    """In the order of the calls: one a layer, of which a joint one yields three maps."""
    maps = [(id, tensor) for id, tensor in every["maps"].items()]
    layers = {}
    for id, tensor in maps:
        a = next(a for a in list_activations(pipe.transformer) if a.id == id)
        layers.setdefault(a.module, []).append((id, tensor))
    text_encoder_calls = len(every["calls"]) - len(layers)
    calls = every["calls"][text_encoder_calls:]
    tokens = tokens_of(every)
    for (query, key, mask), found in zip(calls, layers.values(), strict=True):
        scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
        whole = (scores if mask is None else scores + mask.double()).softmax(-1)
        image, text = positions(pipe, whole.shape[-1], tokens)
        for id, tensor in found:
            if len(found) == 1:
                expected = whole
            elif id.endswith("self-map"):
                expected = whole[:, :, image, image]
            elif id.endswith("cross-map"):
                expected = whole[:, :, image, text]
            else:
                expected = whole[:, :, text, image]
            assert tensor.shape == expected.shape
            assert torch.allclose(tensor.double(), expected, atol=1e-6), id
        if len(found) == 3:
            parts = {id.rsplit("-", 2)[-2]: tensor for id, tensor in found}
            assert every["plain"][found[0][0].rsplit("-", 2)[0] + "-cross-k"].shape[1] == parts["cross"].shape[-1]
            total = parts["cross"].sum(-1) + parts["self"].sum(-1)
            if of_family(pipe, {"AuraFlow": True, "ZImage": True}, False):
                assert (total < 1).all()  # the rest is on registers and padding
            else:
                assert torch.allclose(total, torch.ones(1), atol=1e-5)


def test_projections_are_recomputed_from_their_weights(pipe, image, every):
    """q, k and v of image and text tokens, in float64, from what goes into the layers that are named for them."""
    transformer = pipe.transformer
    inputs, handles, tokens = {}, [], tokens_of(every)
    for path, module in transformer.named_modules():
        if path.rsplit(".", 1)[-1] in PROJECTIONS:
            handles.append(module.register_forward_pre_hook(lambda m, args, path=path: inputs.update({path: args[0]})))
    every["fx"](image, "a photo of a cat", t=300, activations=[last(transformer)])
    for handle in handles:
        handle.remove()
    checked = 0
    for id, tensor in every["plain"].items():
        parts, name = id.split("-"), id.rsplit("-", 1)[-1]
        if name not in ("q", "k", "v"):
            continue
        layers = [path for path in inputs if path.startswith(block_path(transformer, parts[1]))]
        path, part = projection(layers, parts[2:-1], name)
        layer = transformer.get_submodule(path)
        bias = None if layer.bias is None else layer.bias.double()
        made = F.linear(inputs[path].double(), layer.weight.double(), bias)
        if part is not None:
            made = made.unflatten(-1, (-1, tensor.shape[2 if tensor.ndim == 3 else 1]))[..., part, :]
        own = made.shape[1] in (tokens, tensor.shape[1])  # a stream of its own, of image or text
        image_at, text_at = positions(pipe, made.shape[1] + (tokens if "add_" in path else 0), tokens)
        made = made if own else made[:, text_at if tensor.ndim == 3 else image_at]
        made = made if tensor.ndim == 3 else made.mT.unflatten(2, tensor.shape[2:])
        assert torch.allclose(tensor.double(), made, atol=1e-5), id
        checked += 1
    assert checked >= 3 * len(blocks_of(transformer))


PROJECTIONS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_qkv_mlp_proj")


def block_path(transformer, name):
    """``block3`` → the path of the fourth of all blocks, and a dot."""
    return blocks_of(transformer)[int(name.removeprefix("block"))] + "."


def projection(layers, middle, name):
    """The layer of a block that makes ``name``, and for a fused one which part of its output that is."""
    kind = middle[0] if middle else "joint"
    fused = [path for path in layers if path.endswith("to_qkv_mlp_proj")]
    if fused:
        return fused[0], "qkv".index(name)
    added = [path for path in layers if path.endswith(f"add_{name}_proj")]
    if kind == "cross" and added:
        return added[0], None
    plain = [path for path in layers if path.endswith(f"to_{name}")]
    second = kind == "second" or (kind == "cross" and len(plain) > 1)
    return plain[1 if second else 0], None


def tokens_of(every):
    return every["plain"][next(i for i in every["plain"] if i.endswith("-out"))].shape[-2:].numel()


def test_denoiser_output_is_unchanged_and_the_input_is_the_documented_mixture(pipe, image, every):
    with calls_of(pipe.transformer) as calls:
        every["fx"](image, "a photo of a cat", t=300, seed=3)
    seen = calls[0]
    x = seen.get("hidden_states", seen.get("x"))
    with torch.no_grad():
        clean = clean_latents(pipe, image)
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(3))[None]
        if "FlowMatch" in type(pipe.scheduler).__name__ or pipe.scheduler.config.get("use_flow_sigmas"):
            expected = 0.7 * clean + 0.3 * noise
        else:
            alpha = pipe.scheduler.alphas_cumprod[300]
            expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        if of_family(pipe, {"Flux2": False, "Flux": True, "QwenImage": True}, False):
            expected = F.pixel_unshuffle(expected, 2)
        if of_family(pipe, {"Flux": True, "QwenImage": True}, False):
            expected = expected.flatten(2).mT
        if of_family(pipe, {"ZImage": True}, False):
            x = torch.stack(x)[:, :, 0]
        assert torch.allclose(x, expected, atol=1e-5)
        timestep = seen.get("timestep", seen.get("t"))
        assert float(timestep[0]) == pytest.approx(of_family(pipe, TIMES, 300))
        plain = pipe.transformer(**seen)[0]
        with capture(pipe.transformer, ["*", "*-map"]):
            assert torch.equal(pipe.transformer(**seen)[0][0], plain[0])


def generate(pipe, output_type="latent"):
    """A generation in two steps without guidance, of the size of the image."""
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": output_type}
    if of_family(pipe, {"PixArt": True, "Sana": True}, False):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if type(pipe).__name__.startswith("Hunyuan"):
        options |= {"use_resolution_binning": False, "original_size": (HEIGHT, WIDTH), "target_size": (HEIGHT, WIDTH)}
    if of_family(pipe, {"ZImage": True}, False):
        options |= {"guidance_scale": 0.0}
    pipe(prompt="a photo of a cat", height=HEIGHT, width=WIDTH, **options)


def test_prediction_is_what_the_pipeline_itself_steps_with(pipe, every):
    steps, step = [], pipe.scheduler.step

    def spy(prediction, t, sample, *args, **kwargs):
        steps.append((prediction, t, sample))
        return step(prediction, t, sample, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", spy)
        generate(pipe)
    prediction, t, sample = steps[0]
    family = every["fx"].family
    prediction, sample = unpacked(pipe, prediction), unpacked(pipe, sample)
    with torch.no_grad():
        conditions = family.encode_prompts(pipe, ["a photo of a cat"])
        ours = family.denoise(pipe, sample, int(t), conditions, (HEIGHT, WIDTH))
    assert int(t) == t and ours.shape == sample.shape
    assert torch.allclose(ours, prediction, atol=1e-5)


def unpacked(pipe, latents):
    """What a scheduler steps with, as (B, c, h, w)."""
    if of_family(pipe, {"Flux": True, "QwenImage": True}, False):
        latents = latents.mT.unflatten(2, (HEIGHT // 16, WIDTH // 16))
    if of_family(pipe, {"Flux2": False, "Flux": True, "QwenImage": True}, False):
        latents = F.pixel_shuffle(latents, 2)
    return latents


def test_latents_are_decoded_as_the_pipeline_itself_decodes_them(pipe, image, every):
    """And as the inverse of how images are encoded."""
    family, stepped, decoded = every["fx"].family, [], []
    step, decode = pipe.scheduler.step, pipe.vae.decode

    def spy(spied, into, *args, **kwargs):
        into.append(spied(*args, **kwargs))
        return into[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", lambda *args, **kwargs: spy(step, stepped, *args, **kwargs))
        patch.setattr(pipe.vae, "decode", lambda *args, **kwargs: spy(decode, decoded, *args, **kwargs))
        generate(pipe, "pt")
    latents, theirs = unpacked(pipe, stepped[-1][0]), decoded[0][0]
    with torch.no_grad():
        ours = family.decode_latents(pipe, latents)
        assert torch.allclose(ours, theirs.reshape(ours.shape), atol=1e-5)
        clean, seen = family.encode_images(pipe, image, None), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.vae, "decode", lambda x, return_dict: spy(lambda: (x,), seen))
            family.decode_latents(pipe, clean)
        encoded = pipe.vae.encode(image[:, :, None] if seen[0][0].ndim == 5 else image)
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        assert torch.allclose(seen[0][0], mean, atol=1e-5)


def test_what_the_pipeline_itself_passes_is_what_we_pass(pipe, image, every):
    """The denoiser's call in a generation of the same size and prompt has the same conditions as ours."""
    with calls_of(pipe.transformer) as calls:
        every["fx"](image, "a photo of a cat", t=300)
        generate(pipe)
    ours, theirs, *_ = calls
    for name, value in theirs.items():
        if name in ("hidden_states", "x", "timestep", "t", "return_dict", "joint_attention_kwargs"):
            continue
        mine = ours.get(name)
        if name == "img_shapes":
            assert mine == value
        for a, b in zip(_tensors(mine), _tensors(value), strict=True):
            assert torch.allclose(a.float(), b.float().reshape(a.shape), atol=1e-5), name


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key in sorted(value) for t in _tensors(value[key])]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (tuple, list)) else []


def test_batch_with_prompts_of_its_own_equals_single_runs(pipe, image, every):
    other = image.flip(-1)
    ids = ["*", "*-map"]
    batch = every["fx"](torch.cat([image, other]), ["a photo of a cat", "a dog"], t=300, seed=[1, 2], activations=ids)
    single = every["fx"](other, "a dog", t=300, seed=2, activations=ids)
    for id, tensor in single.items():
        own = tuple(slice(n) for n in tensor.shape)  # texts are as long as the batch's longest
        assert torch.allclose(batch[id][1:][own], tensor, atol=1e-4, rtol=1e-4), id
        batch[id][1:][own] = 0
        assert not batch[id][1:].any(), id


def test_latents_of_another_size_than_any_image(pipe, image, every):
    """Given as the VAE makes them, they are what the image would have been; the size told follows them."""
    fx = every["fx"]
    with torch.no_grad():
        clean = fx.family.encode_images(pipe, image, None)
    ids = [last(pipe.transformer)]
    options = dict(prompt="a photo of a cat", t=300, seed=1, activations=ids)
    with calls_of(pipe.transformer) as calls:
        expected = fx(image, **options)
        found = fx(None, latents=clean, **options)
        fx(None, latents=clean.mT[:, :, : clean.shape[3] * 2 // 3], **options)  # as many rows as columns
    assert torch.equal(found[ids[0]], expected[ids[0]])
    for a, b in zip(_tensors(list(calls[0].values())), _tensors(list(calls[1].values())), strict=True):
        assert torch.equal(a, b)
    added = calls[2].get("added_cond_kwargs") or {}
    if added.get("resolution") is not None:
        assert added["resolution"].tolist() == [[HEIGHT, HEIGHT]] and added["aspect_ratio"].tolist() == [[1.0]]
    if "image_meta_size" in calls[2]:
        assert calls[2]["image_meta_size"].tolist() == [[HEIGHT, HEIGHT, HEIGHT, HEIGHT, 0, 0]]
    if fx.multiple > fx.family.pixels_per_latent(pipe):
        with pytest.raises(ValueError, match=r"each side must be a multiple of 2"):
            fx(None, latents=clean[..., 1:], **options)


def test_prompts_longer_than_the_context_are_refused(pipe, image, every):
    with pytest.raises(ValueError, match=r"has \d+ tokens and this model reads"):
        every["fx"](image, "cat " * 2000)


@pytest.mark.parametrize("mask", [None, torch.ones(6, 6).tril().bool(), torch.rand(2, 1, 6, 6) > 0.3])
def test_positions_of_each_sample(mask):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 6, 4, generator=generator) for _ in "qk")
    assert spans([1, 1], [3, 3]) == slice(1, 4)
    rows, columns = spans([1, 3], [2, 1]), spans([0, 2], [3, 4])
    assert rows.tolist() == [[1, 2], [3, -1]] and columns.tolist() == [[0, 1, 2, -1], [2, 3, 4, 5]]
    whole = attention_map(query, key, mask)
    part = attention_map(query, key, mask, rows=rows, columns=columns)
    expected = torch.zeros(2, 3, 2, 4)
    expected[0, :, :, :3], expected[1, :, :1] = whole[0, :, 1:3, 0:3], whole[1, :, 3:4, 2:6]
    assert torch.allclose(part, expected, equal_nan=True)


@pytest.mark.parametrize("family", ["flux"])
def test_equals_released(family):
    """The released code's own captures on a small Flux; its double-block ``out`` held ``norm-out`` by mistake."""
    from diffusers import FluxTransformer2DModel

    path = Path(__file__).parent / "data" / "released_captures.json"
    released = json.loads(path.read_text())[family]["ids"]
    model = reproducible(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    ids = torch.zeros(8, 8, 3)
    ids[..., 1] = torch.arange(8)[:, None]
    ids[..., 2] = torch.arange(8)[None]
    with torch.no_grad(), capture(model, list(released)) as features:
        model(
            seeded("x", 1, 64, 16), seeded("c", 1, 9, 24), seeded("p", 1, 20), torch.tensor([0.27]),
            ids.reshape(64, 3), torch.zeros(9, 3), torch.tensor([1.0]),
        )  # fmt: skip
    assert [a.id for a in list_activations(model) if a.id in released] == list(released)
    for id, theirs in released.items():
        ours = digest(features["vit-block0-norm-out" if id == "vit-block0-out" else
                               "vit-block1-norm-out" if id == "vit-block1-out" else id])  # fmt: skip
        assert list(features[id].shape) == theirs["shape"]
        assert ours["probe"] == pytest.approx(theirs["probe"], rel=2e-3, abs=2e-5), id


def test_published_counts_and_ids_of_other_families():
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(caption_channels=4096, sample_size=64)
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert len(list_activations(pixart)) == 280
    extra = ("cross-k", "cross-v", "text-map")  # which the released code does not offer
    assert sum(a.role not in extra for a in list_activations(flux)) == 437
    for model, other, nearest in [
        (pixart, "up-level1-repeat1-vit-block0-cross-q", "vit-block0-cross-q"),
        (pixart, "vit-block12-attn-out", "vit-block12-out"),
        (flux, "mid-vit-block0-cross-map", "vit-block0-cross-map"),
    ]:
        with pytest.raises(UnknownActivation, match=f"did you mean {nearest},"):
            select(list_activations(model), other)
