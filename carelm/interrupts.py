"""Ctrl-C while a launched file still imports is one line too: to be imported by it before anything that takes time.

From `ranks.run_main` on it raises KeyboardInterrupt as ever, so that what is under way is cleaned up.
"""

import os
import signal

from carelm.errors import INTERRUPTED, UserError


def _end(number, frame) -> None:
    if os.environ.get("RANK", "0") in ("", "0"):
        os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(UserError.exit_status)  # an exception in the midst of an import becomes whatever that library makes of it


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
    signal.signal(signal.SIGINT, _end)
