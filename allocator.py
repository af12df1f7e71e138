"""The environment that torch's CUDA allocator reads when torch is imported. Import this before torch."""

import os

# Micro-batches of many shapes fragment the memory otherwise: room that is free in pieces is refused as a whole.
EXPANDABLE_SEGMENTS = "expandable_segments:True"
# The first is today's name, the second the one that older programs and guides use.
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def describe() -> str:
    """What is in force, as it would be typed."""
    return ", ".join(f"{name}={os.environ[name]}" for name in NAMES if name in os.environ)


# What the user set stays.
if not any(name in os.environ for name in NAMES):
    os.environ[NAMES[0]] = EXPANDABLE_SEGMENTS
