"""Errors that end a job: not enough memory, a disk."""

import contextlib
import errno
import os

import jax
import jax.numpy as jnp
import pytest

from lit_jax.runtime import cluster, exit_status


def allocate_too_much():
    """More than any address space has: a real error of XLA."""
    jax.block_until_ready(jax.jit(lambda: jnp.zeros((2**50,), jnp.uint8))())


def raiser(text):
    def fail():
        raise jax.errors.JaxRuntimeError(text)

    return fail


@pytest.mark.parametrize(
    "fail, amount",
    [
        (allocate_too_much, "1048576.00 GiB (1125899906842624 bytes) cannot be allocated"),
        (
            raiser("INTERNAL: Error dispatching: Out of memory allocating 6442453764 bytes."),
            "6.00 GiB (6442453764 bytes) cannot be allocated",
        ),
        (
            raiser("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.30GiB."),
            "12.30 GiB cannot be allocated",
        ),
        (
            raiser("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G\nA"),
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 15G",
        ),
    ],
)
def test_too_little_memory_is_said_in_one_line_with_what_needs_less(fail, amount):
    with pytest.raises(ValueError) as end, exit_status.shared_fate(1.0, "a smaller x needs less"):
        fail()
    assert str(end.value) == f"out of memory: {amount}; a smaller x needs less"


def test_another_error_of_xla_is_not_taken_for_one_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError), exit_status.shared_fate(1.0, "advice"):
        raiser("INTERNAL: the chip")()


def test_a_backend_that_is_not_there_is_said_in_one_line(monkeypatch):
    def devices():
        raise AssertionError  # what JAX 0.10 raises for JAX_PLATFORMS=cuda without that plugin

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match="gives no device: .* set JAX_PLATFORMS=cpu"):
        cluster.check_backend()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("number, worth", [(errno.EIO, True), (errno.ENOSPC, True), (1, False)])
def test_a_disk_that_fails_before_the_first_step_is_worth_another_try(
    monkeypatch, capsys, tmp_path, inside, number, worth
):
    """Another error of a file is bad input, for which the program ends with status 1."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit if worth else ValueError) as end, contextlib.ExitStack() as stack:
        stack.enter_context(exit_status.shared_fate(1.0))
        if inside:
            stack.enter_context(exit_status.Crashes(tmp_path / "crashes", 0))
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("teacher.pt cannot be read") from error
    if worth:
        assert end.value.code == exit_status.EXIT_CRASHED
        assert "teacher.pt cannot be read; run the same command" in capsys.readouterr().err
