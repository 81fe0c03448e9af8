"""Plugs: methods, judges, engines, sources and benchmarks that a config names.

A name is one of a registry's, or `package.module:name` for an object of the user's own. Registries hold dotted strings,
so that nothing is imported before a config names it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError

METHODS = {
    "spa": "spa_ray.methods.spa:SPA",
    "spa_anchor": "spa_ray.methods.anchor:Anchored",
    "spa_simpo": "spa_ray.methods.simpo:SimPO",
    "spa_dpo": "spa_ray.methods.dpo:DPO",
    "ipo": "spa_ray.methods.ipo:IPO",
    "orpo": "spa_ray.methods.orpo:ORPO",
    "sft": "spa_ray.methods.sft:SFT",
    "self_criticism": "spa_ray.methods.self_criticism:SelfCriticism",
    "sga_sft": "spa_ray.methods.sga_sft:SGASFT",
    "sga_dpo": "spa_ray.methods.sga_dpo:SGADPO",
    "ric": "spa_ray.methods.ric:RiC",
    "cpo": "spa_ray.methods.cpo:CPO",
    "modpo": "spa_ray.methods.modpo:MODPO",
}

ENGINES = {"vllm": "spa_ray.engine.vllm_engine:VLLMEngine"}  # whose sampling arguments and folders we know

# By kind of `config.judge`'s sections: a class with `of(section, parts)`, and `check(section, where)` before a run.
JUDGES = {
    "self": "spa_ray.generation.judging:ModelJudge",
    "base": "spa_ray.generation.judging:ModelJudge",
    "model": "spa_ray.generation.judging:ModelJudge",
    "function": "spa_ray.generation.function_judge:FunctionJudge",
    "reward": "spa_ray.generation.reward_judge:RewardJudge",
    "endpoint": "spa_ray.generation.endpoint_judge:EndpointJudge",
}

SOURCES = {  # each a `data.named.DataSet`
    "saferlhf": "spa_ray.data.loaders.saferlhf:SET",
    "wildguard": "spa_ray.data.loaders.wildguard:SET",
    "honeset": "spa_ray.data.loaders.honeset:SET",
    "jailbreak_trigger": "spa_ray.data.loaders.jailbreak_trigger:SET",
    "hh_rlhf": "spa_ray.data.loaders.hh_rlhf:SET",
    "ultrafeedback": "spa_ray.data.loaders.ultrafeedback:SET",
    "helpsteer2": "spa_ray.data.loaders.helpsteer2:SET",
    "advbench": "spa_ray.data.loaders.advbench:SET",
    "harmbench": "spa_ray.data.loaders.harmbench:SET",
    "xstest": "spa_ray.data.loaders.xstest:SET",
    "strongreject": "spa_ray.data.loaders.strongreject:SET",
    "do_not_answer": "spa_ray.data.loaders.do_not_answer:SET",
    "mt_bench": "spa_ray.data.loaders.mt_bench:SET",
    "arena_hard": "spa_ray.data.loaders.arena_hard:SET",
    "truthfulqa": "spa_ray.data.loaders.truthfulqa:SET",
    "safetybench": "spa_ray.data.loaders.safetybench:SET",
    "mmlu": "spa_ray.data.loaders.mmlu:SET",
}

# The same kinds where they compare two answers.
PAIRWISE = {
    "self": "spa_ray.generation.pairwise:ModelPairwise",
    "base": "spa_ray.generation.pairwise:ModelPairwise",
    "model": "spa_ray.generation.pairwise:ModelPairwise",
    "endpoint": "spa_ray.generation.pairwise:EndpointPairwise",
    "function": "spa_ray.generation.pairwise:FunctionPairwise",
    "reward": "spa_ray.generation.pairwise:TwoRatings",
}

BENCHMARKS = {
    "mmlu": "spa_ray.evaluation.benchmarks.mmlu:MMLU",
    "truthfulqa": "spa_ray.evaluation.benchmarks.truthfulqa:TruthfulQA",
    "safetybench": "spa_ray.evaluation.benchmarks.safetybench:SafetyBench",
    "mt_bench": "spa_ray.evaluation.benchmarks.mt_bench:MTBench",
    "arena_hard": "spa_ray.evaluation.benchmarks.arena_hard:ArenaHard",
}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_dotted(text: str) -> bool:
    """Whether the text has the form `package.module:name`."""
    return _DOTTED.fullmatch(text) is not None


def load_plug(registry: Mapping[str, str], name: str, *, where: str) -> Any:
    """The object that a registry has under this name, or that the dotted path names.

    Raises: InputError for a name that is neither, and as `load_dotted`.
    """
    path = registry.get(name, name)
    if not is_dotted(path):
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.6)
        guess = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(registry)
        raise InputError(f"{where}: must be one of {known}, or package.module:Name of your own, got {name!r}{guess}")
    return load_dotted(path, where=where)


def source_of(text: str) -> Path | None:
    """The file of the module that a dotted path names; None where there is no such module, or no file of it."""
    _search_here()
    try:
        found = importlib.util.find_spec(text.partition(":")[0])
    except ModuleNotFoundError:
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def source_hash(text: str) -> str | None:
    """SHA-256 of a user's own module, whose code decides as much as its name; None for what the package has."""
    file = source_of(text) if is_dotted(text) and not text.startswith("spa_ray.") else None
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def to_ship(names: Iterable[str]) -> list[str]:
    """The files, or the folders of packages, that other machines need for these plugs: the user's own modules.

    What is installed (site-packages) is taken to be installed there too.
    """
    found = {}
    for name in filter(is_dotted, names):
        top = name.partition(":")[0].partition(".")[0]
        source = source_of(f"{top}:")
        if top == "spa_ray" or source is None or "site-packages" in source.parts:
            continue
        found[top] = str(source.parent if source.name == "__init__.py" else source)
    return list(found.values())


def _search_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def load_dotted(text: str, *, where: str) -> Any:
    """The object at `package.module:name`; the working folder is searched last, for users' own modules.

    Raises: InputError when there is no such module, when it cannot be imported, or when it has no such name.
    """
    module_name, _, name = text.partition(":")
    _search_here()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise InputError(f"{where}: {text!r}: {module_name} needs the module {e.name}; install it") from e
        raise InputError(
            f"{where}: {text!r}: there is no module {e.name}; give it as package.module:name, "
            "importable or in the working folder"
        ) from e
    except Exception as e:  # a user's module runs when it is imported: whatever it raises is about that file
        line = f":{e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        raise InputError(f"{where}: {text!r}: {module_name}{line} cannot be imported ({type(e).__name__}: {e})") from e
    if not hasattr(module, name):
        raise InputError(f"{where}: {text!r}: the module {module_name} has no {name!r}")
    return getattr(module, name)
