"""The sections `train` and `tracking`: the keys of training, and which of them change nothing.

A method's own keys and defaults are in its `Config`, beside it in `spa_ray.methods`; `train.method` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from spa_ray.config.plugs import METHODS, load_plug
from spa_ray.config.section import Section
from spa_ray.errors import InputError


class Lora(Section):
    """Low-rank adapters (peft)."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    quantize: Literal["nf4"] | None = Field(None, description="QLoRA: the frozen weights in 4 bits (bitsandbytes)")


ADAM = (0.9, 0.999)
Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Decay, Decay]
DEFAULT_METHOD = next(iter(METHODS))
WHERE = "train.method"
BY_METHOD = ("beta", "gamma", "lr")  # null: the method's own default


class Train(Section):
    """The keys that every method knows; a method gives β, γ and lr their defaults, and may add keys of its own."""

    method: str = Field(
        DEFAULT_METHOD,
        validate_default=False,
        description=f"{', '.join(METHODS)}, or a method of your own as `package.module:Name` (docs/METHODS.md)",
    )
    beta: float | None = Field(None, ge=0, description="null: by method; also IPO's τ and ORPO's λ, as in TRL")
    gamma: float | None = Field(
        None,
        description="Eq. 3's γ itself, which is TRL's simpo_gamma; from SimPO's gamma_beta_ratio: γ = ratio · β"
        " (`spa_ray.training.losses.gamma_from_ratio`)",
    )
    alpha: float = Field(1.0, ge=0, description="exponent of the pair weight; 0 is plain SimPO")
    gap: Literal["abs_sum", "l1", "primary"] = Field(
        "abs_sum", description="what a pair is weighted by: Eq. 3's Δ, Eq. 2's margin, the first objective alone"
    )
    uncertainty: Literal["none", "draws"] = Field(
        "none",
        description="draws: the gap times the reliability of the scores that decide the pair, d² / (d² + se²), by the"
        " variance over scoring.draws (not in the paper)",
    )
    w_max: float | None = Field(None, gt=0, description="upper bound of a weight; null: none")
    drop_dead: bool = Field(False, description="leave out pairs whose gap is 0")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: by method")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warmup")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: Betas = Field(ADAM, description="AdamW's decay of the gradient's mean and of its square")
    grad_clip: float | None = Field(1.0, gt=0, description="global norm; null: none")
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="exactly N optimizer steps, whatever `epochs` says")
    max_pairs: int | None = Field(None, ge=1, description="a seeded subset of N pairs, for size-matched comparisons")
    shuffle_labels: bool = Field(False, description="control: swap chosen and rejected by a seeded fair coin")
    batch_size: int = Field(32, ge=1, description="pairs in an optimizer step, over all ranks")
    order: Literal["prompts", "pairs"] = Field(
        "pairs",
        description="what an epoch shuffles: pairs alone; or prompts, each with all its pairs, which share their "
        "sequences within a step: that takes a third to a fifth of the time and teaches less (docs/RESULTS.md)",
    )
    gap_mean: Literal["step", "epoch"] = Field(
        "step", description="the mean gap that weights are relative to: an optimizer step's or all pairs'"
    )
    micro_batch_tokens: int | None = Field(None, ge=1, description="tokens in a micro-batch; null: 8 × max_length")
    packing: bool | None = Field(
        None, description="sequences one after the other, no padding; null: where the model's attention allows it"
    )
    logits_mib: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="float32 logits held at once, MiB; auto: 128 on processors, 512 on GPUs; null: a micro-batch's, "
        "by the model's own head",
    )
    max_length: int = Field(2048, ge=2, description="prompt + response; longer pairs are dropped and counted")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of the forward; losses are float32 or better"
    )
    lora: Lora | None = Field(None, description="null trains every weight")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO")
    offload: bool = Field(False, description="optimizer state in CPU memory")
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute activations in the backward pass; null: where a step would not fit into the GPU without",
    )
    liger: bool = Field(False, description="Liger's GPU kernels for norms, rotary embedding and MLP")
    save_every_steps: int | None = Field(None, ge=1, description="checkpoint; null: none in the middle")
    save_every_minutes: float | None = Field(None, gt=0, description="checkpoint by the clock as well; null: not")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones")
    collapse_nats: float | None = Field(
        0.7, gt=0, description="alarm when the chosen answers' log-prob a token has fallen this far; null: none"
    )
    on_collapse: Literal["warn", "stop"] = Field("warn", description="what the alarm does")

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        unset = {key for key in BY_METHOD if given.get(key) is None and cls.model_fields[key].default is not None}
        return {key: value for key, value in given.items() if key not in unset}

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            method_class(name)
        except InputError as e:
            raise ValueError(str(e).removeprefix(f"{WHERE}: ")) from e
        return name

    @model_validator(mode="after")
    def _quantized_weights_are_not_partitioned(self) -> Train:
        if self.zero_stage == 3 and self.lora is not None and self.lora.quantize is not None:
            raise ValueError("lora.quantize does not go with zero_stage 3; use zero_stage 2 or lora.quantize null")
        return self

    @property
    def micro_batch_limit(self) -> int:
        """Tokens in a micro-batch, padding included where there is any."""
        return self.micro_batch_tokens or 8 * self.max_length

    def identity(self) -> Train:
        """This section as hashes see it: a checkpointing that is decided by the device is no setting of its own."""
        return self.model_copy(update={"gradient_checkpointing": bool(self.gradient_checkpointing)})

    def identified_by(self) -> set[str]:
        """The keys that hashes cover: those that decide a result, but for later ones that say what was always done."""
        as_before = {"uncertainty": self.uncertainty == "none", "adam_betas": self.adam_betas == ADAM}
        return set(type(self).model_fields) - TRAIN_BYSTANDERS - {key for key, same in as_before.items() if same}


def method_class(name: str) -> Any:
    """The class of a training method (`spa_ray.training.method.Method`).

    Raises: InputError for an unknown name, and for an object that is no method.
    """
    found = load_plug(METHODS, name, where=WHERE)
    section = getattr(found, "Config", None)
    if not (isinstance(section, type) and issubclass(section, Train)):
        raise InputError(f"{WHERE}: {name!r} is no method; derive it from spa_ray.Method (docs/METHODS.md)")
    return found


def train_section(given: Any) -> Any:
    """The `train` section of a config as its method's own `Config`; anything but a mapping as it is.

    Raises: pydantic's ValidationError.
    """
    if not isinstance(given, Mapping):
        return given
    name = given.get("method", DEFAULT_METHOD)
    try:
        section = method_class(name).Config if isinstance(name, str) else Train
    except InputError:
        section = Train  # which says what is wrong with the name
    found = section.model_validate(given)
    if found.lr is None:
        raise ValueError(f"lr: {found.method} has no default; give a peak learning rate")
    return found


TrainSection = Annotated[SerializeAsAny[Train], BeforeValidator(train_section)]

# Keys of `train` that decide how a run is kept and watched, never what comes out: no part of a hash.
TRAIN_BYSTANDERS = frozenset(
    {"save_every_steps", "save_every_minutes", "keep_checkpoints", "collapse_nats", "on_collapse"}
)

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class Tracking(Section):
    """Where each training step's numbers go besides `train_log.jsonl`. Never part of a stage's hash."""

    backends: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="TensorBoard's files lie in the job's work folder; [] for none"
    )
    project: str = Field("spa-ray", min_length=1, description="of Weights & Biases; the experiment of MLflow")
