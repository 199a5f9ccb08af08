import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.models.config import TransformerConfig
from megabyte_jax.models.layers import LayerMaker
from megabyte_jax.models.transformer import Transformer, dropped

D, L, H, F = 12, 3, 2, 20


def stack(previous=0, dtype="float32", **fields):
    sizes = {"dim": D, "num_layers": L, "num_heads": H, "mlp_dim": F, **fields}
    return Transformer(
        TransformerConfig(**sizes), previous, LayerMaker("scaled", dtype, nnx.Rngs(0))
    )


def activations(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def values_and_gradients(**fields):
    """With dropout, so that the same weights must be dropped where they are computed again."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: stack(previous=2, dropout=0.2, rope=True, **fields))
    )
    params = jax.tree.map(lambda leaf: 0.3 * activations(*leaf.shape), state)
    x, key = activations(2, 3, 4, D), jax.random.key(1)

    def loss(params, x):
        y = nnx.merge(graph, params)(x, key)
        return (y**3).sum(), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.fixture(scope="module")
def plain():
    return values_and_gradients()


@pytest.mark.parametrize("remat, unroll", [("dots", 2), ("full", 9)])
def test_how_layers_are_run_changes_neither_values_nor_gradients(remat, unroll, plain):
    same = values_and_gradients(remat=remat, scan_unroll=unroll)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_full_remat_keeps_less_for_the_backward_pass_than_dots_and_none():
    def kept(remat):
        backward = jax.eval_shape(
            lambda x: jax.vjp(stack(remat=remat), x)[1],
            jax.ShapeDtypeStruct((4, 2, 16, D), jnp.float32),
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("full") < kept("dots") < kept("none")


def test_dropped_keeps_the_mean_and_needs_a_key():
    x = np.full((100, 200), 3.0, np.float32)
    y = dropped(x, 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(y), [0, 4], atol=1e-6)
    assert abs(np.mean(y) - 3) < 0.05
    assert dropped(x, 0.25, None) is x
    assert dropped(x, 0.0, jax.random.key(0)) is x


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    model, x = stack(dtype="bfloat16"), activations(2, 1, 4, D)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    y = model(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), stack()(x), atol=0.1)


def torch_layer(torch, block):
    """PyTorch's own block, with the weights of one of ours."""
    layer = torch.nn.TransformerEncoderLayer(
        D, H, F, dropout=0.0, layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    at, mlp, weights = block["attention"], block["mlp"], {}
    for theirs, ours in {"weight": "kernel", "bias": "bias"}.items():
        joined = [at[name][ours] for name in ("query", "key", "value")]
        weights[f"self_attn.in_proj_{theirs}"] = np.concatenate(joined, -1).T
    pairs = {"self_attn.out_proj": at["out"], "linear1": mlp["up"], "linear2": mlp["down"]}
    for name, linear in pairs.items():
        weights |= {f"{name}.weight": linear["kernel"].T, f"{name}.bias": linear["bias"]}
    for name, norm in {"norm1": block["attention_norm"], "norm2": block["mlp_norm"]}.items():
        weights |= {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}
    layer.load_state_dict({k: torch.tensor(np.array(v)) for k, v in weights.items()})
    return layer.eval()


def test_a_block_is_that_of_pytorch():
    torch = pytest.importorskip("torch", reason="torch, the second library, is not installed")
    model, x = stack(num_layers=1), activations(2, 1, 7, D)
    noise = np.random.default_rng(1)
    blocks = jax.tree.map(
        lambda leaf: leaf[0] + noise.normal(size=leaf[0].shape, scale=0.2).astype(np.float32),
        nnx.to_pure_dict(nnx.state(model.blocks)),
    )
    nnx.update(model.blocks, jax.tree.map(lambda leaf: leaf[None], blocks))
    future = torch.tensor(~np.tri(7, dtype=bool))
    expected = torch_layer(torch, blocks)(torch.tensor(x[:, 0]), src_mask=future).detach().numpy()
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    np.testing.assert_allclose(block(x, None)[:, 0], expected, atol=1e-5)
