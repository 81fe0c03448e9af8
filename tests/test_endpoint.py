"""A judge behind an endpoint: limits, retries, kept answers, and failures that never become a number."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_ray.config import arm_configs
from spa_ray.config.endpoint import Endpoint
from spa_ray.engine import openai as openai_engine
from spa_ray.engine.answers import open_answers
from spa_ray.engine.limiter import WINDOW, Limiter
from spa_ray.engine.openai import (
    Allowance,
    Answer,
    BudgetSpentError,
    EndpointClient,
    EndpointDeadError,
    EndpointError,
)
from spa_ray.errors import InputError, RunError
from spa_ray.generation.endpoint_check import api_key, check_endpoint
from spa_ray.generation.endpoint_judge import EndpointJudge
from spa_ray.generation.judging import Item, Judgement
from spa_ray.generation.templates import Templates
from spa_ray.objectives import load_objectives
from spa_ray.pipeline.stages import STAGES
from tests.fake_endpoint import FakeEndpoint, completion, running

LOOP = asyncio.new_event_loop()  # a client lives on one
HELLO = [{"role": "user", "content": "hello"}]
OTHER = [{"role": "user", "content": "other"}]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_engine, "FIRST_WAIT", 0.01)


def endpoint(fake: FakeEndpoint, **settings: Any) -> Endpoint:
    return Endpoint(kind="endpoint", base_url=fake.url or "http://127.0.0.1:9/v1", model="judge", **settings)


def ask(client: EndpointClient, messages: list[dict[str, str]] = HELLO, **where: int) -> Answer:
    async def one() -> Answer:
        return await client.ask(messages, max_tokens=8, temperature=1.0, seed=3, **where)

    return LOOP.run_until_complete(one())


def first_then(reply: Any, times: int = 1) -> Callable[[int, dict[str, Any]], Any]:
    return lambda number, body: reply if number < times else "[[7]]"


# --- retries --------------------------------------------------------------------------------------------------------

CUT = json.dumps(completion("[[9]]"))[:60]


@pytest.mark.parametrize(
    "reply",
    [
        (429, {}, "{}"),
        (429, {"Retry-After": "0.2"}, "{}"),
        (500, {}, "oh"),
        (503, {}, "{}"),
        (200, {}, CUT),
        (200, {}, "[]"),
        (200, {}, json.dumps(completion(None))),
        "hang",
    ],
    ids=["429", "retry-after", "500", "503", "cut JSON", "other JSON", "no text", "hangs"],
)
def test_what_may_pass_is_asked_again(reply: Any) -> None:
    with running(FakeEndpoint(first_then(reply, 2))) as fake:
        client = EndpointClient(endpoint(fake, timeout_s=1), None)
        assert ask(client).text == "[[7]]"
        assert len(fake.bodies) == 3
        paid = 3 if '"content": null' in str(reply) else 1  # such an answer costs what it says
        assert client.account() == {
            "requests": 3, "retries": 2, "cached": 0, "prompt_tokens": 10 * paid, "generated_tokens": 2 * paid
        }  # fmt: skip


def test_retry_after_holds_back_every_request() -> None:
    with running(FakeEndpoint(first_then((429, {"Retry-After": "0.5"}, "{}")))) as fake:
        client = EndpointClient(endpoint(fake), None)

        async def both() -> None:
            one = asyncio.ensure_future(client.ask(HELLO, max_tokens=8, temperature=1.0, seed=3))
            await asyncio.sleep(0.2)
            await asyncio.gather(one, client.ask(HELLO, max_tokens=8, temperature=1.0, seed=3, draw=1))

        LOOP.run_until_complete(both())
        assert [later - fake.times[0] >= 0.5 for later in fake.times[1:]] == [True, True]


def test_a_request_that_fails_for_good_has_no_answer() -> None:
    with running(FakeEndpoint(lambda number, body: (500, {}, "{}"))) as fake:
        client = EndpointClient(endpoint(fake, retries=2), None)
        with pytest.raises(EndpointError, match=r"no answer in 3 tries; the last: status 500"):
            ask(client)
        assert len(fake.bodies) == 3


def test_after_three_of_them_with_no_answer_between_the_endpoint_is_dead() -> None:
    with running(FakeEndpoint(lambda number, body: (500, {}, "{}"))) as fake:
        client = EndpointClient(endpoint(fake, retries=0), None)
        for _ in range(2):
            with pytest.raises(EndpointError):
                ask(client)
        with pytest.raises(EndpointDeadError, match=r"model judge: 3 requests failed"):
            ask(client)
        with pytest.raises(EndpointDeadError):
            ask(client)
        assert len(fake.bodies) == 3  # the fourth was not sent


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((401, {}, json.dumps({"error": {"message": "bad key"}})), "status 401"),
        ((429, {}, json.dumps({"error": {"message": "used up", "code": "insufficient_quota"}})), "status 429"),
    ],
)
def test_what_no_try_can_help_ends_it_at_once(reply: Any, told: str) -> None:
    with running(FakeEndpoint(lambda number, body: reply)) as fake:
        with pytest.raises(EndpointDeadError, match=told):
            ask(EndpointClient(endpoint(fake), None))
        assert len(fake.bodies) == 1


def test_a_model_that_is_not_served_ends_it_at_once() -> None:
    with running(FakeEndpoint(models=("other",))) as fake, pytest.raises(EndpointDeadError, match="status 404"):
        ask(EndpointClient(endpoint(fake), None))


def test_a_refused_request_is_that_request_alone() -> None:
    with running(FakeEndpoint(first_then((400, {}, json.dumps({"error": {"message": "too long"}}))))) as fake:
        client = EndpointClient(endpoint(fake), None)
        with pytest.raises(ValueError, match="refuses the request: status 400"):
            ask(client)
        assert ask(client).text == "[[7]]"


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(EndpointError, match="no connection"):
        ask(EndpointClient(endpoint(FakeEndpoint(), retries=1), None))


# --- limits ---------------------------------------------------------------------------------------------------------


def test_no_more_requests_at_a_time_than_may_be() -> None:
    with running(FakeEndpoint(delay=0.05)) as fake:
        client = EndpointClient(endpoint(fake, max_concurrency=3), None)

        async def many() -> None:
            await asyncio.gather(*(client.ask(HELLO, max_tokens=8, temperature=1.0, seed=3, draw=i) for i in range(20)))

        LOOP.run_until_complete(many())
        assert fake.most_inside == 3
        assert len(fake.bodies) == 20


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 200)), max_size=40),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(50, 400),
)
def test_within_any_minute_there_are_no_more_requests_and_tokens_than_may_be(
    asked: list[tuple[float, int]], requests: int | None, tokens: int | None
) -> None:
    clock = 0.0
    limiter = Limiter(requests, tokens, now=lambda: clock)
    sent: list[tuple[float, int]] = []
    for pause, size in asked:
        clock += pause
        clock += limiter.wait(size)
        assert limiter.wait(size) <= 1e-6
        limiter._sent.append((clock, size))
        sent.append((clock, size))
    for at, size in sent:
        within = [spent for then, spent in sent if at - WINDOW + 1e-6 < then <= at]
        assert requests is None or len(within) <= requests
        assert tokens is None or sum(within) <= max(tokens, size)


# --- kept answers ---------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    with running(FakeEndpoint()) as fake:
        for _ in range(2):
            client = EndpointClient(endpoint(fake), None, open_answers(tmp_path / "kept"))
            assert ask(client).text == "[[7]]"
        assert len(fake.bodies) == 1
        assert client.account()["cached"] == 1
        for messages, where in ((HELLO, {"draw": 1}), (HELLO, {"attempt": 1}), (OTHER, {})):
            ask(EndpointClient(endpoint(fake), None, open_answers(tmp_path / "kept")), messages, **where)
        assert len(fake.bodies) == 4


def test_an_answer_that_nobody_waits_for_any_more_is_kept(tmp_path: Path) -> None:
    with running(FakeEndpoint(delay=0.2)) as fake:
        client = EndpointClient(endpoint(fake), None, open_answers(tmp_path / "kept"))

        async def gone() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.ask(HELLO, max_tokens=8, temperature=1.0, seed=3), 0.05)
            await asyncio.sleep(0.5)

        LOOP.run_until_complete(gone())
        assert ask(client).text == "[[7]]"
        assert len(fake.bodies) == 1


def test_the_account_knows_dollars() -> None:
    with running(FakeEndpoint()) as fake:
        client = EndpointClient(endpoint(fake, price={"input": 1.0, "output": 10.0}), None)
        ask(client)
        assert client.account()["usd"] == pytest.approx((10 * 1.0 + 2 * 10.0) / 1e6)


def test_an_endpoint_that_counts_no_tokens_is_counted_by_the_text() -> None:
    body = {key: value for key, value in completion("[[7]] because").items() if key != "usage"}
    with running(FakeEndpoint(lambda number, _: (200, {}, json.dumps(body)))) as fake:
        client = EndpointClient(endpoint(fake), None)
        ask(client)
        assert (client.account()["prompt_tokens"], client.account()["generated_tokens"]) == (1, 4)


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowance", "told"), [(Allowance(usd=21e-6), "usd"), (Allowance(tokens=120), "tokens")])
def test_a_request_that_might_pass_the_budget_is_not_sent_and_costs_are_settled_by_what_was_used(
    allowance: Allowance, told: str
) -> None:
    """A request may cost 8 of output and, of one message of 5 bytes, 37 of input; it costs 2 and 10."""
    with running(FakeEndpoint(delay=0.05)) as fake:
        client = EndpointClient(endpoint(fake, price={"input": 0, "output": 1}), None, allowance=allowance)

        async def many() -> list[Any]:
            asks = [client.ask(HELLO, max_tokens=8, temperature=1.0, seed=3, draw=i) for i in range(9)]
            return await asyncio.gather(*asks, return_exceptions=True)

        together = [type(answer) for answer in LOOP.run_until_complete(many())]
        assert together.count(Answer) == 2  # 2 x 8 of 21 millionths are reserved, 2 x 45 of 120 tokens
        one_by_one = 5  # while 8 of output, or 45 tokens, are left
        for draw in range(one_by_one):
            ask(client, draw=100 + draw)
        with pytest.raises(BudgetSpentError, match=rf"what is left of budget\.{told} may not be enough"):
            ask(client)
        assert len(fake.bodies) == 2 + one_by_one
        spent = client.account()
        assert spent["usd"] <= (allowance.usd or 1)
        assert spent["prompt_tokens"] + spent["generated_tokens"] <= (allowance.tokens or 1000)


def test_what_is_kept_is_answered_when_nothing_is_left(tmp_path: Path) -> None:
    with running(FakeEndpoint()) as fake:
        ask(EndpointClient(endpoint(fake), None, open_answers(tmp_path)))
        client = EndpointClient(endpoint(fake), None, open_answers(tmp_path), Allowance(tokens=0))
        assert ask(client).text == "[[7]]"
        assert client.account() == {
            "requests": 0, "retries": 0, "cached": 1, "prompt_tokens": 0, "generated_tokens": 0
        }  # fmt: skip


# --- judging --------------------------------------------------------------------------------------------------------


def scored(fake: FakeEndpoint, *, choices: bool = False, **scoring: Any) -> tuple[Judgement, EndpointClient]:
    judge = {"kind": "endpoint", "base_url": fake.url, "model": "judge", "retries": 1, "choices": choices}
    mode = "choice" if choices else "regex"
    raw = {"model": {"path": "none"}, "scoring": {"mode": mode, "judge": judge, **scoring}}
    config = next(iter(arm_configs(raw, (), where="test", stem="test").values()))
    objectives = load_objectives(config)
    assert config.scoring.judge is not None
    client = EndpointClient(config.scoring.judge, None)
    judge_it = EndpointJudge(client.ask, Templates(config, objectives), config.scoring)
    question = [{"role": "user", "content": "How?"}]
    return LOOP.run_until_complete(
        judge_it.score(Item(question, "{}", "So.", objectives[:1], lambda _, draw, attempt: draw))
    )[0], client


@pytest.mark.parametrize("text", ["[[11]]", "[[0]]", "seven", "[[3]] or [[4]]", "", "[[7.5]]"])
def test_an_answer_off_the_scale_or_without_a_score_never_becomes_a_number(text: str) -> None:
    with running(FakeEndpoint(lambda number, body: text)) as fake:
        found, _ = scored(fake, retries=1)
        assert found.score is None
        assert found.status.startswith("parse_failure")
        assert len(fake.bodies) == 2


def test_a_judgement_is_the_mean_of_its_draws_and_a_bad_one_is_drawn_again() -> None:
    texts = ["well … [[6]]", "hm", "[[9]]"]
    with running(FakeEndpoint(lambda number, body: texts[number])) as fake:
        found, _ = scored(fake, draws=2)
        assert (found.score, found.draws, found.status) == (7.5, [6.0, 9.0], "ok")
        assert (found.prompt_tokens, found.generated_tokens) == (30, 6)
        assert "So." in fake.bodies[0]["messages"][-1]["content"]


@pytest.mark.parametrize("finish", ["length", None])
def test_an_answer_that_may_have_been_cut_is_no_score_where_the_cut_could_change_it(finish: str | None) -> None:
    body = completion("score: 1")
    body["choices"][0]["finish_reason"] = finish
    with running(FakeEndpoint(lambda number, _: (200, {}, json.dumps(body)))) as fake:
        found, _ = scored(fake, pattern=r"score: (\d+)", retries=0)
        assert found.score is None
        assert found.status.startswith("truncated")


def test_an_endpoint_that_fails_raises_and_gives_no_score() -> None:
    with running(FakeEndpoint(lambda number, body: (500, {}, "{}"))) as fake, pytest.raises(EndpointError):
        scored(fake)


# --- the config -----------------------------------------------------------------------------------------------------


def raw_config(**judge: Any) -> dict[str, Any]:
    judge = {"kind": "endpoint", "base_url": "http://x/v1", "model": "judge", **judge}
    return {"model": {"path": "none"}, "scoring": {"mode": "regex", "judge": judge}}


def generate_key(raw: dict[str, Any]) -> str:
    config = next(iter(arm_configs(raw, (), where="test", stem="test").values()))
    return STAGES["generate"].key(config, {})


def test_the_model_and_its_address_are_part_of_the_stage_and_limits_are_not() -> None:
    base = generate_key(raw_config())
    assert generate_key(raw_config(model="other")) != base
    assert generate_key(raw_config(base_url="http://y/v1")) != base
    same = {"max_concurrency": 3, "retries": 0, "timeout_s": 5, "price": {"input": 1, "output": 1}, "cache": False}
    assert generate_key(raw_config(**same, api_key_env="K", requests_per_minute=3)) == base


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_url": "x/v1"}, "scoring.judge.base_url: 'x/v1' is no URL"),
        ({"base_url": "http://user:key@x/v1"}, "a URL in a config holds no user or key"),
        ({"max_concurrency": 0}, "scoring.judge.max_concurrency: must be a whole number, 1 or more, got 0"),
        ({"api_key": "s"}, "scoring.judge.api_key: unknown key; did you mean scoring.judge.api_key_env?"),
    ],
)
def test_a_wrong_judge_is_told_in_one_line(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        generate_key(raw_config(**change))
    assert told in str(error.value)


def test_a_wrong_judge_of_the_evaluation_is_told_by_its_own_keys() -> None:
    with pytest.raises(InputError, match=r"evaluation\.judge\.model: missing; give it a value"):
        generate_key({"model": {"path": "none"}, "evaluation": {"judge": {"kind": "endpoint", "base_url": "http://x"}}})


def test_an_evaluation_may_have_an_endpoint_of_its_own() -> None:
    def keys(**evaluation: Any) -> tuple[str, str]:
        raw = {"model": {"path": "none"}, "evaluation": evaluation}
        config = next(iter(arm_configs(raw, (), where="test", stem="test").values()))
        return generate_key(raw), STAGES["evaluate"].key(config, {})

    one = {"kind": "endpoint", "base_url": "http://x/v1", "model": "judge"}
    policy, first, second = keys(judge="self"), keys(judge=one), keys(judge={**one, "model": "other"})
    assert policy[0] == first[0] == second[0]
    assert len({policy[1], first[1], second[1]}) == 3


def test_a_budget_in_dollars_needs_prices_and_is_the_runs_own() -> None:
    with pytest.raises(InputError, match=r"budget\.usd needs scoring\.judge\.price; \{input: 0, output: 0\}"):
        generate_key({**raw_config(), "budget": {"usd": 1}})
    generate_key({**raw_config(price={"input": 1, "output": 2}), "budget": {"usd": 1}})
    local = {"model": {"path": "none"}, "budget": {"usd": 1}}
    with pytest.raises(InputError, match=r"budget\.usd bounds nothing here: .* set resources\.price_per_gpu_hour"):
        generate_key(local)
    generate_key({**local, "resources": {"price_per_gpu_hour": 3}})
    with pytest.raises(InputError, match=r"'budget\.usd' belongs to the run and cannot differ between arms"):
        generate_key({**raw_config(), "arms": {"main": {"budget.usd": 1}}})


def test_an_endpoint_judges_by_free_text_unless_it_is_held_to_choices() -> None:
    raw = raw_config()
    raw["scoring"]["mode"] = "choice"
    with pytest.raises(InputError, match=r"kind endpoint is asked in mode regex, not choice; set scoring\.mode=regex"):
        generate_key(raw)
    raw["scoring"]["judge"]["choices"] = True
    assert generate_key(raw)
    raw["scoring"]["mode"] = "regex"
    with pytest.raises(InputError, match=r"asked in mode choice, not regex; set scoring\.mode=choice"):
        generate_key(raw)


def test_the_key_comes_from_the_environment_and_is_needed_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with running(FakeEndpoint(key="secret")) as fake:
        named = endpoint(fake, api_key_env="JUDGE_KEY")
        with pytest.raises(InputError, match="the environment has no JUDGE_KEY"):
            api_key(named)
        with pytest.raises(InputError, match=r"refuses the key \(status 401\)"):
            check_endpoint(named, None)
        monkeypatch.setenv("JUDGE_KEY", "secret")
        check_endpoint(named, api_key(named))
        ask(EndpointClient(named, api_key(named)))
        assert fake.keys == {"Bearer secret"}


def test_an_endpoint_that_quotes_the_key_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    key = "letmein-0123456789"  # of no known shape, from a variable of no known name
    quoted = json.dumps({"error": {"message": f"wrong: {key}"}})
    for status, refusal in ((401, EndpointDeadError), (400, ValueError), (500, EndpointError)):
        with running(FakeEndpoint(lambda number, body, status=status: (status, {}, quoted))) as fake:
            with pytest.raises(refusal, match=r"wrong: \*\*\*") as told:
                ask(EndpointClient(endpoint(fake, retries=1), key))
            assert key not in f"{told.value!r} {told.value}"
    assert "wrong: ***" in caplog.text
    assert key not in caplog.text


def test_a_wrong_model_or_nobody_there_is_told_before_anything_starts() -> None:
    serves = "serves no model 'judge'; it serves a, b"
    with running(FakeEndpoint(models=("a", "b"))) as fake, pytest.raises(InputError, match=serves):
        check_endpoint(endpoint(fake), None)
    with pytest.raises(RunError, match="gives no answer"):
        check_endpoint(endpoint(FakeEndpoint()), None)


# --- constrained answers --------------------------------------------------------------------------------------------


def obeys(number: int, body: dict[str, Any]) -> str:
    """Takes the last of the texts that it is held to."""
    return str(body["structured_outputs"]["choice"][-1])


def test_an_endpoint_that_is_held_to_the_ratings_is_asked_for_them_and_nothing_else_is_read() -> None:
    with running(FakeEndpoint(obeys)) as fake:
        assert scored(fake, choices=True, scale=[1, 9])[0].score == 9.0
        assert fake.bodies[0]["structured_outputs"] == {"choice": list("123456789")}
        assert "[[" not in fake.bodies[0]["messages"][-1]["content"]
    for nonsense in ("11", "0", "[[7]]", "about 7", ""):
        with running(FakeEndpoint(lambda number, body, said=nonsense: said)) as fake:
            assert scored(fake, choices=True, retries=2)[0].score is None
            assert len(fake.bodies) == 3


@pytest.mark.parametrize(
    "reply", ["One, two, three.", (400, {}, json.dumps({"error": {"message": "Unknown parameter"}}))]
)
def test_one_that_does_not_obey_is_told_before_anything_starts(reply: Any) -> None:
    with running(FakeEndpoint(obeys)) as fake:
        check_endpoint(endpoint(fake, choices=True), None)
    with running(FakeEndpoint(lambda number, body: reply)) as fake:
        check_endpoint(endpoint(fake), None)
        with pytest.raises(InputError, match="does not hold its answers to given texts"):
            check_endpoint(endpoint(fake, choices=True), None)
    with (
        running(FakeEndpoint(lambda number, body: (503, {}, "{}"))) as fake,
        pytest.raises(RunError, match="gives no answer"),
    ):
        check_endpoint(endpoint(fake, choices=True), None)
