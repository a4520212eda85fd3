"""Every transformer family through one body: a new one is a new row in ``tiny_dits.PIPELINES``."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released import digest, reproducible, seeded
from tiny_dits import PIPELINES, build

from diffusion_features import FeatureExtractor, capture, list_activations

HEIGHT, WIDTH = 64, 96


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
    name = type(pipe).__name__
    tokens = every["plain"][next(i for i in every["plain"] if i.endswith("-out"))].shape[-2:].numel()
    for (query, key, mask), found in zip(calls, layers.values(), strict=True):
        scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
        whole = (scores if mask is None else scores + mask.double()).softmax(-1)
        total = whole.shape[-1]
        image = slice(total - tokens, total) if name.startswith("Flux") else slice(0, tokens)
        text = slice(0, total - tokens) if name.startswith("Flux") else slice(tokens, total)
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
            assert torch.allclose(parts["cross"].sum(-1) + parts["self"].sum(-1), torch.ones(1), atol=1e-5)


def test_denoiser_output_is_unchanged_and_the_input_is_the_documented_mixture(pipe, image, every):
    seen = {}
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"], kwargs=kwargs, args=args),
        with_kwargs=True,
    )
    fx = every["fx"]
    fx(image, "a photo of a cat", t=300, seed=3)
    handle.remove()
    with torch.no_grad():
        vae = pipe.vae
        clean = (vae.encode(image).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(3))[None]
        if "FlowMatch" in type(pipe.scheduler).__name__:
            expected = 0.7 * clean + 0.3 * noise
        else:
            alpha = pipe.scheduler.alphas_cumprod[300]
            expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        if type(pipe).__name__.startswith("Flux"):
            b, c, h, w = expected.shape
            expected = expected.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
        assert torch.allclose(seen["x"], expected, atol=1e-5)
        timestep = seen["kwargs"].get("timestep", seen["args"][1] if len(seen["args"]) > 1 else None)
        assert float(timestep[0]) == pytest.approx(0.3 if type(pipe).__name__.startswith("Flux") else 300)
        call = dict(seen["kwargs"])
        plain = pipe.transformer(*seen["args"], **call)[0]
        with capture(pipe.transformer, ["*", "*-map"]):
            assert torch.equal(pipe.transformer(*seen["args"], **call)[0], plain)


def test_what_the_pipeline_itself_passes_is_what_we_pass(pipe, image, every):
    """The denoiser's call in a generation of the same size and prompt has the same conditions as ours."""
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    every["fx"](image, "a photo of a cat", t=300)
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    if type(pipe).__name__.startswith("PixArt"):
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if type(pipe).__name__.startswith("Hunyuan"):
        options |= {"use_resolution_binning": False, "original_size": (HEIGHT, WIDTH), "target_size": (HEIGHT, WIDTH)}
    pipe("a photo of a cat", height=HEIGHT, width=WIDTH, **options)
    handle.remove()
    (_, ours), (_, theirs), *_ = calls
    for name, value in theirs.items():
        if name in ("hidden_states", "timestep", "return_dict", "joint_attention_kwargs"):
            continue
        mine = ours.get(name)
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
    batch = every["fx"](torch.cat([image, other]), ["a photo of a cat", "a dog"], t=300, seed=[1, 2])
    single = every["fx"](other, "a dog", t=300, seed=2)
    for id, tensor in single.items():
        assert torch.allclose(batch[id][1:], tensor, atol=1e-4, rtol=1e-4), id


def test_prompts_longer_than_the_context_are_refused(pipe, image, every):
    with pytest.raises(ValueError, match=r"has \d+ tokens and this model reads"):
        every["fx"](image, "cat " * 2000)


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
        )  # fmt: skip
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


def test_published_counts():
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(caption_channels=4096, sample_size=64)
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert len(list_activations(pixart)) == 280
    extra = ("cross-k", "cross-v", "text-map")  # which the released code does not offer
    assert sum(a.role not in extra for a in list_activations(flux)) == 437
