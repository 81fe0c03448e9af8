"""The pass's actor and its counts, without Ray: what a block becomes, and how a death and a mistake are passed on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext
from upath import UPath

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PROMPTS
from spa_ray.engine import Completion, EngineDeadError
from spa_ray.errors import InputError, RunError
from spa_ray.generation import actor as actors
from spa_ray.generation import stage
from spa_ray.generation.actor import EpisodeActor, Pass, RefinedAnswers
from spa_ray.generation.ledger import FRUITLESS_STARTS, SUSPECT_TRIES, Ledger
from spa_ray.generation.setup import Task, check_generation
from spa_ray.generation.stage import count_rows
from spa_ray.generation.usage import Spent
from spa_ray.storage.node_cache import FETCH_SECONDS
from tests.scripted import WEIGHTS, play, prompt, scripted_config, scripted_episodes
from tests.tiny_model import build_tiny_tokenizer


class HereLine:
    """The line to a ledger in this process."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.ledger, method)(*args)

    async def asked(self, method: str, *args: Any) -> Any:
        return self.ask(method, *args)

    tell = ask


class Exited(BaseException):
    """The process would have ended here."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        assert status == 1
        raise Exited

    monkeypatch.setattr(actors, "who_am_i", lambda: ("A7", "N1"))
    monkeypatch.setattr(actors.os, "_exit", leave)
    monkeypatch.setattr(actors.WorkerLog, "start", lambda self, **more: None)


def actor(config: Config, task: Task | None = None, line: HereLine | None = None, **changes: Any) -> EpisodeActor:
    return EpisodeActor(Pass(config, task or Task(), WEIGHTS, **changes), line or HereLine())  # type: ignore[arg-type]


def block(*texts: str) -> pa.Table:
    return pa.Table.from_pylist([prompt(text) for text in texts], schema=PROMPTS)


def test_a_block_of_prompts_becomes_a_block_of_episodes_in_its_order(tmp_path: Path) -> None:
    config = scripted_config({"jitter": 0.01})
    table = asyncio.run(actor(config)(block("one?", "two?", "three?")))
    assert table.schema.equals(EPISODES)
    assert table.to_pylist() == [play(scripted_config(), text) for text in ("one?", "two?", "three?")]


def test_no_more_prompts_are_in_flight_than_allowed(tmp_path: Path) -> None:
    config = scripted_config({"jitter": 0.01}, resources={"concurrency": 2})
    here = actor(config)
    inside, most = 0, 0
    run = here._episodes.run

    async def counted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        row = await run(*args, **kwargs)
        inside -= 1
        return row

    here._episodes.run = counted  # type: ignore[method-assign]
    asyncio.run(here(block(*(f"question {k}?" for k in range(8)))))
    assert most == 2


def test_answers_are_scored_row_by_row(tmp_path: Path) -> None:
    config = scripted_config()
    answered = asyncio.run(actor(config, Task(kind="answer", scored=False))(block("one?")))
    scored = asyncio.run(actor(config, Task(kind="score"))(answered)).to_pylist()[0]
    assert all(score is not None for score in scored["scores"][0])


def test_an_engines_death_is_written_down_and_ends_the_process() -> None:
    line = HereLine()
    with pytest.raises(Exited):
        asyncio.run(actor(scripted_config({"die": "two"}), line=line)(block("one?", "two?")))
    explained = stage.explained(RuntimeError("Ray's own text"), line.ledger.last_word())
    assert isinstance(explained, RunError)
    assert str(explained).startswith("generate: scripted: the engine is dead (engine actor A7 on node ")
    assert "its log /" in str(explained)
    assert line.ledger.begin("A7", ["one?", "two?", "three?"]) == {"one?": 1, "two?": 1}


def test_a_prompt_that_no_engine_survives_is_left_out_with_its_cause_and_the_others_are_answered() -> None:
    line, config = HereLine(), scripted_config({"die": "two"}, resources={"concurrency": 8})
    texts = [f"question {k}?" for k in range(20)] + ["two?"]
    deaths = 0
    while True:
        try:
            table = asyncio.run(actor(config, line=line)(block(*texts)))
            break
        except Exited:
            deaths += 1
    assert deaths == SUSPECT_TRIES
    errors = dict(zip(texts, table["error"].to_pylist(), strict=True))
    assert errors.pop("two?") == f"engine_died: {SUSPECT_TRIES} engines died with this prompt in them"
    assert set(errors.values()) == {None}


def test_an_engine_that_never_answers_gives_up_after_a_few_starts_and_says_why() -> None:
    line = HereLine()
    for _ in range(FRUITLESS_STARTS):
        line.ledger.born("A7", "N1", "log")
        line.ledger.died("A7", [], "the device is gone")
    with pytest.raises(EngineDeadError):
        asyncio.run(actor(scripted_config(), line=line)(block("one?")))
    explained = stage.explained(RuntimeError("Ray's own text"), line.ledger.last_word())
    assert isinstance(explained, RunError)
    assert f"an engine started {FRUITLESS_STARTS + 1} times" in str(explained)
    assert "the device is gone" in str(explained)


def test_an_engine_that_does_not_start_ends_the_process_and_a_mistake_of_the_user_does_not(tmp_path: Path) -> None:
    line, gone = HereLine(), tmp_path / "gone"
    gone.touch()
    with pytest.raises(Exited):
        actor(scripted_config({"dead_on_arrival": str(gone)}), line=line)
    assert "the engine did not start: RuntimeError: scripted: dead on arrival" in str(line.ledger.last_word())


@pytest.mark.parametrize(
    ("slow", "limit", "word"),
    [
        ("local_folder", 60.0, None),
        ("local_folder", 0.1, "was not fetched to this node in 0.1 s"),
        ("create_engine", 60.0, "the engine did not start in 0.2 s"),
    ],
)
def test_fetching_the_model_has_a_limit_of_its_own_and_takes_nothing_of_the_engines_start(
    slow: str, limit: float, word: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, line = getattr(actors, slow), HereLine()

    def slowly(*given: Any, **more: Any) -> Any:
        time.sleep(0.6)
        return real(*given, **more)

    monkeypatch.setattr(actors, slow, slowly)
    monkeypatch.setattr(actors, "FETCH_SECONDS", limit)
    monkeypatch.setattr(actors.os, "_exit", lambda status: None)
    actor(scripted_config(generation={"start_timeout_s": 0.2}), line=line)
    last = line.ledger.last_word()
    assert last is None if word is None else last is not None and word in last[1]


def test_ray_data_waits_for_a_fetch_only_where_nodes_may_fetch() -> None:
    context, config, still = DataContext.get_current(), scripted_config(), {}
    hub = Path("/cache/models--org--m/snapshots/abc")
    for model in (Path("/shared/model"), hub, UPath("memory://bucket/model")):
        with stage.patience(config, model):
            still[model] = context.execution_no_progress_timeout_s
    here, of_hub, of_store = still.values()
    assert of_hub == of_store == here + FETCH_SECONDS


def test_a_prompt_whose_episode_takes_too_long_becomes_an_error_row_and_the_others_go_on() -> None:
    config = scripted_config({"hang": "two"}, generation={"prompt_timeout_s": 0.5})
    table = asyncio.run(actor(config)(block("one?", "two?")))
    assert table["error"].to_pylist()[1] == "timeout: no episode within generation.prompt_timeout_s 0.5"


def test_an_engine_that_stalls_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    line, ended = HereLine(), threading.Event()

    def leave(status: int) -> None:
        ended.set()
        threading.Event().wait()  # what ends is a thread here, not the process

    monkeypatch.setattr(actors.os, "_exit", leave)
    config = scripted_config({"hang": "two"}, generation={"stall_timeout_s": 0.4, "prompt_timeout_s": 3})
    asyncio.run(actor(config, line=line)(block("one?", "two?")))
    assert ended.is_set()
    assert "the engine finished no step for" in str(line.ledger.last_word())
    assert line.ledger.begin("A7", ["two?"])["two?"] >= 1


def test_a_second_try_draws_other_seeds_and_says_which_it_is() -> None:
    config = scripted_config()
    first = asyncio.run(actor(config)(block("one?"))).to_pylist()[0]
    second = asyncio.run(actor(config, part=1)(block("one?"))).to_pylist()[0]
    assert (first["attempt"], second["attempt"]) == (0, 1)
    assert not {r["seed"] for r in first["responses"]} & {r["seed"] for r in second["responses"]}


def test_a_users_mistake_is_raised_with_the_first_block_and_stays_one() -> None:
    line = HereLine()
    here = actor(scripted_config(scoring={"mode": "expected"}), line=line)
    with pytest.raises(InputError, match="one-token labels") as raised:
        asyncio.run(here(block("one?")))
    explained = stage.explained(RuntimeError("Ray's own text"), line.ledger.last_word())
    assert isinstance(explained, InputError)
    assert str(explained) == str(raised.value)


def test_every_finished_episode_is_counted_and_the_display_hears_what_became_of_it() -> None:
    line = HereLine()

    def observe(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        return ["error" if row["error"] else None for row in rows]

    here = actor(scripted_config({"refuse": "two"}), line=line, observe=observe)
    rows = asyncio.run(here(block("one?", "two?"))).to_pylist()
    counts = line.ledger.counts()
    assert (counts.rows, counts.errors, counts.engines, counts.deaths) == (2, 1, 1, 0)
    assert counts.generated_tokens == sum(row["generated_tokens"] for row in rows)
    assert counts.reasons == {"passed": 1, "error": 1}
    assert counts.requests >= 5 + 10 + 1 + 2


def test_an_actor_that_comes_back_suspects_what_it_held_but_not_after_the_loss_of_its_node() -> None:
    ledger = Ledger()
    ledger.born("A", "N1", "log")
    ledger.begin("A", ["p", "q"])
    ledger.finished("A", ["q"], {"rows": 1}, {}, fruit=True)
    assert ledger.born("A", "N1", "log") == 1  # it had answered one
    assert ledger.begin("A", ["p", "q"]) == {"p": 1}
    assert ledger.born("A", "N2", "log") == 2
    assert ledger.begin("A", ["p", "q"]) == {"p": 1}


def test_refined_answers_are_found_by_prompt_id_in_any_number_of_files(tmp_path: Path) -> None:
    rows = [play(scripted_config(), f"question {k}?") for k in range(7)]
    failed = play(scripted_config({"refuse": "failed"}), "failed?")
    for k, part in enumerate((rows[:3], rows[3:], [failed])):
        pq.write_table(pa.Table.from_pylist(part, schema=EPISODES), tmp_path / f"{k}.parquet")
    answers = RefinedAnswers(tmp_path)
    for row in rows:
        refined = row["responses"][-1]
        expected = Completion(refined["text"], refined["token_ids"], refined["finish_reason"])
        assert answers.get(row["prompt_id"]) == expected
    assert answers.get("failed?") is None
    assert answers.get("another?") is None


def test_an_actor_hands_the_earlier_answer_to_its_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    folder.mkdir()
    before = play(scripted_config(), "one?")
    pq.write_table(pa.Table.from_pylist([before], schema=EPISODES), folder / "part.parquet")
    table = asyncio.run(actor(scripted_config(), Task(iteration=2), earlier=folder)(block("one?", "two?")))
    one, two = table.to_pylist()
    assert one["responses"][5]["text"] == before["responses"][-1]["text"]
    assert (len(one["responses"]), len(two["responses"])) == (7, 6)


def test_a_prompt_that_fails_once_its_file_is_made_anew_is_asked_again_too(
    tmp_path: Path,
) -> None:
    questions = ["one?", "two?", "three?"]
    prompts, rows, again = (tmp_path / name for name in ("prompts.parquet", "rows", "again.parquet"))
    pq.write_table(block(*questions), prompts)
    rows.mkdir()
    fine = [play(scripted_config(), question) for question in questions]

    def failed(*which: int) -> list[str]:
        written = [{**row, "error": "timeout: late"} if k in which else row for k, row in enumerate(fine)]
        pq.write_table(pa.Table.from_pylist(written, schema=EPISODES), rows / "part.parquet")
        count = stage._write_failed(prompts, rows, again)
        found = pq.read_table(again)["prompt_id"].to_pylist() if again.exists() else []
        assert count == len(found)
        return sorted(found)

    one, two, three = (row["prompt_id"] for row in fine)
    assert failed() == []
    assert failed(0) == [one]
    assert failed(0, 2) == sorted([one, three])
    assert failed(1) == sorted([one, two, three]), "none is taken away: its rows of the next part may be there"
    assert failed() == sorted([one, two, three])


def test_counts_are_those_of_the_written_rows(tmp_path: Path) -> None:
    rows = [play(scripted_config(), "one?"), play(scripted_config({"refuse": "two"}), "two?")]
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), tmp_path / "part.parquet")
    counts = count_rows(tmp_path, Spent(seconds=1.234))
    assert (counts.rows, counts.errors, counts.seconds) == (2, 1, 1.23)
    assert counts.first_error == rows[1]["error"]
    assert counts.prompt_tokens == sum(row["prompt_tokens"] for row in rows)
    assert counts.generated_tokens == sum(row["generated_tokens"] for row in rows)


@pytest.mark.parametrize(
    ("total", "fraction", "message"),
    [(3, 1.0, "2 episodes were written for 3 prompts"), (2, 0.4, "1 of 2 prompts failed, more than"), (2, 0.5, None)],
)
def test_missing_rows_and_too_many_failed_ones_end_the_run(
    tmp_path: Path, total: int, fraction: float, message: str | None
) -> None:
    rows = [play(scripted_config(), "one?"), play(scripted_config({"refuse": "two"}), "two?")]
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), tmp_path / "part.parquet")
    config = scripted_config(generation={"max_error_fraction": fraction})
    counts = count_rows(tmp_path, Spent())
    if message is None:
        stage._check_counts(counts, total, config, tmp_path)
    else:
        with pytest.raises(RunError, match=message):
            stage._check_counts(counts, total, config, tmp_path)


def test_the_last_word_of_an_engine_that_was_replaced_hides_no_other_failure() -> None:
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayTaskError

    word = ("death", "scripted: the engine is dead (engine actor A7)")
    full = RayTaskError("Write", "traceback\nOSError: [Errno 28] No space left on device", OSError(28, "full"))
    assert "No space left on device" in str(stage.explained(full, word))
    still = ExecutionTimeoutError("no progress for 9 s\nIf this is expected, raise the timeout")
    assert "no progress for 9 s" in str(stage.explained(still, word))
    own = RayTaskError("MapBatches", f"traceback\nEngineDeadError: {word[1]}", RuntimeError(word[1]))
    assert str(stage.explained(own, word)) == f"generate: {word[1]}"
    other = "endpoint http://x, model judge: the last 9 requests failed"
    both = RayTaskError(
        "MapBatches", f"traceback\nspa_ray.engine.openai.EndpointDeadError: {other}", RuntimeError(other)
    )
    assert str(stage.explained(both, word)) == f"generate: {other}"


def test_an_error_without_an_actors_last_word_becomes_one_line() -> None:
    for error in (RuntimeError("first\nlast line\n"), RuntimeError("")):
        explained = stage.explained(error, None)
        assert isinstance(explained, RunError)
        assert "\n" not in str(explained)
    assert "RuntimeError: last line;" in str(stage.explained(RuntimeError("first\nlast line\n"), None))


@pytest.mark.parametrize(("scale", "refused"), [([1, 10], False), ([1, 100], True)])
def test_labels_of_the_models_tokenizer_are_checked_before_an_engine_starts(
    tmp_path: Path, scale: list[int], refused: bool
) -> None:
    build_tiny_tokenizer().save_pretrained(tmp_path)
    config = scripted_config(
        model={"engine": "vllm", "engine_kwargs": {}}, scoring={"mode": "expected", "scale": scale}
    )
    if refused:
        with pytest.raises(InputError, match="one-token labels"):
            check_generation(config, tmp_path)
    else:
        check_generation(config, tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        check_generation(scripted_config(model={"engine": "vllm", "engine_kwargs": {}}), tmp_path)


def test_chat_templates_that_refuse_are_told_from_conversations_that_are_refused() -> None:
    from spa_ray.rollout.chat import Chat

    refuses_all = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="a plain question cannot be rendered"):
        Chat(build_tiny_tokenizer(refuses_all), model="m")
    one_turn = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    chat = Chat(build_tiny_tokenizer(one_turn), model="m")
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="one turn only"):
        chat.prompt_ids(turns)
    assert chat.prompt_ids(turns[:1], "kindly")  # the system text went into the one turn


def test_a_system_text_leads_the_first_user_turn_even_behind_an_assistants() -> None:
    from spa_ray.rollout.chat import Chat

    ignores = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = build_tiny_tokenizer(ignores)
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    given = [dict(turn) for turn in turns]
    text = tokenizer.decode(Chat(tokenizer, model="m").prompt_ids(turns, "kindly"))
    assert text == "[assistant]hello[user]kindly\n\nhi"
    assert turns == given  # the caller's messages stay as they were


def test_a_recipe_for_a_held_out_answer_reads_the_evaluations_own_settings() -> None:
    config = scripted_config(evaluation={"sampling": {"temperature": 0.3, "max_tokens": 7}})
    episodes, _ = scripted_episodes(config, Task(kind="answer", scored=False))
    recipe = episodes._recipe
    assert (recipe.n, recipe.refine, recipe.sample.temperature, recipe.sample.max_tokens) == (1, None, 0.3, 7)


@pytest.mark.parametrize(
    ("shares", "task", "message"),
    [
        ((0, 4), Task(), "generate: no judgement could be read, of 4 prompts; the first: parse_failure"),
        ((0, 4), Task(kind="score"), "evaluate: no judgement could be read"),
        ((3, 1), Task(kind="score"), "evaluate: 1 of 4 answers have no score, more than generation.max_error_fraction"),
        ((3, 1), Task(), None),
        ((4, 0), Task(kind="score"), None),
        ((0, 4), Task(kind="answer", scored=False), None),
    ],
)
def test_answers_that_nobody_could_score_end_the_stage(
    tmp_path: Path, shares: tuple[int, int], task: Task, message: str | None
) -> None:
    scored, unscored = shares
    config = scripted_config(scoring={"mode": "regex", "max_tokens": 40})
    mute = scripted_config({"unreadable": 1.0}, scoring={"mode": "regex", "max_tokens": 40})
    rows = [play(config, f"question {k}?") for k in range(scored)] + [play(mute, f"mute {k}?") for k in range(unscored)]
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), tmp_path / "part.parquet")
    counts = count_rows(tmp_path, Spent())
    assert (counts.errors, counts.unscored) == (0, unscored)
    if message is None:
        stage._check_counts(counts, 4, config, tmp_path, task)
    else:
        with pytest.raises(RunError, match=message):
            stage._check_counts(counts, 4, config, tmp_path, task)


def test_the_display_hears_of_tokens_and_finished_episodes_before_a_block_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actors, "REPORT_SECONDS", 0.05)
    line = HereLine()
    here = actor(scripted_config({"hang": "two"}, generation={"prompt_timeout_s": 1.0}), line=line)
    seen = []

    async def look() -> None:
        while True:
            await asyncio.sleep(0.1)
            seen.append(line.ledger.counts())

    async def play() -> None:
        looking = asyncio.ensure_future(look())
        await here(block("one?", "three?"))
        await here(block("two?"))
        looking.cancel()

    asyncio.run(play())
    last = line.ledger.counts()
    assert any(counts.inside == 1 and counts.rows == 2 and counts.tokens for counts in seen)
    assert (last.rows, last.inside, last.ahead) == (3, 0, 0)


def test_counts_of_an_engine_that_is_gone_are_not_in_flight_and_its_tokens_stay() -> None:
    ledger = Ledger()
    ledger.born("A", "N1", "log")
    ledger.begin("A", ["p", "q", "r"])
    ledger.work("A", 1.0, 1.0, 2, 1, 70)
    assert (ledger.counts().inside, ledger.counts().ahead, ledger.counts().tokens) == (2, 1, 70)
    ledger.finished("A", ["p"], {"rows": 1}, {}, fruit=True)
    assert (ledger.counts().rows, ledger.counts().ahead) == (1, 0)
    ledger.died("A", ["q", "r"], "why")
    assert (ledger.counts().inside, ledger.counts().tokens) == (0, 70)
    ledger.born("A", "N1", "log")
    ledger.work("A", 1.0, 1.0, 1, 0, 5)
    assert ledger.counts().tokens == 75
