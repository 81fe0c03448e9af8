"""Judges, metrics and tables of held-out answers. Never: training."""

# Raise it when the same config and inputs would give another output than before.
STAGE_VERSION = 2
