"""BERTScore recall: by hand, and against the definition written out in float64."""

import jax
import numpy as np

from ddpo_jax.ops import bertscore


def definition(candidate, reference, weight):
    """One pair, unpadded: the mean over the reference's tokens of the largest cosine with a token of the candidate."""
    total = 0.0
    for token, w in zip(np.asarray(reference, np.float64), weight, strict=True):
        cosines = [token @ other / np.sqrt((token @ token) * (other @ other)) for other in np.float64(candidate)]
        total += w * max(cosines)
    return total / sum(weight)


def test_by_hand():
    """Reference tokens along x, y and (3, 4); the candidate has x and (0, 2). Cosines: 1, 1, and max(0.6, 0.8)."""
    candidate = np.array([[[1, 0], [0, 2]]], np.float32)
    reference = np.array([[[5, 0], [0, 1], [3, 4]]], np.float32)
    here = np.ones((1, 2), bool)
    one = bertscore.recall(candidate, here, reference, np.ones((1, 3), np.float32))
    np.testing.assert_allclose(one, [(1 + 1 + 0.8) / 3], rtol=1e-6)
    weighted = bertscore.recall(candidate, here, reference, np.array([[0, 1, 3]], np.float32))
    np.testing.assert_allclose(weighted, [(1 + 3 * 0.8) / 4], rtol=1e-6)
    # without its second token the candidate matches y by 0 and (3, 4) by 0.6
    fewer = bertscore.recall(candidate, np.array([[True, False]]), reference, np.ones((1, 3), np.float32))
    np.testing.assert_allclose(fewer, [(1 + 0 + 0.6) / 3], rtol=1e-6)


def test_batches_with_padding_are_the_definition_one_by_one():
    rng = np.random.default_rng(0)
    lengths = [(3, 5), (7, 2), (1, 8), (4, 4)]
    candidate, present = np.zeros((4, 9, 16), np.float32), np.zeros((4, 9), bool)
    reference, weight = np.zeros((4, 8, 16), np.float32), np.zeros((4, 8), np.float32)
    expected = []
    for i, (rows, columns) in enumerate(lengths):
        candidate[i] = rng.normal(size=(9, 16))  # what stands in padding must not matter
        reference[i] = rng.normal(size=(8, 16))
        present[i, :rows] = True
        weight[i, :columns] = rng.uniform(0.1, 2, columns)
        expected.append(definition(candidate[i, :rows], reference[i, :columns], weight[i, :columns]))
    candidate[2, 1:], reference[1, 2:] = 0, 0  # zeros give no NaN
    out = jax.jit(bertscore.recall)(candidate, present, reference, weight)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert np.ptp(expected) > 0.1
