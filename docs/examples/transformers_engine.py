"""An engine in a file of one's own: Hugging Face transformers, one request at a time. Slow, and it needs no vLLM."""

import asyncio
import threading
import time

from spa_ray import Completion, EngineStats


class TransformersEngine:
    capabilities = ("choices", "logprobs", "continuations", "load_weights")  # no stop strings

    def __init__(self, model, folder, device="cpu"):
        """`model` is the config's section, `folder` the model's; the rest is `model.engine_kwargs`."""
        self._device, self._lock = device, threading.Lock()
        self._requests = self._tokens = 0
        self._busy, self._waiting, self._first, self._step = 0.0, 0, None, time.monotonic()
        self._load(folder)
        self.max_model_len = model.max_model_len or self._model.config.max_position_embeddings

    def _load(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).to(self._device).eval()

    async def generate(self, request):
        given = len(request.prompt_ids) + len(request.continuation_ids or ())
        if given + request.max_tokens > self.max_model_len:
            raise ValueError(f"prompt and answer exceed the context of {self.max_model_len}")
        if request.choices and not request.choice_ids:
            raise ValueError("this engine knows no choices of several tokens; set scoring.scale=[1, 9] or mode=regex")
        self._waiting += 1
        self._first = self._first or time.monotonic()
        try:
            return await asyncio.to_thread(self._answer, request)  # the event loop stays free
        finally:
            self._waiting -= 1

    def _answer(self, request):
        import torch

        with self._lock, torch.inference_mode():
            started = time.monotonic()
            torch.manual_seed(request.seed % 2**63)
            ids = torch.tensor([request.prompt_ids], device=self._device)
            if request.continuation_ids:
                found = self._continue(ids, request)
            elif request.choice_ids or request.label_ids:
                found = self._choose(ids, request)
            else:
                found = self._sample(ids, request)
            self._step = time.monotonic()
            self._requests, self._tokens = self._requests + 1, self._tokens + len(found.token_ids)
            self._busy += self._step - started
            return found

    def _continue(self, ids, request):
        """No answer: the log-probabilities of given tokens behind the prompt."""
        import torch

        behind = torch.tensor([request.continuation_ids], device=self._device)
        logits = self._model(torch.cat([ids, behind], 1), logits_to_keep=behind.shape[1] + 1).logits[0, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, behind[0, :, None])[:, 0]
        return Completion("", [], "stop", continuation_logprobs=tuple(logprobs.tolist()))

    def _choose(self, ids, request):
        """One token: of the choices, or the likeliest label with the log-probabilities of all of them."""
        import torch

        logits = self._model(ids).logits[0, -1].float()
        among = torch.tensor(request.choice_ids or request.label_ids)
        if request.label_ids:
            logprobs = logits.log_softmax(-1)[among]
            token = int(among[logprobs.argmax()])
            return Completion(self.tokenizer.decode([token]), [token], "length", tuple(logprobs.tolist()))
        weights = (logits[among] / max(request.temperature, 1e-4)).softmax(-1)
        at = int(torch.multinomial(weights, 1))
        return Completion(request.choices[at], [int(among[at])], "length")

    def _sample(self, ids, request):
        import torch

        def alive(ids, scores, **_):  # after every token: an engine that makes none for long is replaced
            self._step = time.monotonic()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        sampling = {"do_sample": request.temperature > 0}
        if request.temperature > 0:
            sampling |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k or 0}
            sampling |= {"min_p": request.min_p or None}
        out = self._model.generate(
            ids,
            attention_mask=ids.new_ones(ids.shape),
            max_new_tokens=request.max_tokens,
            repetition_penalty=request.repetition_penalty,
            pad_token_id=self.tokenizer.eos_token_id,
            stopping_criteria=[alive],
            **sampling,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        ended = tokens[-1] == self.tokenizer.eos_token_id
        return Completion(
            self.tokenizer.decode(tokens, skip_special_tokens=True), tokens, "stop" if ended else "length"
        )

    def stats(self):
        now = time.monotonic()
        stalled = now - max(self._step, self._first or now) if self._waiting else 0.0
        return EngineStats(self._requests, self._busy, now - self._first if self._first else 0.0, stalled, self._tokens)

    async def load_weights(self, model):
        await asyncio.to_thread(self._load, model)

    def shutdown(self):
        del self._model
