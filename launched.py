"""End with the launcher, from the first moment: it does not pass SIGTERM on (trap 26). Import this before torch."""

import os
import signal

from stopping import end_with_parent

# Set by `accelerate launch`. What follows takes seconds, in which a launcher may be stopped like at any other time.
IS_LAUNCHED = "ACCELERATE_MIXED_PRECISION" in os.environ

if IS_LAUNCHED:
    end_with_parent(signal.SIGTERM)
