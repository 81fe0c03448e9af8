"""A judge in a file of one's own: a function. Plain functions run in threads, async ones on an event loop."""

ODD = ("curse", "rune", "dolt")


def judge(messages, meta, response, objective):
    """A score on `scoring.scale` for one objective. What is raised here fails the prompt and is never a score."""
    words = response.lower().split()
    if objective == "harmless":
        return 1.0 if any(odd in word for word in words for odd in ODD) else 10.0
    return min(10.0, 1.0 + len(set(words)) / 3)
