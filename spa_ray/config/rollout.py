"""The sections of one prompt's episode: how answers are sampled, scored and refined."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from spa_ray.config.judge import JudgeKinds, judge_section
from spa_ray.config.section import JudgeSection, Section

# What renders a conversation, and is no variable of a chat template's.
RENDERER_ARGUMENTS = frozenset(
    {"messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "strftime_now", "raise_exception"}
)


def _template_variables(given: Any) -> Any:
    """Raises: ValueError for a name that belongs to the renderer."""
    for name in sorted(RENDERER_ARGUMENTS & set(given)) if isinstance(given, dict) else ():
        instead = "; give model.date" if name == "strftime_now" else ""
        raise ValueError(f"{name} is set by the renderer, not by a config{instead}")
    return given


TemplateKwargs = Annotated[dict[str, Any], BeforeValidator(_template_variables)]


DEFAULT_SYSTEM_PROMPTS: tuple[str | None, ...] = (
    None,
    "You are a careful assistant. Think about who could be hurt before you answer, then help as far as that allows.",
    "You are a practical assistant. Give concrete, correct steps that the person can act on.",
    "You are a candid assistant. Say plainly what you do not know and what should not be done.",
    "You are a warm assistant. Acknowledge the person, then answer the need behind the question.",
)


MAX_TEMPERATURE = 2.0  # vLLM and the OpenAI protocol refuse more


class Decoding(Section):
    """How one kind of answer is sampled. The defaults leave the model's distribution as it is."""

    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of tokens with this probability; 1: all")
    min_p: float = Field(0.0, ge=0, le=1, description="least probability, as a share of the best token's; 0: none")
    top_k: int | None = Field(None, ge=1, description="the k most probable tokens; null: all")
    repetition_penalty: float = Field(
        1.0, gt=0, description="divides the score of tokens of the prompt and the answer so far; 1: none"
    )
    max_tokens: int = Field(1024, ge=1, description="of one answer")
    stop: tuple[str, ...] = Field(
        (), description="strings that end an answer; the answer ends before them, and no end token is added"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_or_many(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if "" in given:
            raise ValueError("stop holds an empty text, which would end every answer at once; remove it")
        return given


class EvalSampling(Decoding):
    """How held-out prompts are answered."""

    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")


class Sampling(Decoding):
    """Diverse sampling of n candidates a prompt (SPA, step 1)."""

    n: int = Field(5, ge=1, description="candidates a prompt; at least objectives + 1")
    temperature: float = Field(1.2, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    system_prompts: tuple[str | None, ...] = Field(
        DEFAULT_SYSTEM_PROMPTS,
        min_length=1,
        description="candidate i is sampled under entry i modulo the length; [] is [null]",
    )
    resample_duplicates: bool = Field(True, description="sample an exact repetition of a candidate once more")

    @field_validator("system_prompts", mode="before")
    @classmethod
    def _none_is_a_choice(cls, given: Any) -> Any:
        return (None,) if given is None or given in ([], ()) else given


class Compare(Section):
    """Two answers to one prompt compared."""

    mode: Literal["regex", "choice"] = Field(
        "regex", description="a model's verdict: [[A]], [[B]] or [[C]] after its reasons; or constrained to one letter"
    )
    temperature: float = Field(0.0, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    retries: int = Field(2, ge=0, description="further tries after a verdict that cannot be read")
    max_tokens: int = Field(1024, ge=1, description="of one verdict with its reasons")
    prompt: str | None = Field(
        None,
        description="Jinja2 with `answer_a`, `answer_b` and `scoring.prompt`'s other variables but `scale`; null: the"
        " built-in one of the mode",
    )


class Scoring(Section):
    """Self-scoring: one call a response and objective (SPA, step 2)."""

    scale: tuple[int, int] = Field((1, 10), description="worst and best whole number")
    mode: Literal["choice", "regex", "expected"] = Field(
        "choice",
        description="constrained to the scale; free text read by `pattern`; mean over the labels' probabilities",
    )
    draws: int = Field(1, ge=1, description="scores drawn per response and objective; the score is their mean")
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE, description="scores are drawn, not read at the mode")
    retries: int = Field(2, ge=0, description="further tries after a judgement that cannot be read")
    max_tokens: int = Field(8, ge=1, description="of one judgement")
    layout: Literal["objective_first", "answer_first"] = Field(
        "objective_first",
        description="of the built-in prompt: requests share what comes first, and it is computed once; `spa plan` says "
        "where the other one computes less",
    )
    prompt: str | None = Field(None, description="Jinja2; null takes the built-in one of the mode and layout")
    system: str | None = None
    pattern: str = Field(r"\[\[(\d+)\]\]", description="mode regex: its first group is the score")
    chat_template_kwargs: TemplateKwargs | None = Field(None, description="of the judge's prompts; null: the model's")
    judge: str | JudgeKinds | None = Field(
        None, description="null: the policy itself; else `module:judge` or a section"
    )
    compare: Compare | None = Field(
        None,
        description="null: answers are scored one by one; else every two candidates are compared in both orders, and"
        " scores say how many others an answer beats",
    )

    @field_validator("scale")
    @classmethod
    def _ascending(cls, scale: tuple[int, int]) -> tuple[int, int]:
        if scale[0] >= scale[1]:
            raise ValueError(f"scale must ascend, got {list(scale)}; write for example [1, 10]")
        return scale

    @model_validator(mode="after")
    def _fits_its_judge(self) -> Scoring:
        judge = self.judged_by
        if judge.own_pass:
            raise ValueError(
                f"judge: {self.judge!r} would take the policy's place; serve it as an endpoint, or give module:judge"
            )
        if judge.only_mode not in (None, self.mode):
            raise ValueError(
                f"a judge of kind {judge.kind} is asked in mode {judge.only_mode}, not {self.mode}; set "
                f"scoring.mode={judge.only_mode}"
            )
        if self.compare is not None and judge.only_mode not in (None, self.compare.mode):
            raise ValueError(f"compare.mode: a judge of kind {judge.kind} is asked in mode {judge.only_mode}")
        return self

    @property
    def judged_by(self) -> JudgeSection:
        return judge_section(self.judge)

    @property
    def ranges(self) -> tuple[int, int] | None:
        """The lowest and the highest score that the judge can give; None where it is not known."""
        return self.scale if self.judged_by.on_scale else None

    @property
    def repeated(self) -> bool:
        """Whether a score is the mean of several draws, which have a variance."""
        return self.draws > 1 and self.compare is None and self.mode != "expected" and self.judged_by.reads_prompts


class Refine(Decoding):
    """One improved answer a prompt, written over all scored candidates (SPA, step 2)."""

    temperature: float = Field(0.7, ge=0, le=MAX_TEMPERATURE, description="0 takes the most probable token")
    attempts: int = Field(
        1,
        ge=1,
        description="answers written one after the other until one is scored above every candidate on every objective;"
        " without one the highest in priority order stays (not in the paper: docs/THEORY.md, 9)",
    )
    prompt: str | None = Field(None, description="Jinja2; null takes the built-in one")
    system: str | None = None
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="of the refinement's prompt; null: the model's"
    )
