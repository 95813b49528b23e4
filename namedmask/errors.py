# SPDX-License-Identifier: MIT
"""The exception that the commands print as a single line."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""
