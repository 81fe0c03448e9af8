"""One request as vLLM takes it, and what came back of an answer that a stop string ended. Pure; no engine."""

from __future__ import annotations

from typing import Any

from spa_ray.engine.protocol import Request


def special_tokens(tokenizer: Any, stops: tuple[str, ...]) -> list[int]:
    """The tokens of those stop strings that are a special token's text: decoded text never shows them."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return [token for token, added in known.items() if added.special and added.content in stops]


def sampling_params(request: Request, stop_tokens: list[int] | None = None, *, rows: bool = False) -> Any:
    """vLLM's `SamplingParams` of a request. `stop_tokens`: the special tokens among its stop strings; `rows`: vLLM can
    score chosen positions of a prompt (its V2 runner)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    # One-token choices need no grammar and no end token: one masked step, 1.6 times the requests a second.
    single = None if request.choice_ids is None else list(request.choice_ids)
    constrained = request.choices is not None and single is None
    return SamplingParams(
        max_tokens=1 if single else request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        min_p=request.min_p,
        top_k=request.top_k or 0,
        repetition_penalty=request.repetition_penalty,
        stop=list(request.stop),
        stop_token_ids=stop_tokens or None,
        seed=request.seed,
        allowed_token_ids=single,
        structured_outputs=StructuredOutputsParams(choice=list(request.choices or ())) if constrained else None,
        logprob_token_ids=list(request.label_ids) if request.label_ids else None,
        **_prompt_scores(request, rows=rows),
        detokenize=bool(request.stop),  # vLLM looks for stop strings in the text that it decodes
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # nobody else holds it
    )


def _prompt_scores(request: Request, *, rows: bool) -> dict[str, Any]:
    """A continuation is scored as the prompt's end. Without `rows` vLLM makes the logits of every position that it
    computes in a step, `max_num_batched_tokens` at most; only those of the prompt's own tokens are kept."""
    if request.continuation_ids is None:
        return {}
    if not rows:
        return {"prompt_logprobs": 0}
    scored = [[token] for token in request.continuation_ids]
    return {"prompt_logprob_token_ids": scored, "prompt_logprob_start": len(request.prompt_ids) - 1}


def continuation_logprobs(request: Request, output: Any) -> tuple[float, ...]:
    """Of the request's continuation, from vLLM's `RequestOutput`."""
    ids = request.continuation_ids or ()
    if output.prompt_token_id_logprobs is not None:
        return tuple(float(row[0]) for row in output.prompt_token_id_logprobs)
    behind = list(output.prompt_logprobs)[-len(ids) :]
    return tuple(float(found[token].logprob) for token, found in zip(ids, behind, strict=True))


def before_stop(tokenizer: Any, ids: list[int], stop: str) -> list[int]:
    """The generated ids that come before the stop string.

    A token that holds both text and the beginning of the stop string goes with the stop string, so that the ids that
    are kept always decode to the text that is kept. No end token is added.
    Raises: RuntimeError when the decoded ids do not hold the stop string.
    """
    text = _decode(tokenizer, ids)
    cut = text.find(stop)
    if cut < 0 and text.startswith(stop.lstrip()):  # a decoder that drops the answer's first blank
        cut = 0
    if cut < 0:
        raise RuntimeError(f"vLLM ended an answer at {stop!r}, which its tokens do not hold")
    kept = len(ids) - 1
    while kept and not text[:cut].startswith(_decode(tokenizer, ids[:kept])):
        kept -= 1
    return ids[:kept]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
