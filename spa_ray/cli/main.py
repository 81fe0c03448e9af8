"""`spa`: the command line (DESIGN, «Command line»).

Every command takes `key=value` overrides and `--json` (one JSON object as stdout's last line). Exit status: 0 done,
2 the input or the config is wrong, 1 the run failed; both say so in one line. Nothing heavy is imported before a
command runs, so that `spa --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_ray.cli.guard import guarded
from spa_ray.cli.options import (
    AsJson,
    ConfigFile,
    ConfigOption,
    Model,
    Out,
    Overrides,
    Pairs,
    Run,
    Steered,
    Verbose,
    emit,
    steering,
)
from spa_ray.cli.report import last_report, report
from spa_ray.cli.sense import sense
from spa_ray.cli.studies import reproduce
from spa_ray.errors import InputError
from spa_ray.storage.files import as_path, local_path, out_path

if TYPE_CHECKING:
    from spa_ray.config.load import Override

app = typer.Typer(
    help="Self-priority alignment on Ray: a model makes itself trustworthy first, then helpful, without a label.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console script: turns our errors into one line and an exit status."""
    guarded(lambda: app(standalone_mode=False, prog_name="spa"))


@app.command()
def demo(
    overrides: Overrides = None,
    full: Annotated[
        bool, typer.Option("--full", help="every ablation, iteration, family and control (≤ 45 minutes a seed)")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="repeat over this many seeds")] = 1,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The whole loop on the embedded model, on this machine's CPU, measured by an oracle that training never sees."""
    from spa_ray.cli.demo import run_demo

    emit(run_demo(overrides or [], full=full, seeds=seeds, verbose=verbose), as_json)


app.command()(reproduce)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    until: Annotated[str, typer.Option(help="stop after this stage: generate, build, train or evaluate")] = "evaluate",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The whole pipeline; run it again to resume."""
    from spa_ray.config import load_config
    from spa_ray.pipeline.commands import run_config

    result = run_config(load_config(config, overrides or []), until=until, verbose=verbose)
    emit({**result, "report": last_report(result["run_dir"])}, as_json)


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, help="how many prompts")] = 16,
    every: Annotated[
        bool, typer.Option("--all", help="print the calls of every prompt, not of the first alone")
    ] = False,
    out: Annotated[
        Any,
        typer.Option(parser=out_path, metavar="PATH", help="folder for signal.json and all calls", show_default=False),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """A few prompts with every rendered prompt and judge answer, and the health of the judge's signal."""
    from spa_ray.config import load_config
    from spa_ray.pipeline.preview import preview_prompts

    arms = load_config(config, overrides or [])
    arm = next(iter(arms.values()))
    emit(preview_prompts(arm, verbose=verbose, count=prompts, every=every, out=out, arms=arms), as_json)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML config", show_default=False)] = None,
    overrides: Overrides = None,
    compare: Annotated[
        Any, typer.Option(parser=as_path, metavar="RUN", help="a run's plan beside what it did", show_default=False)
    ] = None,
    price: Annotated[float | None, typer.Option(help="of a GPU-hour", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """What would happen: stages, requests, tokens, memory, time, GPU-hours, cost. Starts nothing."""
    from spa_ray.pipeline.plan_print import print_comparison, print_plan

    if (config is None) == (compare is None):
        raise InputError("spa plan: give a CONFIG, or --compare and a run folder")
    if compare is not None:
        from spa_ray.pipeline.plan_compare import compare_run

        result = compare_run(compare)
        print_comparison(result)
    else:
        from spa_ray.config import load_config
        from spa_ray.pipeline.plan import check_price, make_plan

        result = make_plan(load_config(str(config), overrides or []), price=check_price(price))
        print_plan(result)
    emit(result, as_json)
    if result.get("refusal"):
        raise InputError(result["refusal"])


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="model folder or hub id", show_default=False)],
    prompts: Annotated[
        str, typer.Option("--prompts", help="prompts: file, folder or module:reader", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="YAML file to write; - prints it")] = "mine.yaml",
    as_json: AsJson = False,
) -> None:
    """Write a commented config that fits the model and this machine."""
    from spa_ray.pipeline.init import init as write_config

    emit(write_config(model, prompts, out), as_json)


