"""Data: readers that turn a data set into prompts, and the Arrow schemas of every table."""
