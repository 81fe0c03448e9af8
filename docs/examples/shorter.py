from spa_ray import PairwiseJudge, Verdict


class Shorter(PairwiseJudge):
    class Config(PairwiseJudge.Config):
        slack: int = 0

    async def compare(self, item, a, b):
        """`a` is shown first. Give "a", "b" or "tie", or a `Verdict` that keeps your words."""
        lengths = len(a.split()), len(b.split())
        if abs(lengths[0] - lengths[1]) <= self.config.slack:
            return "tie"
        return Verdict("a" if lengths[0] < lengths[1] else "b", text=f"{lengths[0]} words and {lengths[1]}")
