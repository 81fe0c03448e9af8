"""Judges, metrics and tables of held-out answers. Never: training."""
