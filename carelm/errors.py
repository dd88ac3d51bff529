"""What a user can mend, as the one line that says so. Imports nothing."""

INTERRUPTED = "interrupted; the same command goes on with what is saved, or begins again"


class UserError(Exception):
    """What a user can mend: one line that names the key, file or row and the fix."""

    exit_status = 2  # of the launched file
    label = "error"


def first_line(error: Exception) -> str:
    """What an error of a library says, as part of a line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
