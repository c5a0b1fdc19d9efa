"""The one training loop: accelerate for processes and devices; timm for optimisers, schedules, mixup and EMA.

Every random number comes from (seed, step), so a run that was killed goes on from its checkpoint to the same values,
and N processes take the same images per step as one (batch norms see each process's share alone). Rank 0 alone writes.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slim import distributed, store, surgery
from slim.contract import Context
from slim.data import Augment, Batch
from slim.errors import DivergedError, PassError, StoreError

Objective = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""`objective(model, batch)` -> named losses, scalars, each the mean over B; their sum is what is trained on. Where it
is a module, its parameters are trained along with the network's, and left behind. Where it has `leaves_unused` and that
is true, processes do not wait for gradients of every value. Where it has `before_step`, that is called with the steps
already done and all steps there will be, before each step's forward pass: what it draws by step, or raises with the
steps, goes on from a checkpoint as if nothing had happened. Where it has `after_step`, that is called with the share of
steps done, in (0, 1], once the optimiser has moved the values: the place for proximal steps. Where it has `undecayed`,
the parameters named there have no weight decay."""

TOTAL = "total"
"""Name under which the sum of the losses is kept."""
CHECKPOINT_EVERY = 200
"""Steps between checkpoints; one is also written at the end of each epoch."""


class Training(BaseModel):
    """How values are trained; every pass that trains has these fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, for one step over the whole batch."""
    optimizer: str = "adamw"
    """timm optimiser name."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of weights; biases and norms have none."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the rate rises from 0; after it falls to 0 by a cosine."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the values, which then replaces them; 0 keeps none."""
    trainable: Literal["all", "head"] = "all"
    """Which values are trained; `head` is the classifier alone, and the norms keep their statistics."""
    freeze_norms: bool = False
    """Batch norms keep their statistics and normalise by them, not by those of each batch: for few images, or folded
    norms."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward pass; `auto` takes bf16 where the device computes in it."""

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        from timm.optim import get_optimizer_info, list_optimizers

        known = list_optimizers()
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "timm.optim.list_optimizers() has them all"
            raise ValueError(f"{value!r} is not an optimiser of timm; {hint}")
        if get_optimizer_info(value).second_order:
            raise ValueError(f"{value!r} needs second derivatives, which this loop does not take; choose another")
        return value


def train(
    model: nn.Module,
    objective: Objective,
    training: Training,
    augment: Augment,
    context: Context,
    splits: Sequence[str] = ("train",),
) -> dict[str, JsonValue]:
    """Train `model` in place on the images of `splits`; it ends on the CPU.

    Zeros of the weights that this step or one before made sparse (see `Plan`) stay zeros.

    Returns:
        `loss`: mean per epoch, over all processes; `losses`: the same by name, where there are several; `steps`;
        `images`; `precision`.

    Raises:
        DivergedError: the loss is no longer a number; the last checkpoint is from before.
        PassError: the optimiser cannot be made here, or there is no classifier to train alone.
        StoreError: the checkpoint is damaged, or cannot be written.
    """
    data, backbone = context.data, context.backbone
    assert data is not None  # Pipeline.check saw to it
    assert backbone is not None  # Pass.__call__ set it
    per_epoch = data.steps(context.loading.batch_size, splits)
    total = per_epoch * training.epochs
    batch = min(context.loading.batch_size, len(data.pool(splits)))
    # Drawn from by dropout and drop path; left as the caller had it.
    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        state = _State(model, objective, training, total, batch, context)
        with context.progress(f"training {training.epochs} epochs", total) as advance:
            advance(state.step, "")
            while state.step < total:
                epoch, start = divmod(state.step, per_epoch)
                batches = data.train_batches(
                    backbone.input,
                    augment,
                    seed=context.seed,
                    epoch=epoch,
                    batch_size=context.loading.batch_size,
                    num_classes=backbone.num_classes,
                    rank=distributed.rank(),
                    world=distributed.world(),
                    start=start,
                    workers=context.loading.workers,
                    splits=splits,
                )
                _epoch(state, batches, advance, last=(epoch + 1) * per_epoch)
    means: dict[str, JsonValue] = {
        name: [round(math.fsum(values[i : i + per_epoch]) / per_epoch, 6) for i in range(0, total, per_epoch)]
        for name, values in state.losses.items()
    }
    state.finish()
    return {
        "loss": means.pop(TOTAL),
        **({"losses": means} if len(means) > 1 else {}),
        "steps": total,
        "images": total * batch,
        "precision": state.precision,
    }


