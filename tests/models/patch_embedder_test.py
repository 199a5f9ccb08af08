import jax
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.models.layers import LayerMaker
from megabyte_jax.models.patch_embedder import CausalConvolution, PatchEmbedder
from tests.models.reference import random_bytes, tiny

P, K, D = 4, 5, 6


def embedder(**fields):
    return PatchEmbedder(tiny(**fields), LayerMaker("scaled", "float32", nnx.Rngs(0)))


def test_a_slot_is_the_lossless_concatenation_of_the_patch_before_it():
    model, x = embedder(), random_bytes(2, P * K)
    out = np.asarray(model(x)).reshape(2, K, P, D)
    for b, k, p in np.ndindex(2, K - 1, P):
        t = k * P + p
        expected = model.byte_embedding[x[b, t]] + model.position_embedding[t]
        np.testing.assert_array_equal(out[b, k + 1, p], expected)


def test_the_first_slot_is_the_pad_whatever_the_bytes():
    model = embedder(conv_kernels=(3,))
    out = model(random_bytes(3, P * K))
    np.testing.assert_array_equal(out[:, 0], np.tile(model.pad[...], (3, 1)))


def test_byte_zero_is_embedded_and_not_taken_for_a_pad():
    model = embedder(byte_positions=False)
    out = model(np.zeros((1, 2 * P), np.uint8))
    np.testing.assert_array_equal(out[0, 1], np.tile(model.byte_embedding[0], P))
    assert np.all(out[0, 1] != out[0, 0])


def test_the_pad_is_as_wide_as_a_patch_and_apart_from_the_bytes():
    model = embedder()
    assert model.pad.shape == (P * D,)
    assert model.byte_embedding.shape == (256, D)


def test_a_shorter_sequence_takes_the_first_positions():
    model, x = embedder(conv_kernels=(3, 5)), random_bytes(2, P * K)
    np.testing.assert_allclose(model(x[:, : 3 * P]), model(x)[:, :3], atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_convolution_looks_back_its_width_and_never_ahead(kernel):
    layer = CausalConvolution(D, kernel, LayerMaker("scaled", "float32", nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(1, 12, D)).astype(np.float32)
    layer.mix.bias[...] += 10.0  # keeps every unit awake
    jacobian = np.abs(jax.jacobian(layer)(x, np.zeros((1, kernel - 1, D)))[0, :, :, 0]).sum(
        (1, 3)
    )  # [to, from]
    distance = np.subtract.outer(np.arange(12), np.arange(12))
    np.testing.assert_array_equal(jacobian > 0, (distance >= 0) & (distance < kernel))


def test_convolutions_cross_the_borders_of_patches():
    model, x = embedder(conv_kernels=(3, 5, 7)), random_bytes(1, P * K)
    other = x.copy()
    other[0, P - 1] += 1
    changed = np.any(model(x) != model(other), axis=-1)[0]
    np.testing.assert_array_equal(changed, [False, True, True, True, True])
