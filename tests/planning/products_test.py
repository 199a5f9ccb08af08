import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax.planning import cost, hlo, products


def counted(function, *shapes):
    """FLOPs of the program that XLA compiles."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return cost.of(hlo.parse(jax.jit(function).lower(*args).compile().as_text())).flops


def test_a_product_of_matrices_costs_2_m_n_k():
    assert counted(jnp.matmul, (12, 34), (34, 56)) == 2 * 12 * 34 * 56


def test_batches_and_transposed_operands_count_as_they_are():
    def scores(q, k):
        return jnp.einsum("bgtnhd,bgsnd->bgnhts", q, k)

    flops = counted(scores, (2, 3, 7, 2, 5, 4), (2, 3, 11, 2, 4))
    assert flops == 2 * (2 * 3) * (2 * 5) * 7 * 11 * 4


def test_a_scan_of_products_costs_as_often_as_it_runs():
    def model(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    shapes = (6, 32), (9, 32, 32)
    forward = 2 * 6 * 32 * 32 * 9
    assert counted(model, *shapes) == forward
    assert counted(jax.grad(model, argnums=(0, 1)), *shapes) == 3 * forward


def test_a_convolution_costs_what_xla_counts_without_its_padding():
    def convolve(x, w):
        dims = ("NTC", "TIO", "NTC")
        return jax.lax.conv_general_dilated(x, w, (1,), [(4, 0)], dimension_numbers=dims)

    shapes = (2, 17, 6), (5, 6, 10)
    pairs = sum(min(5, t + 1) for t in range(17))
    assert counted(convolve, *shapes) == 2 * 2 * 6 * 10 * pairs


def positions(size, kernel, out, low, stride, left, right):
    """The pairs, one by one."""
    filled = {i * left for i in range(size)}
    return sum(
        o * stride - low + k * right in filled
        for o, k in itertools.product(range(out), range(kernel))
    )


SIZES = st.tuples(*[st.integers(1, 9)] * 3, st.integers(0, 9), *[st.integers(1, 5)] * 3)


@given(SIZES)
def test_positions_of_a_window_are_those_that_meet_an_element(sizes):
    names = ("size", "kernel", "out", "low", "stride", "left_dilation", "right_dilation")
    arguments = dict(zip(names, sizes, strict=True))
    assert products._valid_positions(**arguments) == positions(*sizes)


@pytest.mark.parametrize("batch", [1, 6, 48])
def test_a_batch_of_products_that_tpu_writes_as_one_convolution(batch):
    """Batch as a window over an input dilated by its own length, each step one further."""
    text = f"""\
HloModule m
ENTRY %main (a: bf16[{batch},8,16], b: bf16[{batch},16,32]) -> bf16[{batch},8,32] {{
  %a = bf16[{batch},8,16]{{2,1,0}} parameter(0)
  %b = bf16[{batch},16,32]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{batch},8,32]{{2,1,0}} convolution(%a, %b), \
window={{size={batch} stride={max(1, batch - 1)} lhs_dilate={batch}}}, dim_labels=0bf_0io->0bf
}}
"""
    assert cost.of(hlo.parse(text)).flops == 2 * batch * 8 * 16 * 32


def test_products_of_libraries_count_and_other_kernels_are_named():
    text = """\
HloModule m
ENTRY %main (a: bf16[6,16,8], b: bf16[6,16,32]) -> bf16[6,8,32] {
  %a = bf16[6,16,8]{2,1,0} parameter(0)
  %b = bf16[6,16,32]{2,1,0} parameter(1)
  %c = (bf16[6,8,32]{2,1,0}, s8[99]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}
  %d = bf16[6,8,32]{2,1,0} get-tuple-element(%c), index=0
  ROOT %e = bf16[6,8,32]{2,1,0} custom-call(%d), custom_call_target="tpu_custom_call"
}
"""
    found = cost.of(hlo.parse(text))
    assert found.flops == 2 * 6 * 8 * 16 * 32
    assert found.kernels == {"tpu_custom_call": 1}
