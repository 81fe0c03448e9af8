"""Before and after: held-out prompts answered by two models, shown by a rule and not by hand, failures among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spa_ray.logs import printable
from spa_ray.report.run_data import VANILLA, Answer, Asked, RunData

RULE = (
    "Examples are chosen by rule: of the prompts that both models answered, the largest gain, the median change and "
    "the largest loss, by the first objective's score, equal ones by the next."
)
Change = tuple[float, ...]


@dataclass(frozen=True)
class Example:
    shown_as: str
    asked: Asked
    before: Answer
    after: Answer

    @property
    def change(self) -> Change:
        """Of each objective's score, after minus before."""
        return change(self.before, self.after) or ()


def change(before: Answer, after: Answer) -> Change | None:
    """Of each objective's score, after minus before; None where a score is missing."""
    both = list(zip(before.scores, after.scores, strict=True))
    changes = tuple(b - a for a, b in both if a is not None and b is not None)
    return changes if len(changes) == len(both) else None


def choose(asked: Sequence[Asked], *, arm: str, baseline: str = VANILLA) -> list[Example]:
    """The largest gain, the median change (of an even number the upper one) and the largest loss, each prompt once.

    Where nothing was gained or lost it is the best or the worst change. Of equal changes the first prompt is shown.
    Empty where no prompt was scored for both models.
    """
    found: list[tuple[Change, Asked]] = []
    for prompt in asked:
        if arm in prompt.answers and baseline in prompt.answers:
            changed = change(prompt.answers[baseline], prompt.answers[arm])
            if changed is not None:
                found.append((changed, prompt))
    if not found:
        return []
    found.sort(key=lambda pair: pair[0])
    nothing = tuple(0.0 for _ in found[0][0])
    worst, best = found[0], next(pair for pair in found if pair[0] == found[-1][0])
    named = {
        "largest gain" if best[0] > nothing else "best change": best,
        "median change": found[len(found) // 2],
        "largest loss" if worst[0] < nothing else "worst change": worst,
    }
    once: dict[str, Example] = {}
    for name, (_, prompt) in named.items():
        once.setdefault(prompt.prompt_id, Example(name, prompt, prompt.answers[baseline], prompt.answers[arm]))
    return list(once.values())


def of_run(run: RunData) -> list[Example]:
    """The examples of a run's main arm, from its first family of held-out prompts."""
    if run.main_arm is None:
        return []
    family = next(iter(run.metrics))
    return choose([asked for asked in run.asked if asked.family == family], arm=run.main_arm, baseline=run.baseline)


def print_examples(examples: Sequence[Example]) -> None:
    if examples:
        print(f"\n{RULE}")
    for example in examples:
        changed = "/".join(f"{c:+.3g}" for c in example.change)
        said = example.asked.messages[-1]["content"] if example.asked.messages else example.asked.prompt_id
        category = f"{example.asked.category}: " if example.asked.category else ""
        print(printable(f"\n[{category}{example.shown_as}, {changed}] {said}"))
        print(printable(f"  before {marks(example.before)}: {example.before.text}"))
        print(printable(f"  after  {marks(example.after)}: {example.after.text}"))
    if examples:
        print()


def marks(answer: Answer) -> str:
    """`8/3`, with a dash where a judgement failed; three digits of a score."""
    return "/".join("–" if score is None else f"{score:.3g}" for score in answer.scores)
