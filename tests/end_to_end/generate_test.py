import pytest

from megabyte_jax import load
from megabyte_jax.text import printable
from tests import runs


def generate(capfd, workdir, *arguments):
    """What generate.py writes to stdout."""
    assert runs.run_main("generate", f"--workdir={workdir}", *arguments) == 0
    out, err = capfd.readouterr()
    assert err == "compiling ...\n"
    return out


def test_the_bytes_are_those_of_the_public_function(finished_run, capfd):
    arguments = ["--num_bytes=30", "--temperature=0.9", "--top_k=200", "--top_p=0.95", "--seed=3"]
    out = generate(capfd, finished_run, "--prompt=été", *arguments)
    expected = load(finished_run).generate("été".encode(), 30, 0.9, 200, 0.95, 3)
    assert out == printable(expected) + "\n"


def test_an_empty_prompt_starts_a_document_and_no_bytes_are_none(finished_run, capfd):
    assert generate(capfd, finished_run, "--num_bytes=0") == "\n"
    out = generate(capfd, finished_run, "--num_bytes=5")
    assert out == printable(load(finished_run).generate(b"", 5)) + "\n"


@pytest.mark.parametrize("prompt", [b"", b"\xff\x00\n", bytes(range(256))])
def test_a_prompt_may_come_from_a_file_of_any_bytes(finished_run, tmp_path, capfd, prompt):
    (tmp_path / "prompt").write_bytes(prompt)
    out = generate(capfd, finished_run, f"--prompt_file={tmp_path}/prompt", "--num_bytes=4")
    assert out == printable(load(finished_run).generate(prompt, 4)) + "\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--num_bytes=-1"], ["--num_bytes=-1", "at least 0"]),
        (["--num_bytes=many"], ["--num_bytes=many", "int"]),
        (["--temperature=-1"], ["--temperature=-1.0", "at least 0"]),
        (["--temperature=nan"], ["--temperature=nan", "at least 0"]),
        (["--top_k=0"], ["--top_k=0", "1 to 256"]),
        (["--top_p=1.5"], ["--top_p=1.5", "at most 1"]),
        (["--seed=-1"], ["--seed=-1", "2**32"]),
        (["--prompt_file=/no/such"], ["--prompt_file=/no/such", "accepted is a readable file"]),
        (["--prompt_file=/proc"], ["--prompt_file=/proc", "accepted is a readable file"]),
        (["--prompt=a", "--prompt_file=b"], ["--prompt='a'", "not both"]),
        (["--workdir=/no/such"], ["--workdir=/no/such", "a run of train.py"]),
    ],
    ids=lambda x: x[0],
)
def test_a_mistake_is_one_line(finished_run, capfd, arguments, named):
    before = runs.contents(finished_run)
    assert runs.run_main("generate", f"--workdir={finished_run}", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("generate.py: error: ") and err.count("\n") == 1
    assert all(part in err for part in named), err
    assert runs.contents(finished_run) == before
