"""Reasons to trust the package: a model, faults, a long run, hostile input. ``docs/tested.rst`` tells what came out."""
