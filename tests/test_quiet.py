"""Of noise that a user can do nothing about exactly the known lines are silenced."""

import logging

import pytest

from carelm import quiet

LOGGER = "bitsandbytes.backends.cpu.ops"


@pytest.fixture
def logger():
    found = {name: logging.getLogger(name) for name in quiet.LOG_LINES}
    before = {name: found[name].filters[:] for name in found}
    yield found[LOGGER]
    for name in found:
        found[name].filters[:] = before[name]


def test_a_kernel_that_is_not_called_is_not_missed_and_another_line_of_its_logger_is_shown(logger, caplog):
    quiet.silence(has_gpu=True, is_first_rank=True)
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please install it", "no kernels")
    logger.warning("Failed to load CPU gemm_8bit: %s", "something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load CPU gemm_8bit: something else"]
