import jax
import numpy as np
import optax
import pytest

from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.optimizer import make_optimizer, make_schedule, num_steps
from tests import runs


def settings(**changes):
    """`config.optimizer` and `config.train` of 20 updates, 5 of which warm up."""
    defaults = {"train.num_steps": 20, "optimizer.warmup_steps": 5, "optimizer.learning_rate": 3e-3}
    config = runs.tiny_config("stdlib", **{**defaults, **changes})
    return config.optimizer, config.train


def rates(**changes):
    schedule = make_schedule(*settings(**changes), runs.T)
    return np.array([schedule(step) for step in range(21)])


def reference(kind, end=0.0):
    """Rises over updates 0 to 5 to the peak, where the decay over the other 15 begins."""
    rise = 3e-3 * np.arange(1, 6) / 6
    left = 1 - np.arange(16) / 15
    shape = {"linear": left, "cosine": (1 + np.cos(np.pi * (1 - left))) / 2, "constant": left**0}
    return np.concatenate([rise, 3e-3 * (end + (1 - end) * shape[kind])])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("end", [0.0, 0.25])
def test_the_rate_rises_and_decays_as_the_config_says(kind, end):
    made = rates(**{"optimizer.schedule": kind, "optimizer.end_fraction": end})
    np.testing.assert_allclose(made, reference(kind, end), rtol=1e-6, atol=1e-9)


def test_the_rate_decays_from_the_first_update_without_a_warm_up():
    made = rates(**{"optimizer.warmup_steps": 0})
    np.testing.assert_allclose(made, 3e-3 * (1 - np.arange(21) / 20), rtol=1e-6, atol=1e-9)


def test_budgets_in_bytes_are_those_in_updates_rounded_up():
    size = 4 * runs.T  # bytes of an update
    by_bytes = {"train.num_steps": 0, "train.num_bytes": 20 * size - 5}
    warmup = {"optimizer.warmup_steps": 0, "optimizer.warmup_bytes": 4 * size + 1}
    assert num_steps(settings(**by_bytes)[1], runs.T) == 20
    np.testing.assert_array_equal(rates(**by_bytes, **warmup), rates())


@pytest.mark.parametrize("steps, bytes_", [(0, 0), (3, 999), (0, 2**52)])
def test_a_budget_is_one_number_that_can_be_counted(steps, bytes_):
    changes = {"train.num_steps": steps, "train.num_bytes": bytes_, "train.batch_size": 1}
    with pytest.raises(UserError, match=r"^train.num_(steps|bytes)=\d+: accepted is"):
        num_steps(settings(**changes)[1], runs.T)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"optimizer.warmup_steps": 20}, "optimizer.warmup_steps=20"),
        ({"optimizer.warmup_bytes": 99}, "optimizer.warmup_bytes=99"),
        (
            {"optimizer.warmup_steps": 0, "optimizer.warmup_bytes": 99_999},
            "optimizer.warmup_bytes=99999",
        ),
    ],
)
def test_a_warm_up_that_makes_no_sense_is_named(changes, named):
    with pytest.raises(UserError, match=f"{named}: accepted"):
        rates(**changes)


def adamw(params, gradients, rates, config, decayed):
    """AdamW (Loshchilov and Hutter 2019) behind a clip of the norm, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    m, v = ({name: 0.0 for name in params} for _ in range(2))
    for t, (step, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in step.values()))
        for name, gradient in step.items():
            g = gradient.astype(np.float64) * min(1, config.clip_norm / norm)
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            update = m[name] / (1 - config.b1**t)
            update /= np.sqrt(v[name] / (1 - config.b2**t)) + config.eps
            decay = config.weight_decay * params[name] * (name in decayed)
            params[name] = params[name] - rate * (update + decay)
    return params


def test_updates_are_those_of_adamw_behind_a_clip():
    config, rates = settings()[0], [0.1, 0.03, 0.2]
    random, shape = np.random.default_rng(0), {"kernel": (3, 5), "bias": (5,), "scale": (1, 3)}
    shape |= {"pad": (4,), "byte_embedding": (7, 2), "position_embedding": (2, 2)}
    start, *gradients = (
        {name: random.normal(0, size, s).astype("f4") for name, s in shape.items()}
        for size in (1, 1, 0.02, 5)  # the second gradient is not clipped
    )
    optimizer = make_optimizer(config, lambda step: jax.numpy.array(rates)[step])
    params, state = start, optimizer.init(start)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    decayed = {"kernel", "byte_embedding", "position_embedding"}
    expected = adamw(start, gradients, rates, config, decayed)
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_all_weights_and_embeddings_of_a_model_decay_and_nothing_else():
    params = functional.init_params(runs.tiny_model(), jax.random.key(0))
    params = jax.tree.map(jax.numpy.ones_like, params)
    optimizer = make_optimizer(settings()[0], lambda _: 1.0)
    zero = jax.tree.map(jax.numpy.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        decays = path[-1].key in ("kernel", "byte_embedding", "position_embedding")
        np.testing.assert_allclose(update, -0.1 * decays, err_msg=jax.tree_util.keystr(path))


def first_updates(make):
    """The first updates of a model, at a rate of one, for gradients that are all random."""
    params = functional.init_params(runs.tiny_model(), jax.random.key(0))
    random = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), params)
    config, _ = settings(**{"optimizer.name": "muon", "optimizer.weight_decay": 0.0})
    optimizer = make(config, lambda _: 1.0)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    named = jax.tree_util.tree_leaves_with_path(updates)
    return {jax.tree_util.keystr(path): np.asarray(update, np.float64) for path, update in named}


def nadam(config, schedule):
    adam = optax.nadam(schedule, b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def test_muon_orthogonalises_the_matrices_of_the_blocks_and_leaves_the_rest_to_adam():
    muon, adam = first_updates(make_optimizer), first_updates(nadam)
    for path, update in muon.items():
        if "blocks" in path and path.endswith("['kernel']"):
            unit = update / (0.2 * np.sqrt(max(update.shape[1:])))
            singular = np.linalg.svd(unit, compute_uv=False)  # [L, min(in, out)]
            assert singular.max() < 1.3 and np.median(singular) > 0.6, path
        else:
            np.testing.assert_allclose(update, adam[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_step_of_muon_is_about_as_large_as_one_of_adam():
    sizes = [np.sqrt(np.square(update).mean()) for update in first_updates(make_optimizer).values()]
    assert 0.1 < min(sizes) and max(sizes) < 1.6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_kept_in_the_type_that_is_asked_for_and_steps_are_hardly_others(name):
    model = runs.tiny_model(init="scaled")
    params = functional.init_params(model, jax.random.key(0))
    grads = jax.tree.map(lambda x: x / 10, functional.init_params(model, jax.random.key(1)))
    moved = {}
    for dtype in ("float32", "bfloat16"):
        changes = {"optimizer.name": name, "optimizer.state_dtype": dtype}
        optimizer = make_optimizer(settings(**changes)[0], lambda step: 0.01)
        state, moved[dtype] = optimizer.init(params), params
        update = jax.jit(optimizer.update)
        for _ in range(3):
            updates, state = update(grads, state, moved[dtype])
            moved[dtype] = optax.apply_updates(moved[dtype], updates)
        kept = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
        assert kept == {jax.numpy.dtype(dtype)}
    start, one, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (params, *moved.values())
    )
    assert 0 < np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one - start)
