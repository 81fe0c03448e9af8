"""Whether the weights of a model folder are those that its config.json promises, by names and shapes. Reads no weights.

The model is built without memory (torch's meta device) and loaded by transformers' own code from tensors without
memory, so that its renaming, its merging of experts and its tied weights count as they do in training.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spa_ray.errors import InputError
from spa_ray.logs import printable
from spa_ray.storage.model_folder import read_config, stamp
from spa_ray.storage.weights import Header, read_header, tensors, weight_files

# What a folder is that transformers does not load as a causal language model, by the tables that name its type.
KINDS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "a vision-language model"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "a speech model"),
    ("MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES", "a speech model"),
    ("MODEL_FOR_CTC_MAPPING_NAMES", "a speech model"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "a model of sound and text"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "an encoder-decoder"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "an encoder, which writes no text"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "a vision model"),
)
BUFFERS = ("inv_freq", "position_ids", "attn.bias", "attention.bias", "masked_bias")  # of older files: no weights
SAMPLES = 64  # places at which two tied matrices are compared
SAMPLE_BYTES = 4096
Shape = tuple[int, ...]
Differences = tuple[list[str], list[str], list[tuple[str, Shape, Shape]]]


def check_weights(folder: Path, *, trust_remote_code: bool = False, served_only: bool = False) -> list[str]:
    """Compare the folder's weights with its config.json. Returns: notes on what training would leave out of the folder.

    `served_only`: nothing is said of quantized weights, nor of models that vLLM may know and transformers does not load
    as causal language models. Raises: InputError for such a folder where it is to be trained, and for weights that are
    missing, of another shape, or without a place in the model.
    """
    if served_only and (read_config(folder).get("quantization_config") or not _is_causal(folder, trust_remote_code)):
        return []
    return list(_checked(folder, trust_remote_code, stamp(folder)))


@functools.lru_cache(maxsize=64)
def _checked(folder: Path, trust_remote_code: bool, state: tuple[Any, ...]) -> tuple[str, ...]:
    """`state` stands for the contents: a folder is looked at once, whatever asks for it."""
    stored = Stored.of(folder)
    with _quiet():
        model = _empty_model(folder, trust_remote_code)
        unknown = _compare(folder, model, stored, trust_remote_code)
    _check_ties(folder, model, stored)
    return _left_out(folder, model, stored, unknown)


@dataclass(frozen=True)
class Stored:
    """The folder's tensors: in which file each is, and its entry in that file's header."""

    files: dict[str, Path]
    entries: Header

    @classmethod
    def of(cls, folder: Path) -> Stored:
        files: dict[str, Path] = {}
        entries: Header = {}
        for file in weight_files(folder):
            found = tensors(read_header(file))
            entries |= found
            files |= dict.fromkeys(found, file)
        return cls(files, entries)

    def shape(self, name: str) -> Shape:
        return tuple(self.entries[name]["shape"])

    def find(self, name: str) -> str | None:
        """The stored tensor that the model knows by this name, which may differ in its first parts."""
        parts = name.split(".")
        for first in range(max(1, len(parts) - 1)):
            end = ".".join(parts[first:])
            for other in self.entries:
                if other == end or other.endswith(f".{end}"):
                    return other
        return None


def _empty_model(folder: Path, trust_remote_code: bool) -> Any:
    """The model that training would load, on the meta device. Raises: InputError."""
    import torch
    from transformers import AutoModelForCausalLM, __version__

    config = _config(folder, trust_remote_code)
    file = folder / "config.json"
    if not _is_causal(folder, trust_remote_code):
        raise InputError(
            f"{folder}: {kind_of(config)}, which cannot be trained as a causal language model; give one that can, such "
            "as the text model that it was built on"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise InputError(f"{file}: transformers {__version__} cannot build its model: {_reason(e)}") from e
    _check_class(file, config, type(model).__name__)
    return model


def _config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, __version__

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise InputError(
                f"{folder}: its model is code of its own; set model.trust_remote_code=true where you trust it"
            ) from e
        known = "does not recognize" not in str(e)
        what = f"cannot read it: {_reason(e)}" if known else "does not know its model_type; upgrade transformers"
        raise InputError(f"{folder / 'config.json'}: transformers {__version__} {what}") from e


def _is_causal(folder: Path, trust_remote_code: bool) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _config(folder, trust_remote_code)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")


def kind_of(config: Any) -> str:
    """What a model is, by transformers' tables of types: `a vision-language model (LlavaForConditionalGeneration)`."""
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    label = next((label for table, label in KINDS if kind in getattr(modeling_auto, table)), f"a model of type {kind}")
    names = config.architectures or []
    return f"{label} ({names[0]})" if names else label


def _check_class(file: Path, config: Any, loaded: str) -> None:
    """vLLM chooses the class by `architectures`, transformers by `model_type`. Raises: InputError where they differ."""
    import transformers

    for name in config.architectures or []:
        named = getattr(getattr(transformers, name, None), "config_class", None)
        if name == loaded or named is None or isinstance(config, named):
            return
        raise InputError(
            f"{file}: architectures says {name} and model_type {config.model_type}: vLLM would serve the one and "
            f"training load the other ({loaded}); correct the one that is wrong"
        )


