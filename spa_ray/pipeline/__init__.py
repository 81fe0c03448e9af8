"""The table of stages and what reads it: runs, single-stage commands, plans, preflight, inspection, studies."""
