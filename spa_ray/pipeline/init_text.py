"""The text of a config that `spa init` writes: each value beside the reason for it. Pure: values in, YAML out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spa_ray.config.models import Resources
from spa_ray.config.training import Train
from spa_ray.training.guards import KNOWN_AT, LORA
from spa_ray.training.method import method_of

BFLOAT16 = 3.0  # times the known learning rates; five times would draw a plan's warning
SMALL = 3e9  # parameters below which sampling is kept closer to what the model finds likely


@dataclass(frozen=True)
class Scale:
    """How answers are scored: the mode, the scale's upper end, and why."""

    mode: str
    high: int
    why: str


@dataclass(frozen=True)
class Choices:
    """What the text says."""

    model: str
    source: str
    prompts: int
    estimated: bool
    parameters: float
    dtype: str
    thinking: str | None  # the template's variable that turns it off
    context: int
    tensor_parallel_size: int
    scale: Scale
    max_tokens: int
    train: Train
    resources: Resources
    gpus: int
    memory_gib: float  # of a GPU, or of this machine
    needs_gib: float  # of one rank
    notes: list[str]


def render(c: Choices) -> str:
    """The YAML text."""
    head = [
        f"# {size(c.parameters)} parameters, {'about ' if c.estimated else ''}{c.prompts:,} prompts, "
        + (f"{c.gpus} GPUs of {c.memory_gib:.0f} GiB." if c.gpus else f"no GPU, {c.memory_gib:.0f} GiB of memory."),
        "# Written by `spa init`. Every key is explained in docs/CONFIG.md; what is not here keeps its default.",
        *(f"# Note: {comment(note)}" for note in c.notes),
        "objectives: [harmless, helpful]   # highest priority first, two or more; your own: constitution: my.yaml",
    ]
    sections = (head, _model(c), _prompts(c), _sampling(c), _scoring(c), _pairs(c), _train(c), _evaluation(c), _res(c))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def size(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def comment(text: str) -> str:
    """A text that stays in its comment."""
    return " ".join(text.split())


def quoted(value: str) -> str:
    """A string as YAML reads it back, whatever is in it."""
    return json.dumps(value)


def line(key: str, value: Any, why: str) -> str:
    """One key of a section, with its reason."""
    return f"{f'  {key}: {value}':<29} # {why}"


def _model(c: Choices) -> list[str]:
    if c.gpus:
        why = "these GPUs compute in it"
        why = why if c.dtype == "bfloat16" else "these GPUs have no bfloat16"
    else:
        why = "without AMX or AVX512-BF16 a processor is slower in bfloat16"
        why = why if c.dtype == "float32" else "the model's own type; this processor computes in bfloat16"
    ranks = [line("tensor_parallel_size", c.tensor_parallel_size, "GPUs that hold one engine's weights together")]
    off = f"{{{c.thinking}: false}}"
    thinking = line("chat_template_kwargs", off, "thinking counts against max_tokens: with true they have to be larger")
    return [
        "model:",
        f"  path: {quoted(c.model)}",
        line("dtype", c.dtype, why),
        line("max_model_len", c.context, "context in tokens: the model's own, at most 8,192; more takes more memory"),
        *([thinking] if c.thinking else []),
        *(ranks if c.tensor_parallel_size > 1 else []),
    ]


def _prompts(c: Choices) -> list[str]:
    return [
        "prompts:",
        f"  source: {quoted(c.source)}",
        "  # limit: 400              # the paper trains on 300 to 400 prompts",
    ]


def _sampling(c: Choices) -> list[str]:
    tokens = line(
        "max_tokens", c.max_tokens, "a refinement reads all candidates, so that eight answers fit the context"
    )
    if c.parameters < SMALL:
        decoding = [
            line("temperature", "1.0", "at 1.2 and top_p 1 a small model writes word salad after twenty tokens"),
            line("min_p", "0.1", "keeps sampling coherent; its authors take 0.05 to 0.1 (arXiv:2407.01082)"),
            line("repetition_penalty", "1.1", "small models repeat themselves; CTRL takes 1.2 (arXiv:1909.05858)"),
        ]
        refine = f"refine: {{temperature: 0.7, min_p: 0.1, max_tokens: {c.max_tokens}}}"
    else:
        decoding = [
            line("temperature", "1.2", "the paper says «high-temperature» and no number"),
            line("min_p", "0.1", "leaves out the unlikely tail; its authors take 0.05 to 0.1 (arXiv:2407.01082)"),
        ]
        refine = f"refine: {{temperature: 0.7, max_tokens: {c.max_tokens}}}"
    n = line("n", 5, "candidates per prompt; at least objectives + 1")
    return ["sampling:", n, *decoding, tokens, refine + "   # one careful answer, near the model's own distribution"]


def _scoring(c: Choices) -> list[str]:
    extra = [line("max_tokens", 64, "of one judgement in free text")] if c.scale.mode == "regex" else []
    weak = c.parameters < SMALL
    return [
        "scoring:",
        line("mode", c.scale.mode, c.scale.why),
        line("scale", f"[1, {c.scale.high}]", "worst and best"),
        *extra,
        "",
        "denoise:                      # `spa preview` prints how many pairs these filters would leave",
        line("consistency", "primary_ge", "strict keeps almost nothing where a judge likes one rating"),
        line("informativeness", "false", "a small judge's scores lie close together: a filter on spread keeps noise")
        if weak
        else line("informativeness", "true", "the paper's; false where preview says that too few prompts are left"),
    ]


def _pairs(c: Choices) -> list[str]:
    return [
        "pairs:",
        line("delta", "auto", "half a standard deviation of this judge's own scores, instead of a fixed 2"),
        line("truncated", "reject", "answers cut by max_tokens are never chosen; allow where most are cut"),
    ]


def learning_rate(train: Train, parameters: float) -> tuple[str, str]:
    """The upper end of what `training.guards` knows to work, for this size and way of training, to one digit.

    In bfloat16 three times that: over the hundred steps of a few hundred prompts 1e-6 is lost in rounding.
    """
    raised = BFLOAT16 if train.dtype == "bfloat16" else 1.0
    known = method_of(train).known_lr
    assert known is not None
    times = raised * (1.0 if train.lora is None else LORA[0])
    rate = times * known[1] * (KNOWN_AT / parameters) ** 0.5
    why = "SimPO's 1e-6 for 8 B models, scaled by one over the root of the size"
    why += "; three times that, since a few steps at it are lost in bfloat16's rounding" if raised > 1 else ""
    return f"{rate:.0e}".replace("e", ".0e"), why + ("" if train.lora is None else "; adapters take ten times that")


def _train(c: Choices) -> list[str]:
    train, has = c.train, "GPU's" if c.gpus else "machine's"
    fits = f"needs about {c.needs_gib:.1f} of a {has} {c.memory_gib:.0f} GiB"
    rate, why = learning_rate(train, c.parameters)
    lines = ["train:", line("method", train.method, "the default"), line("dtype", train.dtype, "of the forward pass")]
    if train.lora is None:
        lines.append(line("lora", "null", f"every weight is trained: {fits}"))
    elif train.lora.quantize is None:
        lines.append(line("lora", "{r: 16, alpha: 32}", f"training every weight does not fit; this {fits}"))
    else:
        lines.append(line("lora", "{r: 16, alpha: 32, quantize: nf4}", f"4-bit weights: else it does not fit; {fits}"))
    lines += [
        line("lr", rate, why),
        line("batch_size", train.batch_size, "pairs in an optimizer step, over all ranks"),
        line("epochs", f"{train.epochs:g}", "times over the pairs; more steps move weights further"),
        line("max_length", train.max_length, "prompt + answer in tokens; longer pairs are dropped and counted"),
        line("zero_stage", train.zero_stage, "DeepSpeed; 3 shares the weights among ranks as well"),
    ]
    if train.micro_batch_tokens is not None:
        lines.append(line("micro_batch_tokens", train.micro_batch_tokens, "at once; less takes less memory"))
    if train.gradient_checkpointing is not None:
        lines.append(line("gradient_checkpointing", "true", "activations are computed twice, so that a step fits"))
    return lines


def _evaluation(c: Choices) -> list[str]:
    return [
        "# Held-out prompts measure the trained model against the base model. They must not be among those above:",
        "# put some into a file of their own (100 or more give useful intervals) and remove the # of these lines.",
        "# evaluation:",
        '#   prompts: {source: "held_out.jsonl"}',
        "#   judge: base             # better: another, stronger model's folder",
        f"#   sampling: {{temperature: 0.0, max_tokens: {c.max_tokens}}}",
    ]


def _res(c: Choices) -> list[str]:
    r = c.resources
    if not c.gpus:
        return [
            "resources:",
            line("gpus_per_engine", 0, "no GPU was found on this machine"),
            line("gpus_per_worker", 0, "the same for training"),
            line("concurrency", r.concurrency, "prompts in flight: a processor gains nothing from more"),
        ]
    return [
        "resources:",
        line("engines", f"{{min: {r.engines.min}, max: {r.engines.max}}}", f"all {c.gpus} GPUs while generating"),
        line("gpus_per_engine", f"{r.gpus_per_engine or 0:g}", "model.tensor_parallel_size"),
        line("train_workers", r.train_workers, "one rank per GPU"),
        line("gpus_per_worker", 1, "after generation has given the GPUs back"),
        line("gpu_memory_gib", r.gpu_memory_gib, "of the smallest GPU here, for spa plan"),
    ]
