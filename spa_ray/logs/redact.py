"""Secrets out of text: what the environment calls a secret, credentials in URLs, and the shapes of known tokens.

Comes in: any text that is going to be shown or kept. Goes out: the same text with `***` where a secret stood.
Never: a promise about secrets that nothing marks as such (a password in the middle of a prompt is text).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 6  # a shorter value of the environment is taken for a switch: hiding every `1` would hide the log

# Names of environment variables: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD.
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|CREDENTIALS?)$|PASSWORD|PASSWD|PASSPHRASE", re.IGNORECASE)

# Names of keys. Narrower, since a model's settings have keys such as `pad_token` and `max_tokens`.
_KEY = (
    r"(?:[\w-]*[_-])?(?:(?:api|access|auth|bearer|hf|hub|private|secret|session|github|wandb|aws)[_-]?(?:token|key)"
    r"|password|passwd|passphrase|secret|credentials?)"
)
_SECRET_KEY = re.compile(rf"{_KEY}|token", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?<![\w-])(?P<key>{_KEY}[\"']?\s*[=:]\s*|token\s*=\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;&\"'}}\])]+)",
    re.IGNORECASE,
)

# https://user:password@host, and a token in the user's place.
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<who>[^\s/?#\"'<>]+)@", re.IGNORECASE)
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"  # GitHub
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS access key ids
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{16,}"  # Google
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"  # JWT
    r")"
)
_BEARER = re.compile(r"(?P<kind>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without its secrets. `environment` is this process's own unless given."""
    for value in _secret_values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _URL.sub(lambda m: f"{m['scheme']}{HIDDEN}@", text)
    text = _TOKENS.sub(HIDDEN, text)
    text = _BEARER.sub(lambda m: f"{m['kind']}{HIDDEN}", text)
    return _ASSIGNED.sub(lambda m: f"{m['key']}{HIDDEN}", text)


def redact_command(arguments: Iterable[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """A command line without its secrets: `a.b.hf_token=…` and `--password …` lose their values too."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        secret = _SECRET_KEY.fullmatch(key.split(".")[-1].lstrip("-")) is not None
        if hide_next:
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(f"{key}={HIDDEN}")
        else:
            shown.append(redact(argument, environment))
        hide_next = secret and not equals and argument.startswith("--") and not hide_next
    return shown


def redact_tree(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """JSON-like data without its secrets: strings as `redact`, and whole values under keys that name a secret."""
    if isinstance(value, str):
        return redact(value, environment)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if inner is not None and isinstance(key, str) and _SECRET_KEY.fullmatch(key)
            else redact_tree(inner, environment)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_tree(inner, environment) for inner in value]
    return value


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    """Longest first, so that a secret that holds another is hidden whole."""
    found = {v for k, v in environment.items() if _SECRET_VARIABLE.search(k) and len(v) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
