"""Python's collector of garbage rests while a command imports. Import this before torch; `wake` ends it.

The modules make a million objects that stay, and looking through them again and again takes a sixth of the time.
"""

import gc

gc.disable()


def wake() -> None:
    """All imports are done: what they have made is never looked through again, also not by forked processes."""
    gc.freeze()
    gc.enable()
