"""`use_backend` and `backends`: what is asked for holds at once, for as long as it was asked, and for nobody else."""

from __future__ import annotations

import gc
import threading

import pytest

from sdmp_kernels import _backends, backends, use_backend


@pytest.fixture(autouse=True)
def nothing_is_left_set():
    assert chosen() == AUTOMATIC
    yield
    use_backend(None)
    gc.collect()
    assert chosen() == AUTOMATIC


def chosen(op="info_nce"):
    return backends()[op]["cpu"].split(" ")[0]


AUTOMATIC = "torch" if _backends.unavailable("cpp", "cpu") else "cpp"


def test_a_statement_acts_at_once_and_lasts():
    use_backend("reference")
    assert chosen() == "reference"
    use_backend("torch", "mix")
    assert (chosen(), chosen("mix")) == ("reference", "torch")
    with use_backend("torch"):
        assert chosen() == "torch"
    assert (chosen(), chosen("mix")) == ("reference", "torch")
    use_backend(None, "info_nce")
    assert (chosen(), chosen("distillation")) == (AUTOMATIC, "reference")


def test_a_block_takes_back_what_it_set():
    with use_backend("reference"):
        with use_backend("torch", "info_nce"):
            assert (chosen(), chosen("mix")) == ("torch", "reference")
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == AUTOMATIC
        with pytest.raises(ZeroDivisionError), use_backend("torch"):
            raise ZeroDivisionError
        assert chosen() == "reference"
    assert chosen() == AUTOMATIC


def test_a_block_may_be_entered_again():
    block = use_backend("reference")
    for _ in range(2):
        with block:
            assert chosen() == "reference"
        assert chosen() == AUTOMATIC


def test_a_decorator_holds_while_the_function_runs():
    @use_backend("reference", "info_nce")
    def run(word: str) -> str:
        return word + chosen()

    assert chosen() == AUTOMATIC
    assert run("by ") == "by reference"
    assert chosen() == AUTOMATIC


def test_blocks_that_overlap_leave_nothing_set():
    """First in, first out, as threads may: neither the last to end nor the first decides what stays."""
    first = use_backend("reference")
    second = use_backend("torch", "info_nce")
    assert (chosen(), chosen("mix")) == ("torch", "reference")
    first.__exit__()
    assert (chosen(), chosen("mix").split()[0]) == ("torch", backends()["mix"]["cpu"].split()[0])
    second.__exit__()
    assert _backends._forced == {}


def test_threads_leave_nothing_set():
    def work(name: str) -> None:
        for _ in range(300):
            with use_backend(name):
                pass

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "torch", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _backends._forced == {}


def test_statements_do_not_pile_up():
    for _ in range(50):
        use_backend("reference")
        use_backend("torch", "mix")
    assert len(_backends._choices) <= 4


@pytest.mark.parametrize(
    ("name", "ops", "error", "message"),
    [
        ("refrence", None, ValueError, "did you mean 'reference'"),
        ("reference", "mixx", ValueError, "did you mean 'mix'"),
        ("cuda", "info_nce", RuntimeError, "none of info_nce has a cuda backend"),
    ],
)
def test_what_cannot_run_raises_at_once_and_sets_nothing(name, ops, error, message):
    with pytest.raises(error, match=message):
        use_backend(name, ops)
    assert _backends._forced == {}


def test_an_op_without_the_backend_raises_when_it_is_called():
    if _backends.unavailable("cpp", "cpu"):
        pytest.skip("no compiled kernels here")
    with use_backend("cpp"):
        assert chosen("distillation") == "none"
