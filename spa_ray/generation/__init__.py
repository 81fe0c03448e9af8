"""Generation: one prompt's episode as a plain coroutine, and the Ray Data stage that runs many.

Never: losses, pairs. Importing this package imports nothing heavy.
"""

# Raise it when the same config and inputs would give other episodes than before.
STAGE_VERSION = 3
