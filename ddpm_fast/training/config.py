"""What a training run is made of: dataclasses, and the JSON that is kept with each run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any, Literal

from ..nn import UNetConfig
from ..schedule import NoiseSchedule, Prediction, Variance
from .fields import ConfigError, NewerFormatError, differences, read

FORMAT, FORMAT_VERSION = "ddpm_fast run", 1
# Changing these changes nothing of what is computed, or roundings alone; steps may only grow. That
# another data.path has the same images is looked at when they are opened.
CHANGEABLE = (
    "output.",
    "data.path",
    "data.workers",
    "data.on_bad_image",
    "grad_accum",
    "activation_checkpointing",
)
_WITH_BETA_BOUNDS = ("linear", "scaled_linear", "quadratic", "sigmoid")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        path: "digits", or a folder of images.
        flip: mirror half of the samples left to right.
        on_bad_image: "raise" stops at an image that cannot be read, "skip" takes another for it.
        workers: processes that read ahead; 0 reads in the training process.
    """

    path: str
    flip: bool = False
    on_bad_image: Literal["raise", "skip"] = "raise"
    workers: int = 0

    def __post_init__(self) -> None:
        _at_least(0, workers=self.workers)


@dataclass(frozen=True)
class ScheduleConfig:
    """A named :class:`~ddpm_fast.NoiseSchedule`.

    Attributes:
        name: the constructor's.
        num_steps: T.
        beta_start, beta_end: of "linear", "scaled_linear", "quadratic" and "sigmoid"; None takes
            the constructor's own.
        zero_terminal_snr: shifted and scaled so that the last ᾱ is 0.
    """

    name: Literal[
        "linear", "scaled_linear", "quadratic", "sigmoid", "cosine", "constant", "jsd"
    ] = "linear"
    num_steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> NoiseSchedule:
        """The schedule.

        >>> ScheduleConfig("cosine", 4000).build()
        NoiseSchedule(num_steps=4000, terminal_snr=1.52e-10)
        """
        bounds = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        given = {name: value for name, value in bounds.items() if value is not None}
        if given and self.name not in _WITH_BETA_BOUNDS:
            raise ValueError(f"{next(iter(given))} is not of the {self.name} schedule")
        schedule: NoiseSchedule = getattr(NoiseSchedule, self.name)(self.num_steps, **given)
        return schedule.rescale_zero_terminal_snr() if self.zero_terminal_snr else schedule


