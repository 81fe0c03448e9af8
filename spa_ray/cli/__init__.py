"""The commands. Thin: each reads its input, calls one function of `runs`, prints."""
