"""What every algorithm must do. The files are discovered, so a new one is tested without an edit here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.find import available, find
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import TERMS, StepTerms, Traits

NAMES = available("algorithms")
pytestmark = pytest.mark.parametrize("name", NAMES)


def test_the_module_has_the_four_functions_and_a_source(name):
    module = find("algorithms", name)
    assert all(callable(getattr(module, f)) for f in ("default_config", "traits", "advantages", "loss"))
    assert "Paper" in module.__doc__, "the docstring names paper and equation"
    config = module.default_config()
    config.lock()
    used = module.traits(config)
    assert isinstance(used, Traits) and used.terms <= set(TERMS) and used.terms
    assert ("value" in used.terms) == (used.value_updates > 0) == hasattr(module, "value_loss")
    assert used.branching == hasattr(module, "interval") == hasattr(module, "select")


def test_loss_shape_dtype_and_finiteness(name, toy):
    module = find("algorithms", name)
    for config in toy.variants(module):
        used = module.traits(config)
        for dtype in ("float32", "float64"):
            data = toy.data(dtype=dtype)
            n, s = data.batch.mask.shape
            for part in [getattr(module, name) for name in ("loss", "penalty") if hasattr(module, name)]:
                out = part(toy.only(used.terms, data.terms), data.batch, config)
                assert out.dtype == dtype
                if used.separable:
                    assert out.shape == (n, s)
                else:  # one entry per sample, pair of samples, or pair and step: what the learner's plain mean reduces
                    assert out.ndim >= 1 and set(out.shape) <= {n, n // 2, s}, out.shape
                assert np.isfinite(out).all()
            if used.value_updates:
                value = module.value_loss(toy.only(used.terms, data.terms), data.batch, config)
                assert value.shape == data.batch.mask.shape and value.dtype == dtype


def test_no_recompilation_on_the_second_call(name, toy):
    module = find("algorithms", name)
    config = module.default_config()
    traces = []

    @jax.jit
    def loss(terms, batch):
        traces.append(1)
        return module.loss(terms, batch, config)

    for seed in (0, 1):
        data = toy.data(seed)
        loss(data.terms, data.batch)
    assert len(traces) == 1


def test_two_pass_gradient_is_the_direct_gradient(name, toy):
    module = find("algorithms", name)
    data = toy.data()
    for config in toy.variants(module):
        direct = jax.grad(
            lambda p, c=config: toy.reduce(
                module, c, toy.only(module.traits(c).terms, toy.terms(p, data.ref, data.latents)), data.batch
            )
        )(data.params)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(direct)) > 1e-4, "the test data exercise the loss"
        for microbatch in (2, 3):  # in pieces of either size
            two_pass = toy.two_pass(module, config, microbatch)
            for key, want in direct.items():
                np.testing.assert_allclose(two_pass[key], want, rtol=0, atol=1e-10, err_msg=key)


def test_separable_losses_do_not_depend_on_the_microbatch(name, toy):
    """What makes one pass enough: the loss of a pair is the same whatever is computed beside it."""
    module = find("algorithms", name)
    data = toy.data()
    for config in toy.variants(module):
        if not module.traits(config).separable:
            continue
        whole = toy.whole_loss(module, config, data.terms, data.batch)
        for row, column in ((0, 0), (3, 2), (5, 3)):
            picked = jax.tree.map(
                lambda x, r=row, c=column: x[r : r + 1, c : c + 1] if x.ndim == 2 else x[r : r + 1],
                (data.terms, data.batch),
            )
            np.testing.assert_array_equal(toy.whole_loss(module, config, *picked)[0, 0], whole[row, column])


def test_masked_pairs_have_no_gradient_and_no_influence(name, toy):
    module = find("algorithms", name)
    data = toy.data()
    hole = data.batch.mask == 0
    for config in toy.variants(module):
        used = module.traits(config)
        terms = toy.only(used.terms, data.terms)
        grad = jax.grad(lambda x, b, c=config: toy.reduce(module, c, x, b))
        for leaf in jax.tree.leaves(grad(terms, data.batch)):
            np.testing.assert_array_equal(leaf[hole], 0)
        empty = dataclasses.replace(data.batch, mask=jnp.zeros_like(data.batch.mask))
        if not used.separable:  # a separable loss is masked by the learner
            for leaf in jax.tree.leaves(grad(terms, empty)):
                np.testing.assert_array_equal(leaf, 0)
            # anything may stand in a masked entry: not a number, or a density that does not exist
            for bad in (jnp.nan, jnp.inf):
                dirty = jax.tree.map(lambda x, b=bad: jnp.where(hole, b, x), terms)
                old = jnp.where(hole, -bad, data.batch.old_log_prob)
                dirty_batch = dataclasses.replace(data.batch, old_log_prob=old)
                for got, want in zip(
                    jax.tree.leaves(grad(dirty, dirty_batch)), jax.tree.leaves(grad(terms, data.batch)), strict=True
                ):
                    np.testing.assert_array_equal(got, want)


def test_padding_samples_change_nothing(name, toy):
    """A fully masked sample appended to a minibatch leaves loss and coefficients as they were."""
    module = find("algorithms", name)
    data = toy.data()
    padded_terms, padded = jax.tree.map(
        lambda x: jnp.concatenate([x, x[:1]]), (data.terms, dataclasses.replace(data.batch))
    )
    padded = dataclasses.replace(padded, mask=padded.mask.at[-1].set(0))
    for config in toy.variants(module):
        used = module.traits(config)
        function = jax.value_and_grad(lambda x, b, c=config: toy.reduce(module, c, x, b))
        value, grad = function(toy.only(used.terms, data.terms), data.batch)
        padded_value, padded_grad = function(toy.only(used.terms, padded_terms), padded)
        np.testing.assert_allclose(padded_value, value, rtol=1e-12)
        for got, want in zip(jax.tree.leaves(padded_grad), jax.tree.leaves(grad), strict=True):
            np.testing.assert_allclose(got[:-1], want, rtol=1e-12, atol=1e-15)


def test_no_signal_means_no_gradient(name, toy):
    """Zero advantages, equal rewards, a value function that is right and an unmoved policy: nothing to learn."""
    module = find("algorithms", name)
    data = toy.data()
    terms = toy.terms(data.params, data.params, data.latents)  # the policy is the reference
    batch = dataclasses.replace(
        data.batch, advantages=jnp.zeros(6), rewards=jnp.full(6, 0.7), old_log_prob=terms.log_prob
    )

    for config in toy.variants(module):
        used = module.traits(config)

        def loss(params, used=used, config=config):
            now = toy.terms(params, data.params, data.latents)
            now = dataclasses.replace(now, value=jnp.full_like(now.value, 0.7))
            return toy.reduce(module, config, toy.only(used.terms, now), batch)

        for leaf in jax.tree.leaves(jax.grad(loss)(data.params)):
            np.testing.assert_allclose(leaf, 0, atol=1e-14)


def test_advantages_are_host_numbers_in_the_order_of_the_samples(name):
    module = find("algorithms", name)
    rng = np.random.default_rng(3)
    rewards, ids = rng.normal(size=12), np.repeat([5, 2**62, 7], 4)
    order = rng.permutation(12)
    config = module.default_config()
    out = module.advantages(rewards, ids, PromptStats(), config)
    assert isinstance(out, np.ndarray) and out.shape == (12,) and out.dtype == np.float64
    assert np.isfinite(out).all() and np.ptp(out) > 0
    shuffled = module.advantages(rewards[order], ids[order], PromptStats(), config)
    np.testing.assert_allclose(shuffled, out[order], rtol=1e-9)
    assert module.advantages(rewards, ids, PromptStats(), config) is not rewards


def test_a_group_algorithm_refuses_single_samples(name):
    module = find("algorithms", name)
    if module.traits(module.default_config()).group:
        with pytest.raises(ValueError, match="prompts.samples_per_prompt"):
            module.advantages(np.arange(3.0), np.array([0, 0, 1]), PromptStats(), module.default_config())


def _outcome(module, config, data, toy) -> list:
    """Everything an option can change."""
    used = module.traits(config)
    terms = toy.only(used.terms, data.terms)
    functions = [getattr(module, part) for part in ("loss", "penalty", "value_loss") if hasattr(module, part)]
    out = [np.asarray(f(terms, data.batch, config)) for f in functions]
    if terms.log_prob is not None:
        for f in functions:

            def total(log_prob, f=f):
                return f(terms.replace(log_prob=log_prob), data.batch, config).sum()

            out.append(np.asarray(jax.grad(total)(terms.log_prob)))
    rng, stats = np.random.default_rng(4), PromptStats()
    for _ in range(12):  # a prompt sees 60 rewards in 12 updates
        rewards = 3 + rng.normal(size=10)
        advantages = module.advantages(rewards, np.repeat([0, 1], 5), stats, config)
        out.append(advantages)
        if used.branching:
            out.append(module.select(advantages, np.repeat([0, 1], 5), config))
    if used.branching:
        out.append([module.interval(i, 9, 20, config) for i in range(9)])
    return [dataclasses.astuple(used), *out]


def _same(first, second) -> bool:
    return first[0] == second[0] and all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_every_option_changes_something(name, toy):
    module = find("algorithms", name)
    data = toy.data()
    choices = getattr(module, "CHOICES", {})
    for key in module.default_config():
        changed = False
        for config in toy.variants(module):
            before = _outcome(module, config, data, toy)
            old = config[key]
            if key in choices:
                news = [value for value in choices[key] if value != old]
            elif isinstance(old, bool):
                news = [not old]
            else:
                news = [old * 2, type(old)(old / 2), old + 1]
            for new in news:
                other = config.copy_and_resolve_references()
                other[key] = new
                try:
                    changed = changed or not _same(before, _outcome(module, other, data, toy))
                except ValueError as error:  # a value outside the rule is refused by name
                    assert f"algorithm.{key}" in str(error)
        assert changed, f"algorithm.{name}: no value of {key!r} changes anything"


def test_wrong_options_are_refused_by_name(name):
    module = find("algorithms", name)
    for key in getattr(module, "CHOICES", {}):
        config = module.default_config()
        config[key] = "nonsense"
        with pytest.raises(ValueError, match=f"algorithm.{key}: received 'nonsense'"):
            module.traits(config)
    for key, value in module.default_config().items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            config = module.default_config()
            config[key] = type(value)(-1)
            if name == "b2_diffurl" and key.startswith("keep_"):
                continue  # thresholds of either sign
            with pytest.raises(ValueError, match=f"algorithm.{key}: received -1"):
                module.traits(config)


def test_unused_terms_are_not_read(name, toy):
    module = find("algorithms", name)
    data = toy.data()
    for config in toy.variants(module):
        used = module.traits(config).terms
        assert set(used) == {
            term for term in used if _reads(module, config, toy.only(used - {term}, data.terms), data.batch, toy)
        }, "traits lists exactly the terms that the losses read"


def _reads(module, config, terms: StepTerms, batch, toy) -> bool:
    """Whether a loss fails without the term that ``terms`` lacks."""
    try:
        toy.whole_loss(module, config, terms, batch)
        return False
    except (TypeError, AttributeError, ValueError):
        return True


def test_per_prompt_says_whether_what_a_prompts_samples_have_in_common_matters(name, toy):
    module = find("algorithms", name)
    rng = np.random.default_rng(0)
    ids = np.repeat([3, 1, 7], 32)  # as many as DDPO's buffer holds of a prompt
    rewards, offset = 90 + rng.normal(size=96), np.repeat([5.0, -2.0, 0.5], 32)
    for config in toy.variants(module):
        one, other = (module.advantages(values, ids, PromptStats(), config) for values in (rewards, rewards + offset))
        assert np.allclose(one, other, atol=1e-9) == module.traits(config).per_prompt, config
