"""The same inputs give the same bytes in every process, with as many threads."""

import pytest

TUNE = (
    "import sys, torch\n"
    "torch.set_num_threads({threads})\n"
    "from tav_peft.cli.main import main\n"
    "sys.argv = ['tav', *{arguments!r}, '-o', '{output}']\n"
    "main()"
)


@pytest.fixture
def tuned_with(tmp_path, fork, tuning):
    """Tune in a process of its own with so many threads, and give the adapter's and the state's bytes."""

    def run(name, threads):
        code = TUNE.format(threads=threads, arguments=tuning, output=f"{name}.safetensors")
        told = fork(tmp_path, code=code)
        assert told.code == 0, told.said
        trail = [path.read_bytes() for path in sorted((tmp_path / f"{name}.trail").iterdir())]
        return [(tmp_path / f"{name}.safetensors").read_bytes(), *trail]

    return run


def test_two_processes_give_the_same_bytes(tuned_with):
    one, other = tuned_with("one", 1), tuned_with("other", 1)
    assert len(one) == 4
    assert one == other


def test_two_threads_give_the_same_bytes_each_time(tuned_with):
    # not those of one thread: torch splits sums among threads, and rounds otherwise
    assert tuned_with("one", 2) == tuned_with("other", 2)
