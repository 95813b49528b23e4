# SPDX-License-Identifier: MIT
"""Photos and category names in, named segmentation masks out. The commands are in `cli`; the kernels stand alone in
`namedmask_kernels`."""

from importlib.metadata import version

__version__ = version("namedmask")
