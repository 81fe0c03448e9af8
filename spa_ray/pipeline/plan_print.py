"""A plan, and a plan beside what happened, as tables on stdout. Never: arithmetic."""

from __future__ import annotations

from typing import Any

Plan = dict[str, Any]


def print_plan(plan: Plan) -> None:
    """What the run is, its arms, its stages with their total, then notes and assumptions, a line each."""
    from rich.console import Console

    console = Console()
    for table in (_about(plan), _arms(plan), _stages(plan)):
        _print_whole(console, table)
    for note in plan["notes"]:
        print(f"note: {note}")
    for line in plan["assumptions"]:
        print(f"assumed: {line}")


def _about(plan: Plan) -> Any:
    from rich.table import Table

    model, arms = plan["model"], _tuned(plan)
    first = arms[0]
    memory = first["memory_gib"]
    table = Table(show_header=False, title_justify="left", title=" → ".join(first["stages"]))
    guess = " (estimated)" if model["estimated"] else ""
    table.add_row("model", f"{model['path']}: {model['parameters'] / 1e6:,.1f} M parameters{guess}, {model['dtype']}")
    for source, prompts in {arm["prompts"]["source"]: arm["prompts"] for arm in arms}.items():
        counted = " (not counted)" if prompts["estimated"] else ""
        table.add_row("prompts", f"{source}: {prompts['count']:,}{counted}, about {prompts['tokens']:g} tokens each")
    asking = [arm for arm in arms if "generate" in arm["stages"]]
    for text in dict.fromkeys(_sampling(arm["sampling"]) for arm in asking):
        table.add_row("sampling", text)
    table.add_row("requests a prompt", f"{first['generate']['requests_per_prompt']:g}")
    where = f"a GPU of {memory['gpu']:g} GiB" if memory["gpu"] else "a process"
    table.add_row(f"memory of {where}, GiB", _memory(memory))
    table.add_row("training of a rank, GiB", _training(worst_training(plan)))
    if judge := plan["total"].get("judge"):
        table.add_row(
            "judge's endpoint",
            f"{judge['requests']:,} requests, {judge['prompt_tokens']:,} prompt and {judge['generated_tokens']:,} "
            f"generated tokens, {'no price' if judge['usd'] is None else '$' + format(judge['usd'], ',.2f')}; "
            f"{duration(judge['seconds'])} at its limits",
        )
    table.add_row("GPUs", f"{plan['gpus']['engines']:g} for engines, {plan['gpus']['train']:g} for training")
    output = plan["output_gib"]
    table.add_row("disk, GiB", f"{output['models']:g} of trained models, about {output['rest']:g} more")
    return table


def _sampling(sampling: Plan) -> str:
    """Every key that is set; `min_p 0` and the like leave the distribution as it is and are not."""
    neutral: Plan = {"min_p": 0, "top_k": None, "repetition_penalty": 1, "stop": []}
    shown = {key: value for key, value in sampling.items() if neutral.get(key, ()) != value}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _memory(memory: Plan) -> str:
    if memory["contexts"] is None:
        cache = "KV cache not known"
    else:
        cache = (
            f"KV cache {memory['kv_cache']:g} for {memory['contexts']:,} contexts of full length "
            f"({memory['kv_cache_per_context']:g} each), or the samples of {memory['prompts']:,} prompts"
        )
    return f"engine weights {memory['engine_weights']:g}, {cache}"


def _tuned(plan: Plan) -> list[Plan]:
    """The arms that are trained."""
    return [arm for arm in plan["arms"].values() if "merge" not in arm]


def worst_training(plan: Plan) -> Plan:
    """The training memory of the arm that needs most."""
    found: list[Plan] = [arm["memory_gib"]["training"] for arm in _tuned(plan)]
    return max(found, key=lambda training: training["total"])


