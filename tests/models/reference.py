"""MEGABYTE in NumPy float64, written from the equations (paper, sections 2 and 2.3) for the tests.

One sequence at a time, one position at a time, and the local model over the whole sequence under
a banded mask, so that it shares neither code nor layout with the package. Only the names of the
parameters, and what the paper leaves open (where E_pos and the convolutions go), come from there.
"""

import functools

import jax
import numpy as np

from megabyte_jax.models import functional
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig

EPSILON = 1e-6  # of both normalisations


def tiny(both=None, *, global_model=None, local_model=None, **fields):
    """A config of five patches of four bytes whose sizes are all different."""
    both, global_model, local_model = both or {}, global_model or {}, local_model or {}
    wide = {"dim": 24, "num_layers": 2, "num_heads": 3, **both, **global_model}
    narrow = {"dim": 12, "num_layers": 3, "num_heads": 2, **both, **local_model}
    sizes = {"seq_len": 20, "patch_size": 4, "dtype": "float32", **fields}
    stages = {"global_model": wide, "local_model": narrow}
    return MegabyteConfig(**sizes, **{k: TransformerConfig(**v) for k, v in stages.items()})


def shapes(config):
    """The shapes of a model's parameters, without the memory."""
    return jax.eval_shape(functools.partial(functional.init_params, config), jax.random.key(0))


def random_params(config, seed=0):
    """Parameters at which every one matters, unlike the tiny initial weights and zero biases."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape, scale=0.25).astype(np.float32)
        return noise + ("scale" in jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(draw, shapes(config))


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def logits(config, params, x):
    """uint8 [B, T] -> float64 [B, T, V]."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return np.stack([_sequence(config, params, sequence) for sequence in x])


def _sequence(config, params, x):
    P, K, D_G = config.patch_size, len(x) // config.patch_size, config.byte_dim
    h_embed = _byte_embeddings(config, params["patch_embedder"], x)
    h_gin = [params["patch_embedder"]["pad"]]  # E_gpad
    h_gin += [np.concatenate(h_embed[(k - 1) * P : k * P]) for k in range(1, K)]
    causal = np.tril(np.ones((K, K), bool))
    h_gout = transformer(config.global_model, params["global_model"], np.stack(h_gin), causal)

    h_lin = []
    for t in range(len(x)):
        k, p = divmod(t, P)
        h = h_gout[k, p * D_G : (p + 1) * D_G] @ params["global_to_local"]["kernel"]  # w_GL
        h = h + (params["pad"] if p == 0 else params["byte_embedding"][x[t - 1]])
        h_lin.append(h + (params["position_embedding"][p] if config.local_positions else 0))
    sees = local_mask(len(x), P, config.previous)
    h_lout = transformer(config.local_model, params["local_model"], np.stack(h_lin), sees)
    scale = config.local_model.dim**-0.5 / 0.3 if config.init == "scaled" else 1.0
    return h_lout @ params["byte_embedding"].T * scale


def _byte_embeddings(config, params, x):
    """E_gl[x_t] + E_pos[t], then the convolutions, each over the bytes up to its own."""
    h = params["byte_embedding"][x]
    if config.byte_positions:
        h = h + params["position_embedding"][: len(x)]
    for i, width in enumerate(config.conv_kernels):
        mix = params["convolutions"][i]["mix"]
        taps = mix["kernel"].reshape(width, config.byte_dim, config.byte_dim)
        y = np.tile(mix["bias"], (len(x), 1))
        for t in range(len(x)):
            for back in range(min(width, t + 1)):
                y[t] += h[t - back] @ taps[width - 1 - back]
        h = h + np.maximum(y, 0)
    return h


def local_mask(T, P, r):
    """bool [T, T], whether position t sees s: s <= t of its patch, the last r of the one before."""
    sees = np.zeros((T, T), bool)
    for t in range(T):
        for s in range(t + 1):
            patches_back = t // P - s // P
            sees[t, s] = patches_back == 0 or (patches_back == 1 and s % P >= P - r)
    return sees


def transformer(config, params, x, sees):
    """A pre-norm stack over one sequence [T, D] under a mask [T, T]."""
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        y = _norm(config.norm, layer["attention_norm"], x)
        x = x + _attention(config, layer["attention"], y, sees)
        x = x + _feed_forward(config, layer["mlp"], _norm(config.norm, layer["mlp_norm"], x))
    return _norm(config.norm, params["norm"], x)


def _linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def _norm(kind, params, x):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
    return x * params["scale"] + params.get("bias", 0)


def _attention(config, params, x, sees):
    H, N, T = config.num_heads, config.num_kv_heads or config.num_heads, len(x)
    q = _linear(params["query"], x).reshape(T, H, -1)
    k = _linear(params["key"], x).reshape(T, N, -1)
    v = _linear(params["value"], x).reshape(T, N, -1)
    if config.qk_norm:
        q, k = _norm("rmsnorm", params["query_norm"], q), _norm("rmsnorm", params["key_norm"], k)
    if config.rope:
        q, k = _rotate(q), _rotate(k)
    y = np.zeros_like(q)
    for t in range(T):
        for h in range(H):
            n, seen = h // (H // N), np.flatnonzero(sees[t])
            weights = np.exp(k[seen, n] @ q[t, h] / np.sqrt(q.shape[-1]))
            y[t, h] = weights / weights.sum() @ v[seen, n]
    return _linear(params["out"], y.reshape(T, -1))


def _rotate(x):
    """Position t turns the i-th complex number of a head by t * 10000^(-2i / d)."""
    T, _, d = x.shape
    numbers = x[..., : d // 2] + 1j * x[..., d // 2 :]
    angles = np.outer(np.arange(T), 10_000.0 ** (-2 * np.arange(d // 2) / d))
    numbers = numbers * np.exp(1j * angles)[:, None]
    return np.concatenate([numbers.real, numbers.imag], -1)


def _feed_forward(config, params, x):
    h = _linear(params["up"], x)
    if config.activation == "relu":
        h = np.maximum(h, 0)
    elif config.activation == "relu2":
        h = np.maximum(h, 0) ** 2
    elif config.activation == "gelu":
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    elif config.activation == "swiglu":
        gate = _linear(params["gate"], x)
        h = gate / (1 + np.exp(-gate)) * h
    return _linear(params["down"], h)


def parameter_count(config):
    """The number of parameters by formula."""
    D, P = config.global_model.dim // config.patch_size, config.patch_size
    D_L = config.local_model.dim
    embedder = 256 * D + P * D + config.byte_positions * config.seq_len * D
    embedder += sum(width * D * D + D for width in config.conv_kernels)
    local = 256 * D_L + D_L + config.local_positions * P * D_L
    stacks = stack_parameter_count(config.global_model) + stack_parameter_count(config.local_model)
    return embedder + D * D_L + local + stacks


def stack_parameter_count(c):
    D, b = c.dim, int(c.bias)
    d = c.head_dim or D // c.num_heads
    q, kv = c.num_heads * d, (c.num_kv_heads or c.num_heads) * d
    F, ups = c.hidden_dim, 2 if c.activation == "swiglu" else 1
    norm = D * (1 + b) if c.norm == "layernorm" else D
    attention = (D + b) * (q + 2 * kv) + (q + b) * D + 2 * d * c.qk_norm
    return c.num_layers * (2 * norm + attention + ups * (D + b) * F + (F + b) * D) + norm
