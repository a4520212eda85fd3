"""Capture on running UNets: each kind of activation against a hand-run, and the model untouched whatever happens."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from diffusion_features import CaptureError, UnknownActivation, capture, list_activations
from tests.released import sd15

BLOCK = "up-level1-repeat1-vit-block0"
PATH = "up_blocks.1.attentions.1"


@pytest.fixture
def model():
    unet, call = sd15()
    return unet.double(), {k: v.double() if v.is_floating_point() else v for k, v in call.items()}


def fingerprint(unet):
    """Everything a capture might leave behind."""
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unet.named_modules()]
    processors = [(n, id(m.processor)) for n, m in unet.named_modules() if hasattr(m, "processor")]
    modes = [m.training for m in unet.modules()]
    weights = [(n, p.requires_grad, p.detach().clone()) for n, p in unet.named_parameters()]
    return hooks, processors, modes, weights


def same(a, b):
    return a[:3] == b[:3] and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[3], b[3], strict=True))


def inputs_of(unet, path, call):
    """What a module is called with, by a hook of the test's own."""
    seen = {}
    module = unet.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True)
    with torch.no_grad():
        unet(**call)
    handle.remove()
    return seen["args"], seen["kwargs"]


def grid(tokens, h, w):
    """(B, h·w, C) → (B, C, h, w), element by element in row-major order."""
    out = torch.empty(tokens.shape[0], tokens.shape[2], h, w, dtype=tokens.dtype)
    for i in range(h * w):
        out[:, :, i // w, i % w] = tokens[:, i]
    return out


# ---- each kind against a hand-run in float64 ------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(16, 16), (24, 8)], ids=["square", "rectangular"])
def test_every_tensor_of_a_block_equals_a_hand_run(model, side):
    unet, call = model
    call["sample"] = torch.randn(2, 4, *side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h, w = side[0] // 4, side[1] // 4
    (hidden, *_), _ = inputs_of(unet, f"{PATH}.transformer_blocks.0", call)
    block, text = unet.get_submodule(f"{PATH}.transformer_blocks.0"), call["encoder_hidden_states"]

    def attend(attn, x, context):
        q, k, v = (F.linear(y, m.weight) for y, m in ((x, attn.to_q), (context, attn.to_k), (context, attn.to_v)))
        split = [y.reshape(2, -1, attn.heads, y.shape[-1] // attn.heads).transpose(1, 2) for y in (q, k, v)]
        probabilities = torch.softmax(split[0] @ split[1].mT / split[0].shape[-1] ** 0.5, dim=-1)
        mixed = (probabilities @ split[2]).transpose(1, 2).reshape(2, h * w, -1)
        return q, k, v, probabilities, F.linear(mixed, attn.to_out[0].weight, attn.to_out[0].bias)

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    x = norm(block.norm1, hidden)
    self_q, self_k, self_v, self_map, out = attend(block.attn1, x, x)
    hidden = hidden + out
    cross_q, cross_k, cross_v, cross_map, out = attend(block.attn2, norm(block.norm2, hidden), text)
    hidden = hidden + out
    inner, gate = F.linear(norm(block.norm3, hidden), block.ff.net[0].proj.weight, block.ff.net[0].proj.bias).chunk(
        2, -1
    )
    inner = inner * F.gelu(gate)
    end = hidden + F.linear(inner, block.ff.net[2].weight, block.ff.net[2].bias)

    by_hand = {
        "self-q": grid(self_q, h, w), "self-k": grid(self_k, h, w), "self-v": grid(self_v, h, w),
        "self-map": self_map, "cross-q": grid(cross_q, h, w), "cross-k": cross_k, "cross-v": cross_v,
        "cross-map": cross_map, "ffn-inner": grid(inner, h, w), "out": grid(end, h, w),
    }  # fmt: skip
    with torch.no_grad(), capture(unet, [f"{BLOCK}-{name}" for name in by_hand]) as features:
        unet(**call)
    for name, expected in by_hand.items():
        found = features[f"{BLOCK}-{name}"]
        assert found.is_contiguous()
        tolerance = 1e-6 if "map" in name else 1e-10
        assert torch.allclose(found, expected, atol=tolerance), name
    for name in ("self-map", "cross-map"):
        assert torch.allclose(features[f"{BLOCK}-{name}"].sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-6)


def test_increment_is_out_minus_shortcut_and_ends_are_the_models(model):
    unet, call = model
    (x, *_), _ = inputs_of(unet, "up_blocks.1.resnets.0", call)
    resnet = unet.up_blocks[1].resnets[0]
    ids = ["up-level1-repeat0-res-increment", "up-level1-repeat0-res-out", "unet-in", "unet-out", "unet-after-conv-in"]
    with torch.no_grad(), capture(unet, ids) as f:
        noise = unet(**call).sample
    shortcut = F.conv2d(x, resnet.conv_shortcut.weight, resnet.conv_shortcut.bias)
    assert torch.allclose(f[ids[0]], f[ids[1]] * resnet.output_scale_factor - shortcut, atol=1e-10)
    assert torch.equal(f["unet-in"], call["sample"]) and torch.equal(f["unet-out"], noise)
    expected = F.conv2d(call["sample"], unet.conv_in.weight, unet.conv_in.bias, padding=1)
    assert torch.allclose(f["unet-after-conv-in"], expected, atol=1e-12)


def test_info_matches_what_comes(model):
    unet, call = model
    every = list_activations(unet)
    with torch.no_grad(), capture(unet, every) as features:
        unet(**call)
    assert list(features) == [a.id for a in every]  # forward order
    for a in every:
        shape = features[a.id].shape
        assert shape[1 if a.kind != "text" else 2] == a.channels, a.id
        if a.kind == "spatial":
            assert shape[2:] == (16 // a.stride, 16 // a.stride), a.id


# ---- the model is the same before and after -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["normal", "exception inside", "stopped early", "unknown id"])
def test_model_is_bit_identical_afterwards(model, end):
    unet, call = model
    unet.up_blocks[3].attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    unet.train()
    before = fingerprint(unet)
    plain = unet(**call).sample.detach()
    ids = ["mid-vit-block0-self-map", "up-level3-repeat0-vit-block0-self-map", "mid-*"]
    if end == "unknown id":
        with pytest.raises(UnknownActivation), capture(unet, [*ids, "no-such-id"]):
            pass
    elif end == "exception inside":
        with pytest.raises(ZeroDivisionError), capture(unet, ids):
            unet.mid_block.attentions[0].register_forward_hook(lambda *_: 1 / 0)
            unet(**call)
        unet.mid_block.attentions[0]._forward_hooks.clear()
    else:
        with capture(unet, ids, stop_early=end == "stopped early"):
            unet(**call)
    assert same(before, fingerprint(unet))
    assert torch.equal(unet(**call).sample, plain)
    assert not torch.overrides._get_current_function_mode_stack()


def test_output_under_capture_is_bit_equal(model):
    unet, call = model
    with torch.no_grad():
        plain = unet(**call).sample
        with capture(unet, ["*", "*-map"]):
            assert torch.equal(unet(**call).sample, plain)


def test_a_capture_is_a_copy(model):
    """Models go on to change their own tensors in place; FreeU does so to what the block before returned."""
    unet, call = model
    seen = {}
    unet.up_blocks[0].upsamplers[0].register_forward_hook(lambda m, a, out: seen.update(out=out.clone()))
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    unet.mid_block.resnets[1].register_forward_pre_hook(lambda m, args: (args[0].mul_(7), *args[1:]))
    unet.mid_block.attentions[0].register_forward_hook(lambda m, a, out: seen.update(vit=out[0].clone()))
    with torch.no_grad(), capture(unet, ["up-level0-upsampler-out", "mid-vit-out"]) as features:
        unet(**call)
    assert torch.equal(features["up-level0-upsampler-out"], seen["out"])
    assert torch.equal(features["mid-vit-out"], seen["vit"])


# ---- stopping and steps ---------------------------------------------------------------------------------------------


def test_early_stop_runs_nothing_after_the_last_activation(model):
    unet, call = model
    ran = []
    for name in ("mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0"):
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad(), capture(unet, "mid-vit-out", stop_early=True) as features:
        unet(**call)
        pytest.fail("the body goes on after everything was captured")
    assert ran == ["mid_block.attentions.0"] and set(features) == {"mid-vit-out"}
    with torch.no_grad(), capture(unet, "mid-vit-out") as whole:
        unet(**call)
    assert torch.equal(features["mid-vit-out"], whole["mid-vit-out"])


def test_nested_captures_swallow_only_their_own_stop(model):
    unet, call = model
    with torch.no_grad(), capture(unet, "mid-vit-out", stop_early=True) as outer:
        with capture(unet, "up-level0-upsampler-out", stop_early=True):
            unet(**call)
        pytest.fail("the outer capture stopped the inner body")
    assert "mid-vit-out" in outer


def test_steps_keep_chosen_calls_and_otherwise_the_last_wins(model):
    unet, call = model
    runs = [
        torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    alone = []
    for x in runs:
        with torch.no_grad(), capture(unet, "mid-vit-out") as f:
            unet(**{**call, "sample": x})
        alone.append(f["mid-vit-out"])
    with torch.no_grad(), capture(unet, "mid-vit-out", steps=[0, 2]) as kept, capture(unet, "mid-vit-out") as last:
        for x in runs:
            unet(**{**call, "sample": x})
    assert set(kept["mid-vit-out"]) == {0, 2}
    assert torch.equal(kept["mid-vit-out"][0], alone[0]) and torch.equal(kept["mid-vit-out"][2], alone[2])
    assert torch.equal(last["mid-vit-out"], alone[2])


def test_steps_never_reached_are_an_error(model):
    unet, call = model
    with pytest.raises(CaptureError, match=r"called 1 times; there are no steps \[4\]"), torch.no_grad():
        with capture(unet, "mid-vit-out", steps=[0, 4]):
            unet(**call)


def test_cfg_batches_are_split(model):
    unet, call = model
    with (
        torch.no_grad(),
        capture(unet, "mid-vit-block0-*-map", split_cfg=True, steps=[0]) as f,
        capture(unet, "mid-vit-block0-*-map") as whole,
    ):
        unet(**call)
    pair = f["mid-vit-block0-cross-map"][0]
    assert torch.equal(pair.uncond, whole["mid-vit-block0-cross-map"][:1])
    assert torch.equal(pair.cond, whole["mid-vit-block0-cross-map"][1:])


def test_not_called_is_an_error(model):
    with pytest.raises(CaptureError, match="not called"), capture(model[0], "mid-vit-out"):
        pass


def test_an_error_of_the_body_is_not_hidden(model):
    with pytest.raises(KeyError), capture(model[0], "mid-vit-out"):
        raise KeyError("mine")


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["explicit", "sliced", "xformers"])
def test_layers_without_sdpa_lend_their_map_and_get_their_processor_back(model, kind):
    unet, call = model
    with torch.no_grad(), capture(unet, "*-map") as plain:
        unet(**call)
    own = {"explicit": AttnProcessor(), "sliced": SlicedAttnProcessor(1), "xformers": XFormersAttnProcessor()}[kind]
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.processor = own
    with torch.no_grad(), capture(unet, "mid-vit-block0-self-map", stop_early=True) as features:
        unet(**call)
    assert attn.processor is own
    assert torch.allclose(features["mid-vit-block0-self-map"], plain["mid-vit-block0-self-map"], atol=1e-7)


def test_other_layers_keep_their_backend(model):
    """A map of one layer changes nothing in any other: they run the processor the user chose."""
    unet, call = model
    ran = []

    class Own(AttnProcessor2_0):
        def __call__(self, attn, *args, **kwargs):
            ran.append(attn)
            return super().__call__(attn, *args, **kwargs)

    unet.set_attn_processor(Own())
    layers = sum(1 for m in unet.modules() if hasattr(m, "processor"))
    with torch.no_grad(), capture(unet, "mid-vit-block0-self-map"):
        unet(**call)
    assert len(ran) == layers == 32


def test_a_layer_that_makes_no_sdpa_call_is_an_error(model):
    unet, call = model

    class Silent(AttnProcessor):
        pass

    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Silent()
    with pytest.raises(CaptureError, match=r"mid-vit-block0-self-map.*no scaled_dot_product_attention.*Silent"):
        with torch.no_grad(), capture(unet, "mid-vit-block0-self-map"):
            unet(**call)


def test_the_first_attention_call_of_a_layer_is_its_map(model):
    unet, call = model

    class Twice(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            out = super().__call__(attn, hidden_states, *args, **kwargs)
            super().__call__(attn, hidden_states * 0, *args, **kwargs)
            return out

    with torch.no_grad(), capture(unet, "mid-vit-block0-self-map") as plain:
        unet(**call)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Twice()
    with torch.no_grad(), capture(unet, "mid-vit-block0-self-map") as twice:
        unet(**call)
    assert torch.equal(plain["mid-vit-block0-self-map"], twice["mid-vit-block0-self-map"])


def test_attention_outside_the_layer_is_not_charged_to_it(model):
    unet, call = model
    with torch.no_grad(), capture(unet, "up-level3-repeat2-vit-block0-cross-map") as features:
        unet(**call)
        kept = features["up-level3-repeat2-vit-block0-cross-map"].clone()
        F.scaled_dot_product_attention(*[torch.randn(1, 1, 3, 4)] * 3)
    assert torch.equal(features["up-level3-repeat2-vit-block0-cross-map"], kept)


def test_head_mean(model):
    unet, call = model
    with (
        torch.no_grad(),
        capture(unet, "mid-vit-block0-cross-map", heads="mean") as mean,
        capture(unet, "mid-vit-block0-cross-map") as each,
    ):
        unet(**call)
    expected = each["mid-vit-block0-cross-map"].mean(1, keepdim=True)
    assert torch.allclose(mean["mid-vit-block0-cross-map"], expected, atol=1e-7)


def test_fused_projections_are_sliced(model):
    unet, call = model
    ids = ["mid-vit-block0-self-*", "mid-vit-block0-cross-*", "mid-vit-block0-*-map"]
    with torch.no_grad(), capture(unet, ids) as plain:
        unet(**call)
    unet.fuse_qkv_projections()
    with torch.no_grad(), capture(unet, ids) as fused:
        unet(**call)
    assert set(plain) == set(fused) and len(plain) == 8
    for id in plain:
        assert torch.allclose(plain[id], fused[id], atol=1e-6), id


def test_chunked_feed_forward_is_whole(model):
    unet, call = model
    ids = ["mid-vit-block0-ffn-inner", "up-level1-repeat0-vit-block0-ffn-inner"]
    with torch.no_grad(), capture(unet, ids) as plain:
        unet(**call)
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(1, dim=1)
    with torch.no_grad(), capture(unet, ids, stop_early=True) as chunked:
        unet(**call)
    for id in ids:
        assert torch.allclose(plain[id], chunked[id], atol=1e-10), id


# ---- wrappers, threads, gradients -----------------------------------------------------------------------------------


def test_lora_layers_are_captured_with_their_adapter(model):
    from peft import LoraConfig, get_peft_model

    unet, call = model
    id = "mid-vit-block0-self-q"
    with torch.no_grad(), capture(unet, id) as plain:
        unet(**call)
    before = [a.id for a in list_activations(unet)]
    wrapped = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)).double()
    with torch.no_grad(), capture(wrapped, id) as adapted:
        wrapped(**call)
    assert [a.id for a in list_activations(wrapped)] == before
    assert not torch.allclose(plain[id], adapted[id])
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    (x, *_), _ = inputs_of(unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", call)
    weight = (
        layer.base_layer.weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    expected = grid(F.linear(x, weight), 2, 2)
    assert torch.allclose(adapted[id], expected, atol=1e-10)


@pytest.mark.parametrize("how", ["DataParallel", "DistributedDataParallel"])
def test_wrapped_models_are_captured(model, how, tmp_path):
    unet, call = model
    with torch.no_grad(), capture(unet, "mid-vit-block0-self-map") as plain:
        unet(**call)
    if how == "DataParallel":
        wrapped = torch.nn.DataParallel(unet)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
        wrapped = torch.nn.parallel.DistributedDataParallel(unet)
    try:
        assert list_activations(wrapped) == list_activations(unet)
        with torch.no_grad(), capture(wrapped, "mid-vit-block0-self-map") as features:
            wrapped(**call)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert torch.equal(plain["mid-vit-block0-self-map"], features["mid-vit-block0-self-map"])


@pytest.mark.parametrize("how", ["torch.compile", "in place", "one block"])
def test_compiled_models_are_captured(model, how):
    _, call = model
    unet = UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).double()  # fmt: skip
    id = "mid-vit-block0-self-map"
    with torch.no_grad(), capture(unet, id) as plain:
        unet(**call)
    backend = {"backend": "eager"}
    compiled = torch.compile(unet, **backend) if how == "torch.compile" else unet
    if how == "in place":
        unet.compile(**backend)
    if how == "one block":
        unet.mid_block.compile(**backend)
    with torch.no_grad():
        compiled(**call)  # compiled before any hook exists
        with capture(compiled, id) as features:
            compiled(**call)
    assert torch.equal(plain[id], features[id])
    torch._dynamo.reset()


def test_another_thread_is_neither_captured_nor_stopped(model):
    unet, call = model
    other = {}

    def work():
        with torch.no_grad():
            other["out"] = unet(**{**call, "sample": call["sample"] * 0}).sample

    with torch.no_grad():
        expected = unet(**{**call, "sample": call["sample"] * 0}).sample
        with capture(unet, ["mid-vit-out", "mid-vit-block0-self-map"], stop_early=True) as features:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert not features
            unet(**call)
    assert torch.equal(other["out"], expected) and len(features) == 2


def test_gradients_are_kept_on_demand(model):
    unet, call = model
    call["sample"].requires_grad_()
    ids = ["mid-vit-block0-self-map", "mid-vit-block0-cross-q"]
    with capture(unet, ids) as detached:
        unet(**call)
    assert not any(f.requires_grad for f in detached.values())
    with capture(unet, ids, grad=True) as features:
        unet(**call)
    assert all(f.requires_grad for f in features.values())
    features["mid-vit-block0-cross-q"].pow(2).sum().backward()
    gradient = call["sample"].grad[0, 0, 3, 3].item()

    def loss(delta):
        sample = call["sample"].detach().clone()
        sample[0, 0, 3, 3] += delta
        with torch.no_grad(), capture(unet, ids[1]) as f:
            unet(**{**call, "sample": sample})
        return f[ids[1]].pow(2).sum().item()

    assert gradient == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-5)


def test_checkpointing_records_once_and_refuses_maps_with_gradients(model):
    unet, call = model
    call["sample"].requires_grad_()
    id = "mid-vit-block0-cross-q"
    with capture(unet, id, grad=True) as plain:
        loss = unet(**call).sample.sum() + plain[id].pow(2).sum()
        loss.backward()
    expected, call["sample"].grad = call["sample"].grad, None
    unet.enable_gradient_checkpointing()
    unet.train()
    with capture(unet, [id, "up-level1-repeat0-vit-block0-out"], grad=True, steps=[0]) as features:
        out = unet(**call).sample.sum()
        kept = features[id][0]
        (out + kept.pow(2).sum()).backward()  # recomputes the block inside the capture
        assert features[id][0] is kept and set(features[id]) == {0}
    assert torch.allclose(call["sample"].grad, expected, atol=1e-9)
    with pytest.raises(CaptureError, match=r"mid-vit-block0-self-map.*mid_block.*checkpointed"):
        with capture(unet, "mid-vit-block0-self-map", grad=True):
            unet(**call)
    with capture(unet, "mid-vit-block0-self-map") as maps:
        unet(**call).sample.sum().backward()
    assert not maps["mid-vit-block0-self-map"].requires_grad


def test_offload_and_cast_as_captured(model):
    unet, call = model
    with torch.no_grad(), capture(unet, ["mid-vit-out", "mid-vit-block0-self-map"], dtype=torch.float16) as features:
        unet(**call)
    assert {f.dtype for f in features.values()} == {torch.float16}
    with torch.no_grad(), capture(unet, "mid-vit-out", device="meta") as features:
        unet(**call)
    assert features["mid-vit-out"].device.type == "meta"


def test_nothing_is_kept_alive_by_a_finished_capture(model):
    unet, call = model
    with torch.no_grad(), capture(unet, "mid-vit-out") as features:
        unet(**call)
    import weakref

    gone = weakref.ref(features["mid-vit-out"])
    del features
    gc.collect()
    assert gone() is None


def test_a_copied_model_can_be_captured(model):
    unet, call = model
    twin = copy.deepcopy(unet)
    with torch.no_grad(), capture(unet, "mid-vit-out") as a, capture(twin, "mid-vit-out") as b:
        unet(**call)
        twin(**call)
    assert torch.equal(a["mid-vit-out"], b["mid-vit-out"])
