"""A process that may be killed, or run beside another one, is a fork: it imports nothing again, which takes seconds."""
import multiprocessing
import os

import pytest

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")


def start(target, *arguments):
    "Call `target` in a fork of this process."
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def ended(process, seconds=120):
    "Its exit code, -9 if it was killed; None if it is still running after `seconds`, which ends it."
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code