def _epoch(
    state: _State,
    batches: Iterator[Batch],
    advance: Callable[..., None],
    last: int,
) -> None:
    for batch in batches:
        loss = state.advance(batch)
        advance(1, f"loss {loss:.3f}" if state.step % 5 == 0 else None)
        if state.step % CHECKPOINT_EVERY == 0 or state.step == last:
            state.keep()


def schedule_of(optimizer: torch.optim.Optimizer, total: int, warmup: float) -> Any:
    """Cosine schedule of timm over `total` steps: from 0 up to the peak in the share `warmup` of them, then to 0."""
    from timm.scheduler import CosineLRScheduler

    rising = min(round(total * warmup), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - rising,
        warmup_t=rising,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class _Learner(nn.Module):
    """The network and its objective as one module, so that gradients of both are averaged over processes."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.objective(self.model, batch)

    def no_weight_decay(self) -> set[str]:
        """What timm's optimisers leave undecayed.

        The network names such as its position embeddings, and the objective what it shrinks itself.
        """
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()  # type: ignore[operator]
        return {f"model.{name}" for name in (*names, *getattr(self.objective, "undecayed", ()))}


class _State:
    """What a step changes: values, optimiser, moving average; saved and taken up again as a whole."""

    def __init__(
        self, model: nn.Module, objective: Objective, training: Training, total: int, batch: int, context: Context
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        self.model, self.training, self.total, self.batch, self.context = model, training, total, batch, context
        self._before_step: Callable[[int, int], None] | None = getattr(objective, "before_step", None)
        self._after_step: Callable[[float], None] | None = getattr(objective, "after_step", None)
        distributed.join()
        unused = bool(getattr(objective, "leaves_unused", False))
        self.accelerator = Accelerator(
            cpu=context.device.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
        self.precision = resolve_precision(training.precision, context.device)
        self.learner = _Learner(model, objective)
        # Convolutions are faster in this layout, on CPUs and GPUs alike; `finish` puts the usual one back.
        self.learner.to(context.device).to(memory_format=torch.channels_last)
        self.learner.train()
        if training.trainable == "head":
            _hold_all_but_head(model)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if training.freeze_norms:
            for norm in norms:
                norm.eval()
        elif training.trainable == "all" and (folded := sum(map(_is_folded, norms))):
            context.log.warning(
                "training: %d of %d batch norms are folded (mean 0, variance 1, yet a bias): normalising by batches"
                " makes another network of it; add --freeze-norms",
                folded,
                len(norms),
            )
        try:
            optimizer = create_optimizer_v2(
                self.learner, opt=training.optimizer, lr=training.lr, weight_decay=training.weight_decay
            )
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise PassError(
                f"training: optimizer {training.optimizer!r} cannot be made here ({detail}); choose another"
            ) from error
        self.ema = ModelEmaV3(model, decay=training.ema) if training.ema else None
        self.wrapped, self.optimizer = self.accelerator.prepare(self.learner, optimizer)
        self.schedule = schedule_of(optimizer, total, training.warmup)
        self.step = self.saved = 0
        self.losses: dict[str, list[float]] = {TOTAL: []}
        self._kept: bytes | None = None
        self._take_up()
        # Last of all: by now every process has rank 0's values, and a checkpoint has brought its own zeros.
        self._held = _zeros_held(model, _made_sparse(context))

    def advance(self, batch: Batch) -> float:
        """One optimiser step; the loss of it, over all processes."""
        device = self.context.device
        # By step, not carried on: a run taken up from a checkpoint draws what the uninterrupted one drew.
        _seed(device, self.context.seed * 1_000_003 + self.step * 64 + distributed.rank())
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad()
        if self._before_step is not None:
            self._before_step(self.step, self.total)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            images = batch.images.to(device, non_blocking=True, memory_format=torch.channels_last)
            target = batch.target.to(device, non_blocking=True)
            named = self.wrapped(batch._replace(images=images, target=target))
        # Gradients and losses are averaged over processes, whose shares of a batch may differ by one image.
        share = len(images) * distributed.world() / self.batch
        losses = {
            TOTAL: torch.stack([*named.values()]).sum() * share,
            **{name: one * share for name, one in named.items()},
        }
        self.accelerator.backward(losses[TOTAL])
        values = self.accelerator.reduce(torch.stack([one.detach() for one in losses.values()]), "mean").tolist()
        value: float = values[0]
        if not math.isfinite(value):
            raise DivergedError(f"training: loss is {value} at step {self.step + 1} of {self.total}; {self._way_out()}")
        self._write()
        if self.training.clip:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.training.clip)
        self.optimizer.step()
        self.step += 1
        if self._after_step is not None:
            self._after_step(self.step / self.total)
        for weight, zeros in self._held:  # before the moving average, which then sees nothing else there
            weight.detach().masked_fill_(zeros, 0)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        for name, one in zip(losses, values, strict=True):
            self.losses.setdefault(name, []).append(one)
        return value

    def keep(self) -> None:
        """Take a checkpoint, if the run keeps one. It is written once the next loss has shown its values to be good."""
        if self.context.checkpoint is None or not distributed.is_main() or self.step == self.total:
            return
        buffer = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "losses": self.losses,
                "values": self.learner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema is not None else {},
            },
            buffer,
        )
        self._kept = buffer.getvalue()

    def _write(self) -> None:
        path = self.context.checkpoint
        if path is None or self._kept is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_bytes(path, hashlib.sha256(self._kept).digest() + self._kept)
        self._kept, self.saved = None, self.step

    def _take_up(self) -> None:
        path = self.context.checkpoint
        if path is None:
            return
        saved = distributed.on_main(lambda: _read_checkpoint(path) if path.exists() else None)
        if saved is None:
            return
        self.learner.load_state_dict(saved["values"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.step = self.saved = saved["step"]
        self.losses = {name: list(values) for name, values in saved["losses"].items()}
        self.context.log.info("training goes on from step %d of %d (%s)", self.step, self.total, path.name)

    def _way_out(self) -> str:
        kept = f"the last checkpoint is of step {self.saved}" if self.saved else "no checkpoint was written before"
        return f"lower --lr or --clip ({kept})"

    def finish(self) -> None:
        """Leave the plain module with its final values, on the CPU.

        Raises:
            DivergedError: they are not finite, which no later loss would have shown.
        """
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(True)
        self.model.to("cpu").to(memory_format=torch.contiguous_format)
        self.model.eval()
        # It holds the wrapped network and the optimiser in a cycle, and with them the device's memory.
        self.wrapped = self.optimizer = None
        del self.learner
        self.accelerator.free_memory()
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise DivergedError(f"training: {name!r} is not finite after step {self.total}; {self._way_out()}")


def _made_sparse(context: Context) -> set[str]:
    """State-dict keys that the plan of this step and those before list as `sparse`."""
    lists: list[Any] = [plan.get("sparse", []) for plan in (context.plan, *(step.plan for step in context.history))]
    return {key for keys in lists for key in keys}


def _zeros_held(model: nn.Module, keys: set[str]) -> list[tuple[Tensor, Tensor]]:
    """Weights among `keys` that the network still has, each with where it is zero.

    The values say it, not the plan: channels may have been cut out since, or the weight have been made anew.
    """
    return [(value, value.detach() == 0) for name, value in model.named_parameters() if name in keys]


def _is_folded(norm: nn.Module) -> bool:
    """Whether a trained norm's statistics were merged into its neighbours: a fresh one has no bias yet."""
    state = norm.state_dict()
    mean, variance, bias = (state.get(name) for name in ("running_mean", "running_var", "bias"))
    if mean is None or variance is None or bias is None:
        return False
    # Some leave the variance at 1 - eps, so that the norm divides by exactly 1; eps is 1e-3 at most in timm's networks.
    return bool((mean == 0).all() and ((variance - 1).abs() <= 1e-3).all() and (bias != 0).any())


def _hold_all_but_head(model: nn.Module) -> None:
    heads = surgery.classifiers(model)
    if not heads:
        raise PassError(
            f"training: {type(model).__name__} does not say which layer is its classifier; use trainable all"
        )
    model.requires_grad_(False).eval()
    for name in heads:
        model.get_submodule(name).requires_grad_(True).train()


def _read_checkpoint(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest, saved = content[:32], content[32:]
    # torch's reader does not compare checksums: values damaged on disk would be trained on.
    if hashlib.sha256(saved).digest() != digest:
        raise StoreError(f"{path}: not a whole checkpoint; delete it to start the step again")
    found: dict[str, Any] = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    return found


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators a training step draws from: the CPU's and the device's, no other device's."""
    torch.default_generator.manual_seed(seed % 2**63)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed % 2**63)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`bf16` or `fp32`: what `auto` means on `device`."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
