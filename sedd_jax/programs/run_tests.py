"""A driver of the sandbox: runs a program, then its tests in the same names. Its source alone is sent there.

Tests of HumanEval+ can be megabytes of Python. The first run compiles them and tells the code, which later runs get.
"""

import marshal
import struct
import time
from collections.abc import Callable
from typing import Any

SECONDS = struct.Struct("<d")  # of the program and its tests, told by the first run


def drive(program: Callable[[], dict[str, Any]], given: bytes, tell: Callable[[bytes], None]) -> None:
    """Passes where program and tests raise nothing.

    Args:
        program: runs the program and returns its names.
        given: s and the source of the tests, or c and what the first run told after its seconds.
        tell: sends that a part has ended, and from the first run then its seconds and the compiled tests.
    """
    is_first = given[:1] == b"s"
    tests = compile(given[1:], "tests", "exec") if is_first else marshal.loads(given[1:])
    tell(b".")
    start = time.perf_counter()
    exec(tests, program())
    seconds = time.perf_counter() - start
    tell(b".")
    if is_first:
        tell(SECONDS.pack(seconds) + marshal.dumps(tests))
