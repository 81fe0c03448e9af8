"""The sections `train` and `tracking`: every key of training, its default by method, and which keys change nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spa_ray.config.section import Section


class Lora(Section):
    """Low-rank adapters (peft)."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    quantize: Literal["nf4"] | None = Field(None, description="QLoRA: the frozen weights in 4 bits (bitsandbytes)")


TrainMethod = Literal["spa", "spa_simpo", "spa_dpo", "ipo", "orpo", "sft"]

# Where the papers are silent these are our choice (README, «What is not known»). ORPO's β is its λ. IPO's paper trains
# no language model: TRL's default τ, and DPO's learning rate.
METHOD_DEFAULTS: dict[str, dict[str, float]] = {
    "spa": {"beta": 2.5, "gamma": 1.375, "lr": 1e-6},
    "spa_simpo": {"beta": 2.5, "gamma": 1.375, "lr": 1e-6},
    "spa_dpo": {"beta": 0.1, "gamma": 0.0, "lr": 5e-7},
    "ipo": {"beta": 0.1, "gamma": 0.0, "lr": 5e-7},
    "orpo": {"beta": 0.1, "gamma": 0.0, "lr": 8e-6},
    "sft": {"beta": 0.0, "gamma": 0.0, "lr": 1e-5},
}


class Train(Section):
    """Preference training. `beta`, `gamma` and `lr` are null until `resolved()` fills them in by method."""

    method: TrainMethod = Field(
        "spa", description="weighted SimPO, SimPO, DPO, IPO, ORPO, or cross-entropy on the chosen answers"
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
    w_max: float | None = Field(None, gt=0, description="upper bound of a weight; null: none")
    drop_dead: bool = Field(False, description="leave out pairs whose gap is 0")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: by method")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warmup")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
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

    @model_validator(mode="after")
    def _beta_scales(self) -> Train:
        if self.beta == 0 and self.method != "sft":
            raise ValueError(f"beta is 0, which makes every pair alike for {self.method}; it must be above 0")
        return self

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

    def resolved(self) -> Train:
        """This section with β, γ and lr filled in by method."""
        unset = {k: v for k, v in METHOD_DEFAULTS[self.method].items() if getattr(self, k) is None}
        return self.model_copy(update=unset)


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
