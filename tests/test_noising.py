"""Noise levels against diffusers' own schedulers; DDIM moves against diffusers, closed forms and exact denoisers."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffusion_features.noising import Draw, add_noise, check_t, ddim_move, signal_and_noise, travel

SD_BETAS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULERS = {
    "pndm": ("PNDMScheduler", dict(SD_BETAS, skip_prk_steps=True, steps_offset=1)),
    "ddim": ("DDIMScheduler", dict(SD_BETAS, steps_offset=1, clip_sample=False)),
    "ddim-zero-snr": ("DDIMScheduler", dict(SD_BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing")),
    "ddpm": ("DDPMScheduler", SD_BETAS),
    "ddpm-if": ("DDPMScheduler", dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")),
    "euler-leading": (
        "EulerDiscreteScheduler",
        dict(SD_BETAS, timestep_spacing="leading", steps_offset=1, interpolation_type="linear"),
    ),
    "euler-linspace": ("EulerDiscreteScheduler", SD_BETAS),
    "euler-trailing": ("EulerDiscreteScheduler", dict(SD_BETAS, timestep_spacing="trailing")),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", dict(SD_BETAS, timestep_spacing="leading", steps_offset=1)),
    "heun": ("HeunDiscreteScheduler", SD_BETAS),
    "lms": ("LMSDiscreteScheduler", SD_BETAS),
    "dpm": ("DPMSolverMultistepScheduler", SD_BETAS),
    "dpm-pixart": ("DPMSolverMultistepScheduler", dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")),
    "dpm-single": ("DPMSolverSinglestepScheduler", SD_BETAS),
    "unipc": ("UniPCMultistepScheduler", SD_BETAS),
    "deis": ("DEISMultistepScheduler", SD_BETAS),
}


def make(name: str, **changes: Any) -> Any:
    kind, settings = SCHEDULERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, kind)(**{**settings, **changes})


def alpha_bars(name: str) -> np.ndarray:
    """ᾱ_t in float64, from the betas of the paper (arXiv 2006.11239) and of Stable Diffusion's and iDDPM's code."""
    settings = SCHEDULERS[name][1]
    if settings["beta_schedule"] == "scaled_linear":
        betas = np.linspace(settings["beta_start"] ** 0.5, settings["beta_end"] ** 0.5, 1000) ** 2
    elif settings["beta_schedule"] == "linear":
        betas = np.linspace(settings["beta_start"], settings["beta_end"], 1000)
    else:
        curve = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    bars = np.cumprod(1 - betas)
    if settings.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bars


# ---- noise levels ---------------------------------------------------------------------------------------------------


def model_input(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
    """What a diffusers pipeline feeds its denoiser when the denoiser is told exactly t."""
    scheduler.set_timesteps(1000)
    step = scheduler.timesteps[(scheduler.timesteps == t).nonzero()[0, 0]]
    return scheduler.scale_model_input(scheduler.add_noise(clean, noise, step[None]), step)


@pytest.mark.parametrize("t", [1, 50, 51, 407, 999])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_add_noise_is_what_the_scheduler_feeds_its_denoiser(name: str, t: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    scheduler = make(name)
    ours = add_noise(clean, noise, t, scheduler)
    theirs = model_input(make(name), clean, noise, t)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("t", [0, 50, 999])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_follow_the_betas(name: str, t: int) -> None:
    bar = alpha_bars(name)[t]
    expected = (bar**0.5, (1 - bar) ** 0.5)
    assert signal_and_noise(make(name), t) == pytest.approx(expected, abs=2e-4 if t < 999 else 2e-3)


@pytest.mark.parametrize("name", ["pndm", "ddim", "ddpm", "euler-leading", "dpm", "unipc", "ddpm-if"])
def test_mean_and_deviation_of_a_large_sample(name: str) -> None:
    t, n, value = 261, 200_000, 2.0
    bar = alpha_bars(name)[t]
    noise = Draw(3, 1)(torch.empty(1, n))
    noisy = add_noise(torch.full((1, n), value), noise, t, make(name))
    deviation = (1 - bar) ** 0.5
    assert noisy.mean().item() == pytest.approx(value * bar**0.5, abs=5 * deviation / n**0.5)
    assert noisy.std().item() == pytest.approx(deviation, abs=5 * deviation / (2 * n) ** 0.5)


def test_after_set_timesteps_nothing_changes() -> None:
    clean, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 0.5)
    for name in SCHEDULERS:
        scheduler = make(name)
        before = add_noise(clean, noise, 300, scheduler)
        scheduler.set_timesteps(20)
        assert torch.equal(add_noise(clean, noise, 300, scheduler), before), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    clean = torch.ones(1, 4, 2, 2, dtype=dtype)
    assert add_noise(clean, clean, 10, make("pndm")).dtype == dtype
    assert ddim_move(clean, clean, 10, 20, make("pndm")).dtype == dtype
    assert Draw(0, 1)(clean).dtype == dtype


# ---- timesteps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 50, 999, np.int64(7), np.int32(999)])
def test_valid_timesteps(t: Any) -> None:
    checked = check_t(t, make("pndm"))
    assert checked == t and type(checked) is int


@pytest.mark.parametrize("t", [-1, 1000, 10**9])
def test_timesteps_out_of_range(t: int) -> None:
    with pytest.raises(ValueError, match=rf"t={t} is out of range.* between 0 .* and 999"):
        check_t(t, make("euler-leading"))


def test_the_range_is_that_of_the_scheduler() -> None:
    short = make("ddim", num_train_timesteps=100)
    assert check_t(99, short) == 99
    with pytest.raises(ValueError, match="and 99 "):
        check_t(100, short)


@pytest.mark.parametrize("t", [True, False, 50.0, np.float32(3), "50", None, torch.tensor(50)])
def test_timesteps_of_another_type(t: Any) -> None:
    with pytest.raises(TypeError, match="t must be an integer"):
        check_t(t, make("pndm"))


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_model_without_timesteps_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no alphas_cumprod"):
        check_t(50, getattr(diffusers, name)())


# ---- DDIM -----------------------------------------------------------------------------------------------------------

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_is_that_of_the_ddim_scheduler(kind: str, to_one: bool) -> None:
    scheduler = make("ddim", prediction_type=kind, set_alpha_to_one=to_one)
    scheduler.set_timesteps(50)  # 981, 961, ..., 21, 1
    generator = torch.Generator().manual_seed(1)
    noisy, prediction = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    for t, following in [(981, 961), (501, 481), (41, 21), (21, 1)]:
        theirs = scheduler.step(prediction, t, noisy, eta=0.0).prev_sample
        torch.testing.assert_close(ddim_move(noisy, prediction, t, following, scheduler), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_step_ends_at_level_0(kind: str) -> None:
    """Only where the schedule says so too: with ``set_alpha_to_one`` its last step goes to ᾱ = 1, which is no level."""
    scheduler = make("ddim", prediction_type=kind, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    noisy, prediction = torch.full((1, 4, 2, 2), 0.3), torch.full((1, 4, 2, 2), -0.7)
    theirs = scheduler.step(prediction, 1, noisy, eta=0.0).prev_sample
    torch.testing.assert_close(ddim_move(noisy, prediction, 1, 0, scheduler), theirs, rtol=1e-4, atol=1e-5)
    to_one = make("ddim", prediction_type=kind, set_alpha_to_one=True)
    to_one.set_timesteps(50)
    other = to_one.step(prediction, 1, noisy, eta=0.0).prev_sample
    assert not torch.allclose(other, theirs, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_up_is_that_of_the_inverse_scheduler(kind: str) -> None:
    scheduler = make("ddim", prediction_type=kind)
    inverse = diffusers.DDIMInverseScheduler(
        **SD_BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    inverse.set_timesteps(50)
    generator = torch.Generator().manual_seed(2)
    noisy, prediction = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    for t, following in [(1, 21), (21, 41), (481, 501), (961, 981)]:
        theirs = inverse.step(prediction, following, noisy).prev_sample  # it names a step by where the step ends
        torch.testing.assert_close(ddim_move(noisy, prediction, t, following, scheduler), theirs, rtol=1e-4, atol=1e-5)


def test_zero_signal_is_left_by_v_prediction() -> None:
    """At t=999 of a zero-SNR schedule x_t is the noise itself and v = -x_0 (arXiv 2305.08891)."""
    scheduler = make("ddim-zero-snr", prediction_type="v_prediction")
    clean, noise = torch.full((1, 4, 2, 2), 1.5), torch.full((1, 4, 2, 2), -0.25)
    signal, sigma = signal_and_noise(scheduler, 600)
    moved = ddim_move(noise, -clean, 999, 600, scheduler)
    torch.testing.assert_close(moved, signal * clean + sigma * noise, rtol=1e-4, atol=1e-4)


def test_an_unknown_prediction_type() -> None:
    scheduler = make("ddim")
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="'score' is not known; known are epsilon"):
        ddim_move(torch.zeros(1), torch.zeros(1), 5, 0, scheduler)


# ---- flow matching --------------------------------------------------------------------------------------------------

SIGMAS = [1.0, 0.9, 0.6, 0.407, 0.25, 0.001]


def flow_scheduler() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=SIGMAS)
    return scheduler


def test_flow_noise_is_that_of_the_scheduler() -> None:
    scheduler = flow_scheduler()
    clean, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for timestep in scheduler.timesteps:
        theirs = scheduler.scale_noise(clean, timestep[None], noise)
        torch.testing.assert_close(add_noise(clean, noise, round(timestep.item()), scheduler), theirs)


def test_a_flow_step_is_that_of_the_scheduler() -> None:
    scheduler = flow_scheduler()
    noisy, velocity = (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    levels = [round(1000 * sigma) for sigma in [*SIGMAS, 0.0]]
    for timestep, (t, following) in zip(scheduler.timesteps, pairwise(levels), strict=True):
        theirs = scheduler.step(velocity, timestep, noisy).prev_sample
        torch.testing.assert_close(ddim_move(noisy, velocity, t, following, scheduler), theirs, rtol=1e-4, atol=1e-5)


def test_flow_timesteps_are_thousandths_of_sigma() -> None:
    scheduler = flow_scheduler()
    assert [check_t(t, scheduler) for t in (0, 407, 1000)] == [0, 407, 1000]
    for t in (-1, 1001):
        with pytest.raises(ValueError, match=rf"t={t} is out of range: it is 1000·sigma, between 0 .* and 1000"):
            check_t(t, scheduler)
    with pytest.raises(TypeError, match="t must be an integer"):
        check_t(407.5, scheduler)  # type: ignore[arg-type]


def test_the_flow_of_a_gaussian_under_flow_matching() -> None:
    s = 0.3

    def variance(t: int) -> float:
        return (1 - t / 1000) ** 2 * s**2 + (t / 1000) ** 2

    def velocity(noisy: torch.Tensor, t: int) -> torch.Tensor:
        return (t / 1000 - (1 - t / 1000) * s**2) * noisy / variance(t)

    clean = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy = travel(clean, 0, 1000, 1000, velocity, flow_scheduler())
    torch.testing.assert_close(noisy, clean * (variance(1000) / variance(0)) ** 0.5, rtol=1e-2, atol=0)
    torch.testing.assert_close(travel(noisy, 1000, 0, 1000, velocity, flow_scheduler()), clean, rtol=2e-2, atol=0)


# ---- exact denoisers ------------------------------------------------------------------------------------------------


class Gaussian:
    """The exact denoiser of data ~ N(0, s²): x_t ~ N(0, V_t) with V_t = ᾱ_t s² + 1 - ᾱ_t, jointly with x_0 and ε."""

    def __init__(self, s: float, kind: str) -> None:
        self.s, self.kind, self.bars = s, kind, alpha_bars("ddim")
        self.asked: list[int] = []

    def variance(self, t: int) -> float:
        return float(self.bars[t] * self.s**2 + 1 - self.bars[t])

    def __call__(self, noisy: torch.Tensor, t: int) -> torch.Tensor:
        self.asked.append(t)
        signal, sigma = self.bars[t] ** 0.5, (1 - self.bars[t]) ** 0.5
        eps, clean = sigma * noisy / self.variance(t), signal * self.s**2 * noisy / self.variance(t)
        return {"epsilon": eps, "v_prediction": signal * eps - sigma * clean, "sample": clean}[self.kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
def test_the_flow_of_a_gaussian(kind: str, s: float) -> None:
    """Its probability flow only scales, x_t = x_0 √(V_t / V_0), whatever the seed and the sign."""
    scheduler, denoiser = make("ddim", prediction_type=kind), Gaussian(s, kind)
    clean = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy = travel(clean, 0, 800, 800, denoiser, scheduler)
    scale = (denoiser.variance(800) / denoiser.variance(0)) ** 0.5
    torch.testing.assert_close(noisy, clean * scale, rtol=1e-2, atol=0)
    back = travel(noisy, 800, 0, 800, denoiser, scheduler)
    torch.testing.assert_close(back, clean, rtol=2e-2, atol=0)


def test_more_steps_come_nearer() -> None:
    """DDIM is a first-order solver: twice the steps, half the error."""
    scheduler, denoiser = make("ddim"), Gaussian(0.3, "epsilon")
    clean = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scale = (denoiser.variance(900) / denoiser.variance(0)) ** 0.5
    errors = [abs(travel(clean, 0, 900, n, denoiser, scheduler).item() / scale - 1) for n in (100, 200, 400)]
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]


def test_travel_asks_at_each_level_but_the_last() -> None:
    scheduler, denoiser = make("ddim"), Gaussian(1.0, "epsilon")
    x = torch.ones(1, 1, 1, 1)
    for start, target, steps, asked in [
        (0, 100, 4, [0, 25, 50, 75]),
        (60, 50, 5, [60, 58, 56, 54, 52]),
        (3, 0, 10, [3, 2, 1]),  # no level twice
        (50, 50, 10, []),
    ]:
        denoiser.asked.clear()
        moved = travel(x, start, target, steps, denoiser, scheduler)
        assert denoiser.asked == asked
        assert torch.equal(moved, x) == (not asked)


# ---- draws ----------------------------------------------------------------------------------------------------------


def reference(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed))


def test_each_image_draws_what_it_would_alone() -> None:
    batch = Draw([4, 9, 4], 3)(torch.empty(3, 4, 2, 6))
    for row, seed in zip(batch, [4, 9, 4], strict=True):
        assert torch.equal(row, reference(seed, 4, 2, 6))
    shared = Draw(9, 2)(torch.empty(2, 4, 2, 6))
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], batch[1])


def test_draws_follow_one_another() -> None:
    draw, like = Draw([1, 2], 2), torch.empty(2, 4, 2, 2)
    first, second = draw(like), draw(like)
    assert not torch.equal(first, second)
    alone, generator = torch.Generator().manual_seed(2), torch.empty(4, 2, 2)
    for drawn in (first, second):
        assert torch.equal(drawn[1], torch.randn(generator.shape, generator=alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_draws_are_float32_on_the_cpu_and_then_cast(dtype: torch.dtype) -> None:
    assert torch.equal(Draw(7, 1)(torch.empty(1, 4, 2, 2, dtype=dtype))[0], reference(7, 4, 2, 2).to(dtype))


def test_draws_do_not_depend_on_torch_s_defaults() -> None:
    expected = reference(7, 4, 2, 2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = Draw(7, 1)(torch.empty(1, 4, 2, 2, dtype=torch.float32, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32 and torch.equal(drawn[0], expected)


def test_streams_are_independent() -> None:
    n = 100_000
    one, other = (Draw(7, 1, stream=s)(torch.empty(1, n))[0] for s in (0, 1))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 5 / n**0.5
    assert torch.equal(one, reference(7, n))


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    Draw(7, 2)(torch.empty(2, 4, 2, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], []])
def test_a_wrong_number_of_seeds(seeds: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 2 images: give one seed, or one an image"):
        Draw(seeds, 2)


def test_seeds_of_any_integer_type() -> None:
    like = torch.empty(1, 4)
    assert torch.equal(Draw(np.int64(7), 1)(like), Draw([7], 1)(like))  # type: ignore[arg-type]
    assert torch.equal(Draw(np.array([7]), 1)(like), Draw(7, 1)(like))  # type: ignore[arg-type]