def _training(found: Plan) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "buckets", "reserve")
    parts = [f"{name} {found[name]:.1f}" for name in names if found[name] >= 0.05]
    if found["offloaded"]:
        parts.append(f"on the host {found['offloaded']:.1f}")
    recomputed = " (with gradient checkpointing)" if found["checkpointing"] else ""
    total = f"{found['total']:.1f}"
    if found["gpu"]:
        total += f" of {found['gpu']:g}: {'fits' if found['total'] <= found['gpu'] else 'does not fit'}"
    return f"{total}{recomputed}; {', '.join(parts)}"


def _arms(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(
        "arm", "method", "β", "γ", "lr", "gap", "pairs", "steps", "movement", "iterations", title_justify="left"
    )
    for name, arm in plan["arms"].items():
        if "merge" in arm:
            table.add_row(name, f"merge of {', '.join(f'{n} {w:g}' for n, w in arm['merge']['of'].items())}")
            continue
        train = arm["train"]
        numbers = [f"{train[key]:g}" for key in ("beta", "gamma", "lr")]
        counts = [
            f"~{train['pairs_estimated']:,}",
            f"~{train['steps_estimated']:,}",
            f"{train['movement']:.1e}",
            str(arm["iterations"]),
        ]
        table.add_row(name, train["method"], *numbers, train["gap"], *counts)
    return table


def _stages(plan: Plan) -> Any:
    from rich.table import Table

    priced = plan["total"]["cost"] is not None
    table = Table("stage", "arms", title_justify="left")
    for heading in ("requests", "prompt tokens", "computed", "generated", "time", "GPU-hours", *(["cost"] * priced)):
        table.add_column(heading, justify="right")
    for stage in plan["stages"]:
        table.add_row(_name(stage), _some(stage["arms"]), *_numbers(stage, priced))
    table.add_section()
    table.add_row("total", "", *_numbers(plan["total"], priced))
    return table


def _numbers(found: Plan, priced: bool) -> list[str]:
    keys = ("requests", "prompt_tokens", "prefill_tokens", "generated_tokens")
    counts = [f"{found[key]:,}" if found[key] else "" for key in keys]
    cost = [f"{found['cost']:,.2f}"] if priced else []
    hours = f"{found['gpu_hours']:,.3f}" if found["gpu_hours"] else ""
    return [*counts, duration(found["seconds"]), hours, *cost]


def print_comparison(compared: Plan) -> None:
    """Planned and actual side by side, with actual / planned; a stage that has not run shows its plan alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "arms", "", title=compared["run_dir"], title_justify="left")
    for heading in ("requests", "prompt tokens", "generated", "time"):
        table.add_column(heading, justify="right")
    for stage in [*compared["stages"], {"stage": "total", "arms": [], "status": "", **compared["total"]}]:
        if stage["stage"] == "total":
            table.add_section()
        table.add_row(_name(stage), _some(stage["arms"]), stage["status"], *_ratios(stage))
    _print_whole(Console(), table)
    print("each cell: actual / planned (actual as a multiple of the plan); the total is over finished stages")
    for note in compared["notes"]:
        print(f"note: {note}")


def _ratios(stage: Plan) -> list[str]:
    cells = []
    for key in ("requests", "prompt_tokens", "generated_tokens", "seconds"):
        show = duration if key == "seconds" else lambda value: f"{value:,}"
        actual, planned, ratio = stage["actual"].get(key), stage["planned"][key] or 0, stage["ratio"].get(key)
        cell = f"{'–' if actual is None else show(actual)} / {show(planned)}" if actual or planned else ""
        cells.append(cell + (f" (×{ratio:.2f})" if ratio is not None else ""))
    return cells


def _name(stage: Plan) -> str:
    return f"{stage['stage']} {stage['iteration']}" if stage.get("iteration") else str(stage["stage"])


def _some(arms: list[str]) -> str:
    return ", ".join(arms) if len(arms) <= 3 else f"{', '.join(arms[:2])} and {len(arms) - 2} more"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _print_whole(console: Any, table: Any) -> None:
    """A file or a pipe has no width: nothing is cut to fit."""
    from rich.measure import Measurement

    if not console.is_terminal:
        console.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table)