@app.command()
def generate(
    config: ConfigFile,
    prompts: Annotated[str, typer.Option(help="prompts: file, folder or module:reader", show_default=False)],
    out: Out,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """One stage: prompts to episodes."""
    changes: list[Override] = [*(overrides or []), ("prompts.source", prompts)]
    one_arm(config, changes, "generate_stage", as_json, out=out, verbose=verbose)


@app.command(name="import")
def import_(
    source: Annotated[
        str, typer.Argument(help="answers with scores: file, folder or hf://owner/name", show_default=False)
    ],
    out: Out,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML config", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """A data set with answers and scores to episodes (HelpSteer2, UltraFeedback, HH-RLHF, own JSONL)."""
    from spa_ray.config import arm_configs, load_config
    from spa_ray.pipeline.commands import import_stage

    changes: list[Override] = [*(overrides or []), ("episodes.source", source)]
    bare = {"model": {"path": "none"}}
    arms = load_config(config, changes) if config else arm_configs(bare, changes, where="spa import", stem="import")
    emit(import_stage(next(iter(arms.values())), out=out), as_json)


@app.command()
def build(
    episodes: Annotated[
        Any, typer.Argument(parser=as_path, metavar="EPISODES", help="folder of episodes", show_default=False)
    ],
    out: Out,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML config", show_default=False)] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """One stage: episodes to pairs; prints the funnel."""
    from spa_ray.pipeline.commands import build_stage

    emit(build_stage(episodes, out, config, overrides or [], verbose=verbose), as_json)


@app.command()
def train(
    pairs: Pairs,
    out: Out,
    config: ConfigOption,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """One stage: pairs to a model folder."""
    one_arm(config, overrides, "train_stage", as_json, pairs=pairs, out=out, verbose=verbose)


@app.command(name="eval")
def evaluate(
    model: Model,
    out: Out,
    config: ConfigOption,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """One stage: a model's answers to the held-out prompts, scored."""
    one_arm(config, overrides, "evaluate_stage", as_json, model=model, out=out, verbose=verbose)


@app.command()
def export(
    source: Annotated[
        Any,
        typer.Argument(
            parser=local_path,
            metavar="SOURCE",
            help="model folder, adapter, a job's work folder or checkpoint, or pairs",
            show_default=False,
        ),
    ],
    out: Annotated[
        Any,
        typer.Option("--out", parser=local_path, metavar="PATH", help="folder to write", show_default=False),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="of pairs: trl, axolotl or llama_factory", show_default=False),
    ] = None,
    adapter: Annotated[
        Any,
        typer.Option(
            parser=local_path, metavar="PATH", help="adapter to merge into the model folder SOURCE", show_default=False
        ),
    ] = None,
    base: Annotated[
        Any,
        typer.Option(parser=local_path, metavar="PATH", help="base model, where it has moved", show_default=False),
    ] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint of this step; else the newest")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="upload the folder to this repository")] = None,
    public: Annotated[bool, typer.Option("--public", help="a new repository is public")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run code of the base model")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter, turn a checkpoint into a model folder, or pairs into another trainer's; push it when asked."""
    from spa_ray.pipeline.export_pairs import export_pairs, pairs_in
    from spa_ray.storage.hub_push import check_repo, push

    if push_to_hub is not None:
        check_repo(push_to_hub)
    if form is not None or pairs_in(source):
        if adapter or base or step is not None:
            raise InputError("spa export: --adapter, --base and --step are of models; SOURCE are pairs")
        emit(export_pairs(source, out, form, push_to_hub, private=not public), as_json)
        return
    if out is None and (push_to_hub is None or adapter or base or step is not None):
        raise InputError("spa export: --out is missing; name the model folder to write")
    from spa_ray.storage.model_folder import check_model_folder
    from spa_ray.training import convert

    if out is not None:
        convert.export(source, out, adapter=adapter, base=base, step=step, trust_remote_code=trust_remote_code)
    folder = out or source
    check_model_folder(folder)
    url = None if push_to_hub is None else push(folder, push_to_hub, private=not public)
    print(folder if url is None else url)
    emit({"model": str(folder.absolute()), "pushed": url}, as_json)


app.command()(sense)


@app.command()
def inspect(
    run_dir: Run,
    prompt_id: Annotated[str, typer.Argument(help="the prompt's id, or its beginning", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """One prompt's whole story: candidates, scores, filters, pairs, weights."""
    from spa_ray.pipeline.inspect import print_story, story

    result = story(run_dir, prompt_id)
    print_story(result)
    emit(result, as_json)


@app.command()
def chat(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL [MODEL]... [KEY=VALUE]...", help="folders or hub ids", show_default=False),
    ],
    steer: Steered = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Talk to one model, or to several side by side; a prompt from stdin is answered once."""
    from spa_ray.cli.chat import run_chat

    emit(run_chat([*models, *map(steering, steer or [])], verbose=verbose), as_json)


app.command()(report)

annotate = typer.Typer(help="Blind sheets for people, and how judges agree with what they said.", no_args_is_help=True)
app.add_typer(annotate, name="annotate")


@annotate.command(name="out")
def annotate_out(
    run_dir: Run,
    out: Annotated[Path, typer.Option("--out", help="the sheet, a CSV file", show_default=False)],
    arm: Annotated[str | None, typer.Option(help="whose answers; by default the last arm's")] = None,
    against: Annotated[str, typer.Option(help="an arm, or vanilla")] = "vanilla",
    limit: Annotated[int | None, typer.Option(min=1, help="so many prompts, drawn; by default all")] = None,
    seed: Annotated[int, typer.Option(help="of the draw, the order and the sides")] = 0,
    as_json: AsJson = False,
) -> None:
    """Two models' held-out answers side by side, without their names, as CSV and as an HTML form."""
    from spa_ray.pipeline.annotate import sheet_out

    emit(sheet_out(run_dir, out=out, arm=arm, against=against, limit=limit, seed=seed), as_json)


@annotate.command(name="in")
def annotate_in(
    sheet: Annotated[Path, typer.Argument(help="the filled sheet", show_default=False)],
    key: Annotated[Path | None, typer.Option("--key", help="by default beside it: SHEET.key.json")] = None,
    as_json: AsJson = False,
) -> None:
    """What people said, and how the run's judges agree with them, objective by objective."""
    from spa_ray.pipeline.annotate import sheet_in

    emit(sheet_in(sheet, key_file=key), as_json)


@app.command()
def clean(
    run_dir: Run,
    as_json: AsJson = False,
) -> None:
    """Delete the stages of a run that no arm refers to any more."""
    from spa_ray.pipeline.commands import clean_run

    emit(clean_run(run_dir), as_json)


@app.command()
def schema(as_json: AsJson = False) -> None:
    """The config's JSON schema."""
    from spa_ray.config import Config

    print(json.dumps(Config.model_json_schema(), indent=None if as_json else 2))


def one_arm(config: Path, overrides: Sequence[Override] | None, command: str, as_json: bool, **options: Any) -> None:
    """Run a one-stage command of `runs.commands` with the config's first arm."""
    from spa_ray.config import load_config
    from spa_ray.pipeline import commands

    arms = load_config(config, overrides or [])
    action: Callable[..., dict[str, Any]] = getattr(commands, command)
    emit(action(next(iter(arms.values())), **options), as_json)


if __name__ == "__main__":
    main()
