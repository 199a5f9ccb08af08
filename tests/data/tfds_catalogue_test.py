"""Sets that are not there."""

import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from megabyte_jax.data import tfds_catalogue, tfds_sets
from megabyte_jax.errors import DataError, UserError
from tests.tfds_files import open_mine, read

# Sets that are not there.


def error_of(source: str, root: Path, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as raised:
        tfds_sets.open_set(source, str(root))
    assert "\n" not in str(raised.value)
    assert not [path for path in root.rglob("dataset_info.json")]
    return str(raised.value)


def test_an_unknown_name_is_refused_with_close_ones(tmp_path: Path) -> None:
    message = error_of("tfds:librispech", tmp_path, UserError)
    assert message.startswith("data.source='tfds:librispech'") and "librispeech" in message


def test_an_unknown_config_is_refused_with_close_ones(tmp_path: Path) -> None:
    message = error_of("tfds:downsampled_imagenet/65x65", tmp_path, UserError)
    assert "64x64" in message


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("pg19", "'megabyte-jax[tf]'"),
        ("librispeech", "'megabyte-jax[tf]'"),
        ("wiki40b", "apache_beam"),
    ],
)
def test_a_set_that_needs_another_package_names_it(
    tmp_path: Path, name: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorflow", "apache_beam"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert error_of(f"tfds:{name}", tmp_path).endswith(f"pip install {install}")


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def no_network(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(tfds_catalogue, "_RETRIES", 0)
    message = error_of("tfds:tiny_shakespeare", tmp_path)
    assert message.startswith(f"tfds:tiny_shakespeare: not found in {tmp_path}")
    assert message.endswith("or what that asks for, such as a network")


def test_our_own_sets_are_not_looked_for_in_the_catalogue(tmp_path: Path) -> None:
    assert "python -m megabyte_jax.data prepare" in error_of("tfds:byte_files/x", tmp_path)


def test_a_set_of_the_catalogue_is_prepared_and_then_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.2.1")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="first")]

        def _info(self):
            features = tfds.features.FeaturesDict({"book": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate([{"book": b"a"}, {"book": b"\xff"}])

    monkeypatch.setattr(tfds, "builder_cls", lambda name: Toy)
    assert read(tmp_path, source="tfds:toy") == [b"a", b"\xff"]
    assert open_mine(tmp_path, "tfds:toy").name == "tfds:toy/first:3.2.1"
    monkeypatch.setattr(tfds, "builder_cls", None)
    assert read(tmp_path, source="tfds:toy/first:3.2.1") == [b"a", b"\xff"]
