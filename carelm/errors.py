"""What a user can mend, as the one line that says so. Imports nothing."""


class UserError(Exception):
    """What a user can mend: one line that names the key, file or row and the fix."""

    exit_status = 2  # of the launched file
    label = "error"
