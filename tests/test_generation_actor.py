"""The pass's actor and its counts, without Ray: what a block becomes, and how a death and a mistake are passed on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spa_ray.config.models import Config
from spa_ray.data.schemas import EPISODES, PROMPTS
from spa_ray.engine import Completion
from spa_ray.errors import InputError, RunError
from spa_ray.generation import stage
from spa_ray.generation.setup import Task, check_generation
from spa_ray.generation.stage import EpisodeActor, RefinedAnswers, count_rows
from tests.scripted import WEIGHTS, play, prompt, scripted_config, scripted_episodes
from tests.tiny_model import build_tiny_tokenizer


def actor(config: Config, folder: Path, task: Task | None = None, **changes: Any) -> EpisodeActor:
    options = {"earlier": None, "tally": None, **changes}
    return EpisodeActor(
        config, task or Task(), WEIGHTS, options["earlier"], folder / "words", options["tally"], verbose=False
    )


def block(*texts: str) -> pa.Table:
    return pa.Table.from_pylist([prompt(text) for text in texts], schema=PROMPTS)


def test_a_block_of_prompts_becomes_a_block_of_episodes_in_its_order(tmp_path: Path) -> None:
    config = scripted_config({"jitter": 0.01})
    table = asyncio.run(actor(config, tmp_path)(block("one?", "two?", "three?")))
    assert table.schema.equals(EPISODES)
    assert table.to_pylist() == [play(scripted_config(), text) for text in ("one?", "two?", "three?")]


def test_no_more_prompts_are_in_flight_than_allowed(tmp_path: Path) -> None:
    config = scripted_config({"jitter": 0.01}, resources={"concurrency": 2})
    here = actor(config, tmp_path)
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
    answered = asyncio.run(actor(config, tmp_path, Task(kind="answer", judge="none"))(block("one?")))
    scored = asyncio.run(actor(config, tmp_path, Task(kind="score"))(answered)).to_pylist()[0]
    assert all(score is not None for score in scored["scores"][0])


def test_an_engines_death_is_written_down_and_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(BaseException):
        pass

    def leave(status: int) -> None:
        assert status == 1
        raise Exited

    monkeypatch.setattr(stage.os, "_exit", leave)
    monkeypatch.setattr(stage.ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "A7"))
    with pytest.raises(Exited):
        asyncio.run(actor(scripted_config({"die": "two"}), tmp_path)(block("one?", "two?")))
    explained = stage._explained(RuntimeError("Ray's own text"), tmp_path / "words")
    assert isinstance(explained, RunError)
    assert str(explained).startswith("generate: scripted: the engine is dead (engine actor A7, its log")


def test_a_users_mistake_is_raised_with_the_first_block_and_stays_one(tmp_path: Path) -> None:
    here = actor(scripted_config(scoring={"mode": "expected"}), tmp_path)
    with pytest.raises(InputError, match="one-token labels") as raised:
        asyncio.run(here(block("one?")))
    explained = stage._explained(RuntimeError("Ray's own text"), tmp_path / "words")
    assert isinstance(explained, InputError)
    assert str(explained) == str(raised.value)


def test_every_finished_episode_is_tallied(tmp_path: Path) -> None:
    told: list[tuple[bool, int]] = []
    tally = SimpleNamespace(add=SimpleNamespace(remote=lambda failed, tokens: told.append((failed, tokens))))
    table = asyncio.run(actor(scripted_config({"refuse": "two"}), tmp_path, tally=tally)(block("one?", "two?")))
    assert sorted(told) == sorted((row["error"] is not None, row["generated_tokens"]) for row in table.to_pylist())


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
    table = asyncio.run(actor(scripted_config(), tmp_path, Task(iteration=2), earlier=folder)(block("one?", "two?")))
    one, two = table.to_pylist()
    assert one["responses"][5]["text"] == before["responses"][-1]["text"]
    assert (len(one["responses"]), len(two["responses"])) == (7, 6)


def test_counts_are_those_of_the_written_rows(tmp_path: Path) -> None:
    rows = [play(scripted_config(), "one?"), play(scripted_config({"refuse": "two"}), "two?")]
    pq.write_table(pa.Table.from_pylist(rows, schema=EPISODES), tmp_path / "part.parquet")
    counts = count_rows(tmp_path, seconds=1.234)
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
    counts = count_rows(tmp_path, seconds=0)
    if message is None:
        stage._check_counts(counts, total, config, tmp_path)
    else:
        with pytest.raises(RunError, match=message):
            stage._check_counts(counts, total, config, tmp_path)


def test_an_error_without_an_actors_last_word_becomes_one_line(tmp_path: Path) -> None:
    for error in (RuntimeError("first\nlast line\n"), RuntimeError("")):
        explained = stage._explained(error, tmp_path / "none")
        assert isinstance(explained, RunError)
        assert "\n" not in str(explained)
    assert "RuntimeError: last line;" in str(stage._explained(RuntimeError("first\nlast line\n"), tmp_path / "none"))


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
    from spa_ray.generation.chat import Chat

    refuses_all = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match="refuses a user message"):
        Chat(build_tiny_tokenizer(refuses_all), model="m")
    one_turn = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    chat = Chat(build_tiny_tokenizer(one_turn), model="m")
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="one turn only"):
        chat.prompt_ids(turns)
    assert chat.prompt_ids(turns[:1], "kindly")  # the system text went into the one turn


def test_a_system_text_leads_the_first_user_turn_even_behind_an_assistants() -> None:
    from spa_ray.generation.chat import Chat

    ignores = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = build_tiny_tokenizer(ignores)
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    given = [dict(turn) for turn in turns]
    text = tokenizer.decode(Chat(tokenizer, model="m").prompt_ids(turns, "kindly"))
    assert text == "[assistant]hello[user]kindly\n\nhi"
    assert turns == given  # the caller's messages stay as they were


def test_a_recipe_for_a_held_out_answer_reads_the_evaluations_own_settings() -> None:
    config = scripted_config(evaluation={"sampling": {"temperature": 0.3, "max_tokens": 7}})
    episodes, _ = scripted_episodes(config, Task(kind="answer", judge="none"))
    recipe = episodes._recipe
    assert (recipe.n, recipe.refine, recipe.sample.temperature, recipe.sample.max_tokens) == (1, None, 0.3, 7)