@dataclass(frozen=True)
class LossConfig:
    """The arguments of :class:`~ddpm_fast.loss.DenoisingLoss`.

    label_dropout: the share of labels replaced by the null class, for guidance; it takes the place
    of the UNet's own, whose draws are no function of the sample.
    """

    prediction: Prediction = "epsilon"
    variance: Variance = "fixed_large"
    objective: Literal["simple", "vlb", "hybrid"] = "simple"
    weighting: Literal["min_snr", "p2"] | None = None
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    vlb_weight: float = 0.001
    timestep_sampling: Literal["uniform", "antithetic", "loss_second_moment"] = "uniform"
    offset_noise: float = 0.0
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1); got {self.label_dropout}")
        if self.objective == "hybrid" and not self.learns_variance:
            raise ValueError(
                f"objective 'hybrid' needs variance 'learned' or 'learned_range'; got "
                f"{self.variance!r}"
            )

    @property
    def learns_variance(self) -> bool:
        return self.variance in ("learned", "learned_range")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, its learning rate raised linearly over the first steps.

    Attributes:
        name: "adam", or "adamw" with decoupled weight decay.
        learning_rate: after ``warmup_steps``.
        betas, eps, weight_decay: of the optimiser.
        clip_norm: the largest norm of the gradient, over all parameters; None lets it be.
    """

    name: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 5000
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _at_least(0, warmup_steps=self.warmup_steps)
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1); got {list(self.betas)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or null; got {self.clip_norm}")

    def learning_rate_at(self, step: int) -> float:
        """Of the step that is number ``step``, counted from 1."""
        return self.learning_rate * min(1.0, step / max(1, self.warmup_steps))


@dataclass(frozen=True)
class OutputConfig:
    """What is kept of a run; it changes nothing of the weights.

    Attributes:
        checkpoint_every, keep: steps between checkpoints, and how many stay; 0 keeps all.
        log_every: steps between lines of log.jsonl.
        sample_every: steps between grids of samples; 0 draws none.
        num_samples, sampling_steps: of a grid, by DDIM.
        tensorboard: write its event files too, where it is installed.
    """

    checkpoint_every: int = 5000
    keep: int = 3
    log_every: int = 50
    sample_every: int = 5000
    num_samples: int = 64
    sampling_steps: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least(0, keep=self.keep, sample_every=self.sample_every)
        _at_least(
            1,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            num_samples=self.num_samples,
            sampling_steps=self.sampling_steps,
        )


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Without more than the data it is Ho et al. 2020's recipe for CIFAR-10.

    Attributes:
        batch_size: samples a step, over all processes and accumulated parts.
        grad_accum: in how many parts a process goes through its share of a batch.
        steps: of the optimiser, in all.
        seed: of the initial weights, the data's order, the noise and all else that is drawn.
        ema_rates: of the averages of the weights; the first is the one to sample with.
        precision: of the model's arithmetic; weights and statistics are float32.
        activation_checkpointing: compute the blocks again in the backward pass, to save memory.

    >>> config = RunConfig.from_json('{"data": {"path": "digits"}, "steps": 10}')
    >>> RunConfig.from_json(config.to_json()) == config
    True
    """

    data: DataConfig
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(label_dropout=0.0))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_rates: tuple[float, ...] = (0.9999,)
    batch_size: int = 128
    grad_accum: int = 1
    steps: int = 800_000
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        for rate in self.ema_rates:
            if not isinstance(rate, Real):
                raise TypeError(f"ema_rates must be of numbers; got {rate!r}")
        # A checkpoint names its averages by them: 0 and NumPy's numbers have other names.
        object.__setattr__(self, "ema_rates", tuple(map(float, self.ema_rates)))
        _at_least(1, batch_size=self.batch_size, grad_accum=self.grad_accum, steps=self.steps)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must lie in [0, 2^64); got {self.seed}")
        if self.batch_size % self.grad_accum:
            raise ValueError(
                f"batch_size must be a multiple of grad_accum ({self.grad_accum}); got "
                f"{self.batch_size}"
            )
        if any(not 0 <= rate < 1 for rate in self.ema_rates) or len(set(self.ema_rates)) != len(
            self.ema_rates
        ):
            raise ValueError(f"ema_rates must differ and lie in [0, 1); got {list(self.ema_rates)}")
        outputs = (1 + self.loss.learns_variance) * self.unet.in_channels
        if (self.unet.out_channels or self.unet.in_channels) != outputs:
            raise ValueError(
                f"unet.out_channels must be {outputs} for loss.variance {self.loss.variance!r} and "
                f"{self.unet.in_channels} channels; got {self.unet.out_channels}"
            )
        if self.unet.num_classes and not self.unet.null_class and self.loss.label_dropout:
            raise ValueError(
                f"loss.label_dropout must be 0 for a unet without a null class; got "
                f"{self.loss.label_dropout}"
            )
        # Labels are dropped by the loss, by the sample's id.
        object.__setattr__(self, "unet", replace(self.unet, label_dropout=0.0))

    def build_schedule(self) -> NoiseSchedule:
        """The forward process.

        >>> len(RunConfig(DataConfig("digits")).build_schedule())
        1000
        """
        return self.schedule.build()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the format's name and version."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **described}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """What :meth:`to_dict` gave, or a part of it.

        Raises:
            ConfigError: which field is unknown, missing, or of which type or range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a config is an object {{…}}; got {type(values).__name__}")
        values = dict(values)
        kind, version = values.pop("format", FORMAT), values.pop("format_version", FORMAT_VERSION)
        if kind == FORMAT and isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"format_version is {version}; this ddpm_fast reads version {FORMAT_VERSION}: take "
                "a later one"
            )
        if kind != FORMAT or version != FORMAT_VERSION:
            raise ConfigError(
                f"format must be {FORMAT!r}, version {FORMAT_VERSION}; got {kind!r}, {version!r}"
            )
        return read(cls, values)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """:meth:`from_dict` of JSON text; ConfigError too where that is no JSON."""
        return cls.from_dict(parse_json(text))

    def changes(self, other: RunConfig) -> list[str]:
        """What of ``other`` would compute something else, each as "field: ours → theirs"."""
        ours, theirs = self.to_dict(), other.to_dict()
        found = [
            f"{name}: {json.dumps(a)} → {json.dumps(b)}"
            for name, a, b in differences(ours, theirs)
            if name != "steps" and not name.startswith(CHANGEABLE)
        ]
        if other.steps < self.steps:
            found.append(f"steps: {self.steps} → {other.steps} (they may only grow)")
        return found


def parse_json(text: str) -> Any:
    """JSON without NaN and infinities.

    Raises:
        ConfigError: where it ends to be JSON.
    """

    def refuse(constant: str) -> None:
        raise ConfigError(f"not a finite number: {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a number, or nesting, without end
        raise ConfigError(f"not JSON (cut short?): {error}") from error


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
        if value >= 1 << 63:
            raise ValueError(f"{name} must be below 2^63; got {value}")
