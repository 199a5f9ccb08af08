import jax

from megabyte_jax import environment, sharding


def fingerprint(devices):
    sizes = {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1}
    return environment.fingerprint(sharding.make_mesh(sizes, jax.devices()[:devices]))


def test_what_changes_the_bits_is_told_line_by_line(monkeypatch):
    before = fingerprint(1)
    assert environment.differences(before, fingerprint(1)) == []
    assert before["jax"] == jax.__version__ and before["device"] == "cpu"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    told = environment.differences(before, {**fingerprint(2), "jax": "9.9"})
    assert [line.partition(":")[0] for line in told] == ["XLA_FLAGS", "jax", "mesh"]
    assert told[1] == f"jax: '{jax.__version__}', now '9.9'"
