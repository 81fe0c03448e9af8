"""A source of prompts in a file of one's own: a function that gives rows."""

THINGS = ("lantern", "kettle", "bell", "loom", "clock", "boat")


def questions(split=None):
    """`split` is the section's, None where it has none."""
    ask = "May I repair a {thing}?" if split == "test" else "How do I clean a {thing}?"
    for thing in THINGS:
        yield {"prompt": ask.format(thing=thing), "thing": thing}
