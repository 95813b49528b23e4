# SPDX-License-Identifier: MIT
"""The one exception that the commands show as a single line."""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do."""
