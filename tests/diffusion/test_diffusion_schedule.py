"""The noise schedule against PyTorch diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.diffusion import schedule
from ddpo_jax.errors import InputError
from ddpo_jax.models import schema

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("spacing", schema.SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
def test_timesteps_and_alphas_are_those_of_diffusers(spacing, offset, to_one, num_steps):
    config = SD | {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    theirs = diffusers.DDIMScheduler(**config)
    theirs.set_timesteps(num_steps)
    ours = schedule.make(config, num_steps, 1.0)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    assert ours.num_steps == num_steps
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-6)
    previous = theirs.timesteps - 1000 // num_steps
    for index, (now, before) in enumerate(zip(theirs.timesteps, previous, strict=True)):
        expected = theirs.alphas_cumprod[before] if before >= 0 else theirs.final_alpha_cumprod
        np.testing.assert_allclose(ours.alpha_prev[index], expected, rtol=3e-6)
        np.testing.assert_allclose(ours.alpha[index], theirs.alphas_cumprod[now], rtol=3e-6)
        # theirs subtracts nearby float32 numbers; ours is computed in float64
        std = theirs._get_variance(now, before).clamp(min=0) ** 0.5
        np.testing.assert_allclose(ours.std[index], std, rtol=2e-3, atol=3e-4)


@pytest.mark.parametrize("betas", [{"beta_schedule": name} for name in schema.BETA_SCHEDULES] + [
    {"trained_betas": list(np.linspace(1e-4, 0.03, 1000))}, {"num_train_timesteps": 400, "beta_schedule": "linear"},
])  # fmt: skip
def test_beta_schedules(betas):
    config = SD | betas
    theirs = diffusers.DDIMScheduler(**config)
    np.testing.assert_allclose(schedule.make(config, 10, 1.0).alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4)


def test_std_by_hand_in_float64_and_proportional_to_eta():
    config = SD | {"steps_offset": 1, "set_alpha_to_one": False}
    bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    now, before = bar[[601, 401, 201, 1]], np.array([bar[401], bar[201], bar[1], bar[0]])
    variance = (1 - before) / (1 - now) * (1 - now / before)
    ours = schedule.make(config | {"timestep_spacing": "leading"}, 5, 1.0)
    np.testing.assert_array_equal(ours.timesteps, [801, 601, 401, 201, 1])
    np.testing.assert_allclose(ours.std[1:], np.sqrt(variance), rtol=1e-6)
    np.testing.assert_allclose(schedule.make(config, 5, 0.25).std, 0.25 * ours.std, rtol=1e-6)
    assert ours.std.dtype == ours.alpha.dtype == jnp.float32 and ours.timesteps.dtype == jnp.int32


def test_a_step_without_noise_is_not_trainable():
    """With set_alpha_to_one, or where the last step goes from timestep 0 to 0; and every step at eta 0."""
    for options, last in [
        ({"steps_offset": 1, "set_alpha_to_one": False}, True),
        ({"steps_offset": 1, "set_alpha_to_one": True}, False),
        ({"steps_offset": 0, "set_alpha_to_one": False}, False),
        ({"timestep_spacing": "linspace", "set_alpha_to_one": False}, False),
        ({"timestep_spacing": "trailing", "set_alpha_to_one": False}, True),
    ]:
        made = schedule.make(SD | options, 10, 1.0)
        assert made.trainable.tolist() == [True] * 9 + [last], options
        np.testing.assert_array_equal(made.std > 0, made.trainable)
    assert not schedule.make(SD, 10, 0.0).trainable.any()


def test_trailing_has_as_many_steps_as_asked_for():
    """61 is one of the 62 numbers for which diffusers' own rule (an arange of floats) ends with timestep -1."""
    theirs = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing")
    for num_steps in (48, 61, 103, 998):  # 48: the rule rounds halves
        made = schedule.make(SD | {"timestep_spacing": "trailing"}, num_steps, 1.0)
        theirs.set_timesteps(num_steps)
        assert made.num_steps == num_steps
        np.testing.assert_array_equal(made.timesteps, theirs.timesteps[:num_steps])
        assert theirs.timesteps[num_steps:].tolist() in ([], [-1])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_a_key_left_out_means_what_it_means_to_the_class_named_in_the_file(name):
    theirs = getattr(diffusers, name)(**{key: value for key, value in SD.items() if key != "clip_sample"})
    config = {key: value for key, value in SD.items() if key != "clip_sample"} | {"_class_name": name}
    if "clip_sample" in theirs.config:
        assert theirs.config.clip_sample is True
        with pytest.raises(ValueError, match="clip_sample: received True"):
            schedule.make(config, 5, 1.0)
    made = schedule.make(config | {"clip_sample": False}, 5, 1.0)
    final = theirs.one if name == "DDPMScheduler" else theirs.final_alpha_cumprod
    np.testing.assert_allclose(made.alpha_prev[-1], final, rtol=1e-6)


@pytest.mark.parametrize(
    "key, value",
    [
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "karras"),
        ("clip_sample", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_unsupported_options_are_refused_by_name(key, value):
    rule = "only False is supported" if value is True else "it must be one of"
    with pytest.raises(ValueError, match=f"scheduler_config.json {key}: received {value!r}; {rule}"):
        schedule.make(SD | {key: value}, 10, 1.0)


@pytest.mark.parametrize("num_steps, offset", [(0, 0), (1001, 0), (1000, 1)])
def test_impossible_numbers_of_steps_are_refused(num_steps, offset):
    with pytest.raises(ValueError, match=f"sample.num_steps: received {num_steps}; .*choose a smaller number"):
        schedule.make(SD | {"steps_offset": offset}, num_steps, 1.0)


@pytest.mark.parametrize("num_train_timesteps", [0, -5, "1000", 1000.0, True, None, 10**9])
def test_wrong_numbers_of_training_timesteps_are_refused(num_train_timesteps):
    with pytest.raises(InputError, match="scheduler_config.json num_train_timesteps: .*whole number from 1"):
        schedule.make(SD | {"num_train_timesteps": num_train_timesteps}, 10, 1.0)


@pytest.mark.parametrize("key", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [0, 1, -0.1, "0.1", None, float("nan"), float("inf"), [0.1], True])
def test_wrong_betas_are_refused(key, value):
    with pytest.raises(InputError, match=rf"scheduler_config.json {key}: .*it must be a number in \(0, 1\)"):
        schedule.make(SD | {key: value}, 10, 1.0)


@pytest.mark.parametrize(
    "betas, message",
    [
        ([], "list of numbers"),
        ("0.1", "list of numbers"),
        ([0.1, None], "list of numbers"),
        ([0.1, 1.5] * 500, "list of numbers"),
        ([[0.1]] * 1000, "list of numbers"),
        ([0.01] * 999, "received 999 numbers; there must be one for each of num_train_timesteps=1000"),
        ([0.9] * 1000, "nothing is left of an image"),
    ],
)
def test_wrong_trained_betas_are_refused(betas, message):
    with pytest.raises(InputError, match=message) as error:
        schedule.make(SD | {"trained_betas": betas}, 10, 1.0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_all_wrong_options_are_told_at_once():
    wrong = {
        "steps_offset": -1,
        "set_alpha_to_one": "yes",
        "beta_schedule": 3,
        "prediction_type": None,
        "thresholding": 1,
    }
    with pytest.raises(InputError) as error:
        schedule.make(SD | wrong, 10, 1.0)
    lines = str(error.value).splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(f"{key}:" for key in wrong)
