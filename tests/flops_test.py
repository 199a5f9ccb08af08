import dataclasses

import jax
import numpy as np
import pytest

from megabyte_jax import flops
from megabyte_jax.models import megabyte
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig

STAGE = TransformerConfig(dim=512, num_layers=2, num_heads=4, scan_unroll=2)
MODEL = MegabyteConfig(
    seq_len=512,
    patch_size=8,
    global_model=STAGE,
    local_model=dataclasses.replace(STAGE, dim=384),
    dtype="float32",
)
GROUPED = dict(num_kv_heads=2, activation="swiglu", norm="rmsnorm", bias=False, rope=True)


def compiled_flops(config):
    """Of the forward pass per byte, as the compiler counts them."""
    params = jax.eval_shape(lambda: megabyte.init_params(config, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, config.seq_len), np.uint8)
    lowered = jax.jit(megabyte.logits, static_argnums=0).lower(config, params, x)
    return lowered.compile().cost_analysis()["flops"] / config.seq_len


@pytest.mark.parametrize(
    "switches, block",
    [({}, {}), ({"cross_patch": 0}, {}), ({"conv_kernels": (3, 5)}, {}), ({}, GROUPED)],
)
def test_the_formula_agrees_with_the_compiler(switches, block):
    stages = {
        name: dataclasses.replace(getattr(MODEL, name), **block)
        for name in ("global_model", "local_model")
    }
    config = dataclasses.replace(MODEL, **stages, **switches)
    counted = compiled_flops(config)
    assert abs(flops.forward_flops_per_byte(config) / counted - 1) < 0.03


def test_the_formula_is_the_one_of_the_paper_without_attention():
    """Section 3: 2 (m_g / P + m_l) per byte for m parameters in the matrices."""
    per_layer = 12  # D^2 each: 4 of attention, 8 of the feed-forward layer
    weights = per_layer * 2 * (512**2 / 8 + 384**2) + 384 * (64 + 256)
    scores = 2 * 4 * (64 * 512 / 8 + 16 * 384)
    assert flops.forward_flops_per_byte(MODEL) == 2 * weights + scores
    assert flops.train_flops_per_byte(MODEL) == 3 * (2 * weights + scores)


def test_the_measured_rate_is_within_reason():
    assert 1e8 < flops.matmul_rate("float32", seconds=0.01) < 1e16
