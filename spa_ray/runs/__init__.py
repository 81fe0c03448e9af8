"""Runs: the run folder with its content-addressed stages, the manifest, the pipeline that ties the rooms together."""
