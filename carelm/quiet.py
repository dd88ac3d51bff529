"""Warnings that a user can do nothing about, each with the address of its cause."""

import logging
import warnings

MESSAGES: dict[str, str] = {
    # message (a regular expression, matched at its start): where it is from
}


def silence() -> None:
    """Silences them in this process; everything else is shown."""
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
