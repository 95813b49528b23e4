# SPDX-License-Identifier: MIT
"""Photos and category names in, named segmentation masks out. The commands are in `cli`; the kernels stand alone in
`namedmask_kernels`."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # as slow as the start of Python itself

    return version("namedmask")
