import pytest

from tnl.kernels import dispatch


def test_auto_and_reference_give_the_five_ops() -> None:
    assert dispatch.ops("reference").backend == "reference"
    assert all(callable(op) for op in dispatch.ops("auto")[1:])


def test_a_name_that_is_no_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match='no backend is called "cuda"'):
        dispatch.ops("cuda")
