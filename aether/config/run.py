"""The run: optimizer, training, checkpoints, mesh, faults."""

from dataclasses import dataclass

from aether.config.kinds import BASE_LAYERS, BASE_WIDTH
from aether.config.section import AUTO, Section, knob
from aether.errors import InputError


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim"):
    """The optimizer, its schedule, and which parameters they treat apart."""

    name: str = knob("adamw", "adamw, or muon for matrices with AdamW for the rest", choices=("adamw", "muon"))
    learning_rate: float = knob(0.0, "peak learning rate (0: by kind and size)", low=0.0, auto=True)
    rates: str = knob(
        AUTO,
        "one learning rate, or grouped, that of ⵟ transformers: times a factor by group; for kernels of networks wider "
        "than optim.base_width times base_width / width; for those of blocks of networks deeper than optim.base_layers "
        "times the root of base_layers / layers; α in proportion to its size (auto: by kind)",
        choices=(AUTO, "one", "grouped"),
        auto=True,
    )
    base_width: int = knob(BASE_WIDTH, "width of the residual stream at which the learning rate was found", low=1)
    base_layers: int = knob(0, f"blocks at which the learning rate was found (0: {BASE_LAYERS})", low=0, auto=True)
    schedule: str = knob("cosine", "shape after warm-up", choices=("cosine", "wsd", "linear", "constant"))
    schedule_steps: int = knob(0, "steps of the whole schedule (0: train.steps)", low=0, auto=True)
    warmup_steps: int = knob(100, "steps of linear warm-up", low=0)
    decay_fraction: float = knob(0.2, "share of the schedule in which wsd decays", low=0.0, high=1.0)
    final_fraction: float = knob(0.1, "last learning rate / peak", low=0.0, high=1.0)
    beta1: float = knob(0.9, "decay of the first moment", low=0.0, high=0.99999)
    beta2: float = knob(0.99, "decay of the second moment", low=0.0, high=0.99999)
    eps: float = knob(1e-8, "added to the root of the second moment", low=1e-30)
    weight_decay: float = knob(0.1, "decoupled decay, times the learning rate", low=0.0)
    no_decay: str = knob(
        r"bias|alpha|epsilon|scale",
        "regular expression over parameter paths that are never decayed (vectors never are)",
    )
    rkhs_decay: float = knob(
        0.0, "decoupled decay of the mean squared RKHS norm of each layer's ⵟ units, times the learning rate", low=0.0
    )
    lr_scale: dict[str, float] = knob(
        {}, "learning rate multiplier, regular expression over paths -> factor (first match)"
    )
    hold_norm: str = knob(
        "",
        "regular expression over parameter paths of matrices whose columns keep the norms that they start with "
        "(empty: none)",
    )
    clip: float = knob(1.0, "largest global gradient norm (0: no clipping)", low=0.0)
    momentum: float = knob(0.95, "momentum of muon", low=0.0, high=0.9999)
    no_muon: str = knob(
        AUTO,
        "regular expression over parameter paths that muon leaves to AdamW (empty: none; auto: the prototypes of a "
        "transformer's ⵟ units, queries and keys of ⵟ-attention)",
        auto=True,
    )


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train"):
    """The run: how long, how the loss is formed, and what is shown on the way."""

    steps: int = knob(1000, "updates to make", low=1, free=True)
    seed: int = knob(0, "seed of initialisation, data order and dropout", low=0, high=2**31 - 1)
    log_every: int = knob(1, "steps between train lines", low=1, free=True)
    eval_every: int = knob(250, "steps between evaluations (0: only at the end)", low=0, free=True)
    eval_batches: int = knob(0, "batches of each validation set (0: all of it)", low=0, free=True)
    sample_prompt: str = knob("", "how the text sample at each evaluation begins", free=True)
    sample_tokens: int = knob(128, "length of that sample (0: none)", low=0, free=True)
    accumulate: int = knob(1, "microbatches a step is split into", low=1)
    loss_chunk: int = knob(128, "positions of a sequence whose logits exist at one time", low=1)
    z_loss: float = knob(0.0, "weight of log(Z)^2", low=0.0)
    ema: float = knob(
        0.0, "decay of the averaged parameters, which evaluation then uses (0: none)", low=0.0, high=0.999999
    )
    max_skipped: int = knob(10, "non-finite steps in a row (each skipped) that end the run", low=1, free=True)
    init_from: str = knob("", "DIR or DIR@STEP: start from that run's parameters")
    profile_steps: str = knob("", "a:b writes a profiler trace of steps a+1 to b", free=True)
    explain: str = knob(
        "",
        "parts of launch.explain that report.html has at the end of a run of one process, as in capacity,prototypes",
        free=True,
    )
    telemetry_every: int = knob(
        0, "steps between looks at what the ⵟ units do, for telemetry.jsonl (0: none)", low=0, free=True
    )
    telemetry_rows: int = knob(
        4, "rows of the batch that a look takes, at least one of each device's", low=1, free=True
    )
    wandb: str = knob("", "Weights & Biases project to log to (empty: none)", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.profile_span()

    def profile_span(self) -> range:
        """Return the steps (counted from 0) that `profile_steps` names."""
        first, _, last = self.profile_steps.partition(":")
        if not self.profile_steps:
            return range(0)
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(f"train.profile_steps is {self.profile_steps!r}; write two whole numbers as in 10:20.")
        return range(int(first), int(last))


@dataclass(frozen=True)
class CheckpointConfig(Section, prefix="checkpoint"):
    """When to save, and what to keep."""

    every: int = knob(500, "steps between checkpoints (0: only at the end or when stopped)", low=0, free=True)
    keep_last: int = knob(2, "newest checkpoints kept", low=1, free=True)
    keep_best: int = knob(1, "checkpoints with the lowest validation loss kept", low=0, free=True)
    keep_every: int = knob(0, "checkpoints at multiples of this step are kept for good (0: none)", low=0, free=True)


@dataclass(frozen=True)
class MeshConfig(Section, prefix="mesh"):
    """How many devices along each axis, within a slice (ICI) and across slices (DCN); -1 takes what is left."""

    data: int = knob(-1, "replicas, each with its share of the batch", low=-1, free=True)
    fsdp: int = knob(1, "like data, and parameters are split over it", low=-1, free=True)
    tensor: int = knob(1, "heads, hidden units, channels and vocabulary are split over it", low=-1, free=True)
    sequence: int = knob(1, "positions of each sequence are split over it", low=-1, free=True)
    dcn_data: int = knob(-1, "slices along data", low=-1, free=True)
    dcn_fsdp: int = knob(1, "slices along fsdp", low=-1, free=True)
    dcn_tensor: int = knob(1, "slices along tensor", low=-1, free=True)
    dcn_sequence: int = knob(1, "slices along sequence", low=-1, free=True)
    rules: dict[str, str] = knob(
        {}, "logical axis -> mesh axes (comma-separated, or none) in place of the built-in table", free=True
    )
    max_replicated: int = knob(
        64,
        "MiB of the largest array that may lie whole on every device where fsdp or tensor split others",
        low=0,
        free=True,
    )


@dataclass(frozen=True)
class FaultsConfig(Section, prefix="faults"):
    """What may go wrong in a run, when it counts as such, and what is done then."""

    start_timeout_seconds: int = knob(300, "how long processes wait for each other at the start", low=1, free=True)
    heartbeat_timeout_seconds: int = knob(100, "silence after which a process counts as lost", low=2, free=True)
    watchdog_factor: float = knob(20.0, "report a hang after this many median steps (0: never)", low=0.0, free=True)
    watchdog_seconds: float = knob(120.0, "but not before this many seconds", low=0.1, free=True)
    record_steps: int = knob(100, "steps that the flight recorder holds", low=1, high=100000, free=True)
    spike_sigma: float = knob(0.0, "standard deviations above its window that make a loss a spike (0: none)", low=0.0)
    spike_window: int = knob(100, "steps in that window", low=2, high=100000)
    spike_action: str = knob(
        "skip",
        "skip the update, or go back to a checkpoint and leave out the batches since",
        choices=("skip", "rewind"),
    )
    max_rewinds: int = knob(3, "rewinds that end the run", low=1, free=True)
