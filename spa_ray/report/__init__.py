"""The report of a run: one HTML page, its Markdown, and every held-out answer as JSON lines.

Reads what a run folder holds and nothing else, finished or not.
"""