def _compare(folder: Path, model: Any, stored: Stored, trust_remote_code: bool) -> list[str]:
    """Weights of parts that the model does not have. Raises: InputError for any other difference between the promised
    weights and those in the files."""
    wanted: dict[str, Shape] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unknown, reshaped = _load(folder, model, stored, trust_remote_code)
    strange = _within(model, unknown)
    kind, config = type(model).__name__, folder / "config.json"
    if 2 * len(missing) > len(wanted) - len(model.all_tied_weights_keys):
        raise InputError(
            f"{folder}: its weights are not those of the {kind} that config.json promises: {len(missing)} of "
            f"{len(wanted)} are missing, the first {missing[0]}, and there is {next(iter(sorted(stored.files)))}; "
            "config.json or the weights are another model's"
        )
    if reshaped:
        name, found, shape = reshaped[0]
        at = stored.find(name)
        raise InputError(
            f"{folder if at is None else stored.files[at]}: {at or name} has the shape {_text(found)}, config.json "
            f"promises {_text(shape)}{_more(reshaped)}; config.json or the weights are another model's"
        )
    if missing:
        raise InputError(
            f"{folder}: no weight {missing[0]} ({_text(wanted[missing[0]])}){_more(missing)} in its files, which "
            f"config.json promises ({kind}), so that it would be random; fetch the model again, or correct {config}"
        )
    if strange:
        at = stored.find(strange[0])
        raise InputError(
            f"{folder if at is None else stored.files[at]}: {at or strange[0]}{_more(strange)} has no place in the "
            f"{kind} that config.json promises and would be left out; config.json or the weights are another model's"
        )
    return unknown


def _load(folder: Path, model: Any, stored: Stored, trust_remote_code: bool) -> Differences:
    """Names without a weight, weights without a name, and (name, stored shape, promised shape), sorted."""
    import torch

    empty = {name: torch.empty(stored.shape(name), device="meta") for name in stored.entries}
    try:
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            trust_remote_code=trust_remote_code,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as e:
        raise InputError(
            f"{folder}: its weights do not fit the {type(model).__name__} of config.json: {_reason(e)}"
        ) from e
    reshaped = sorted((name, tuple(found), tuple(shape)) for name, found, shape in info["mismatched_keys"])
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), reshaped


def _within(model: Any, unknown: list[str]) -> list[str]:
    """Of the weights that the model does not know, those within its layers: others are of parts of their own, such as a
    vision tower or a head for several tokens at once."""
    base = model.base_model_prefix
    outer = {"", base, f"{base}.language_model"}
    inner = {name for name, _ in model.named_modules()} - outer

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:n]) in inner for n in range(1, len(parts)))

    return [name for name in unknown if inside(name) or inside(f"{base}.{name}")]


def _check_ties(folder: Path, model: Any, stored: Stored) -> None:
    """Two matrices that config.json ties and the files hold both are alike. Raises: InputError."""
    for one, other in model.all_tied_weights_keys.items():
        pair = [stored.find(name) for name in (one, other)]
        if None in pair or pair[0] == pair[1] or len({stored.entries[str(name)]["dtype"] for name in pair}) > 1:
            continue
        first, second = (_bytes(stored, str(name)) for name in pair)
        if first != second:
            raise InputError(
                f"{folder}: config.json ties {pair[0]} and {pair[1]}, and its files hold different values for them: "
                "transformers would train both and vLLM serve one; set tie_word_embeddings to false in config.json, or "
                f"remove the {pair[0]} that is not meant"
            )


def _bytes(stored: Stored, name: str) -> list[bytes]:
    """Samples of a tensor's bytes."""
    entry, file = stored.entries[name], stored.files[name]
    begin, end = entry["data_offsets"]
    with file.open("rb") as f:
        base = 8 + int.from_bytes(f.read(8), "little")
        found = []
        for i in range(SAMPLES):
            f.seek(base + begin + i * (end - begin) // SAMPLES)
            found.append(f.read(min(SAMPLE_BYTES, (end - begin) // SAMPLES + 1)))
    return found


def _left_out(folder: Path, model: Any, stored: Stored, unknown: list[str]) -> tuple[str, ...]:
    """A note on weights that transformers leaves out on purpose."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    ignored = {name for name in stored.entries if any(re.search(pattern, name) for pattern in patterns)}
    gone = sorted(name for name in {*unknown, *ignored} if not name.endswith(BUFFERS))
    if not gone:
        return ()
    return (
        f"model {folder}: {type(model).__name__} has no place for {gone[0]}{_more(gone)}: not trained, and not in the "
        "exported folder",
    )


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "()"


def _more(found: list[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _reason(error: Exception) -> str:
    """What transformers says, in one line."""
    return printable(" ".join(str(error).split()))[:300] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' reports of what it loaded stay out of the terminal: they are read here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
