# SPDX-License-Identifier: MIT
"""The exception that the commands print as a single line."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# In the messages of torch's allocators and of tensors too large to address.
_NO_MEMORY = ("can't allocate memory", "out of memory", "size calculation overflowed", "multiplication overflow")


def explained(error: Exception) -> Exception:
    """The exception itself, or a UserError with the remedy if memory ran out."""
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    ):
        return error
    return UserError(
        f"out of memory ({first_line(error)}); lower --image-size, --crop-size, --batch-size or --workers (see "
        "Troubleshooting in the documentation)"
    )
