"""What a run refuses before it reads a weight, and what it holds in memory before its first update."""

import weakref

import jax
import numpy as np
import pytest
from tiny import SMALLEST_UNET, quick_compilation, tiny_pipeline_folder, tiny_ready

from ddpo_jax.errors import InputError
from ddpo_jax.training.build import build, check_reward, describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "scheduler, message",
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "received 'FlowMatchEulerDiscreteScheduler'; it must be"),
        ({"prediction_type": "flow"}, "prediction_type: received 'flow'"),
    ],
)
def test_another_noise_process_is_refused_before_any_weight_is_read(tmp_path, scheduler, message):
    folder = tiny_pipeline_folder(tmp_path, unet=SMALLEST_UNET, scheduler=scheduler)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=message):
        build(tiny_ready(folder))


@pytest.mark.parametrize("rank", [0, 2])
@quick_compilation()
def test_the_loaded_parameters_do_not_outlive_their_copy_in_the_state(folder, rank):
    ready = tiny_ready(folder, **{"train.lora_rank": rank, "mesh.data": 1})
    parts, config = build(ready), ready.config
    loaded = {name: weakref.ref(value) for name, value in parts.model.params.items()}
    before = describe(parts, config)
    state = parts.init()
    assert [name for name, value in loaded.items() if value() is not None] == []
    assert {name: (x.shape, x.dtype) for name, x in parts.model.params.items()} == {
        name: (x.shape, x.dtype) for name, x in state.params.items()
    }
    assert describe(parts, config) == before  # the start-up log of a run that was restored


@quick_compilation()
def test_in_bfloat16_the_reference_is_the_untrained_policy(folder):
    """Norms use their scale and bias in float32, whatever the compute type."""
    ready = tiny_ready(folder, **{"train.lora_rank": 0, "mesh.data": 1, "dtype": "bfloat16", "algorithm.name": "dpok"})
    parts = build(ready)
    params, reference = parts.init().params, parts.model.reference
    assert {x.ndim for x in params.values()} >= {1, 2, 4}
    for name, value in params.items():
        cast = value if value.ndim < 2 else value.astype("bfloat16")
        np.testing.assert_array_equal(np.asarray(reference[name]), np.asarray(cast))
        assert reference[name].dtype == cast.dtype


def test_a_process_that_would_compare_a_part_of_a_prompts_images_is_refused(folder, monkeypatch):
    ready = tiny_ready(folder, **{"prompts.samples_per_prompt": 4, "mesh.data": 1})

    def reward(images, prompts, metadata): ...

    monkeypatch.setattr(jax, "process_count", lambda: 4)  # 2 of the 8 images each
    traits = ready.members.traits(ready.config)
    check_reward(reward, ready.config, traits)
    reward.groupwise = True
    with pytest.raises(InputError, match="sample.batch_size: received 8; .* 4 processes scores 2, .*; use 16"):
        check_reward(reward, ready.config, traits)
