"""Paths on disks and object stores, model folders, run folders, their hashes and locks."""
