"""Files that may come from anyone are plain, of bounded size, and where they should be."""

import os

import pytest

from megabyte_jax import foreign
from megabyte_jax.errors import UserError


def test_a_plain_file_and_one_behind_links_inside_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "link.json").symlink_to("a.json")
    for name in ("a.json", "link.json"):
        assert foreign.check_file(tmp_path / name, tmp_path) == 8
        assert foreign.read_json(tmp_path / name, tmp_path, 8) == {"x": 1}


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "link", "loop", "device"])
def test_anything_else_is_refused_without_being_opened(tmp_path, kind):
    path = tmp_path / "inside" / "x"
    path.parent.mkdir()
    (tmp_path / "outside").write_text("{}")
    targets = {"link": tmp_path / "outside", "loop": path, "device": "/dev/zero"}
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind != "missing":
        {"fifo": os.mkfifo, "folder": os.mkdir}[kind](path)
    with pytest.raises(OSError):
        foreign.check_file(path, path.parent)


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "[" * 200_000, '{"a": "' + "x" * 99 + '"}'])
def test_what_is_no_object_of_that_size_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError):
        foreign.read_json(tmp_path / "x", tmp_path, 99 if text[:2] == '{"' else 10**6)


@pytest.mark.parametrize("link", ["", "folder", "file", "up"])
def test_links_that_lead_out_of_a_directory_are_not_written_through(tmp_path, link):
    inside, path = tmp_path / "in", tmp_path / "in" / "eval" / "x.json"
    (inside / "eval").mkdir(parents=True)
    if not link:
        foreign.require_inside(inside, path)
        return
    if link == "folder":
        path.parent.rmdir()
        path.parent.symlink_to(tmp_path)
    elif link != "up":
        path.symlink_to(tmp_path / "x")
    with pytest.raises(UserError, match="lead out of .*; accepted is"):
        foreign.require_inside(inside, path if link != "up" else inside / ".." / "x")
