"""A look at an endpoint before anything is asked of it: its key, its models, and whether it holds to given texts."""

from __future__ import annotations

import os
from typing import Any

from spa_ray.config.endpoint import Endpoint
from spa_ray.engine.openai import RETRIED, constrained
from spa_ray.errors import InputError, RunError
from spa_ray.logs import printable

CHECK_SECONDS = 10.0
CHECK_CHOICES = ("moss", "flint")  # what no model would answer by itself


def api_key(endpoint: Endpoint) -> str | None:
    """Raises: InputError where the variable that holds the key is not set."""
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env)
    if not key:
        raise InputError(f"the environment has no {endpoint.api_key_env}, which api_key_env of a judge names")
    return key


def check_endpoint(endpoint: Endpoint, key: str | None) -> None:
    """One look at the endpoint's list of models, where it has one, and with `choices` one constrained answer.

    Raises: InputError where the model, the key or `choices` does not fit; RunError while nobody answers.
    """
    where = f"the endpoint {endpoint.base_url}"
    found = _look(endpoint, key, "GET", "models")
    if found.status_code in (401, 403):
        raise InputError(f"{where} refuses the key (status {found.status_code}); see api_key_env")
    try:
        names = [model["id"] for model in found.json()["data"]] if found.status_code == 200 else []
    except (ValueError, KeyError, TypeError):  # no list of models: the first request will tell
        names = []
    if names and endpoint.model not in names:
        raise InputError(f"{where} serves no model {endpoint.model!r}; it serves {', '.join(map(str, names[:10]))}")
    if endpoint.choices:
        _check_choices(endpoint, key, where)


def _check_choices(endpoint: Endpoint, key: str | None, where: str) -> None:
    asked = [{"role": "user", "content": "Count from one to three."}]
    body = {"model": endpoint.model, "messages": asked, "max_tokens": 16, "temperature": 0.0, "seed": 0}
    found = _look(endpoint, key, "POST", "chat/completions", json={**body, **constrained(CHECK_CHOICES)})
    if found.status_code in RETRIED or found.status_code >= 500:
        raise RunError(f"{where} gives no answer (status {found.status_code}); run the same command again later")
    try:
        said = found.json()["choices"][0]["message"]["content"] if found.status_code == 200 else found.text
    except (ValueError, LookupError, TypeError):
        said = found.text
    if said not in CHECK_CHOICES:
        told = f"status {found.status_code}, {printable(str(said))[:60]!r}"
        raise InputError(
            f"{where} does not hold its answers to given texts ({told}); set choices: false and scoring.mode=regex, "
            "which reads free text by scoring.pattern"
        )


def _look(endpoint: Endpoint, key: str | None, method: str, path: str, **body: Any) -> Any:
    """Raises: RunError where nobody answers."""
    import httpx

    url, headers = f"{endpoint.base_url}/{path}", {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        return httpx.request(
            method, url, headers=headers, timeout=endpoint.timeout_s if body else CHECK_SECONDS, **body
        )
    except httpx.HTTPError as e:
        told = f"{endpoint.base_url} gives no answer ({type(e).__name__}: {e})"
        raise RunError(f"the endpoint {told}; start it, or change base_url") from e
