"""torch-pruning's own GroupNormPruner on the same images and steps, to stand beside sparsify > prune > recover.

As its authors use it (Fang et al. 2023): its regulariser is added to the gradients while the network trains, then it
cuts step by step, all groups ranked together, and the rest trains on. Optimiser, schedule, batches and augmentation are
those of slim's own arms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from timm.optim import create_optimizer_v2
from torch import nn

from slim import costs, surgery
from slim.contract import Context
from slim.passes.finetune import Finetune
from slim.training import schedule_of

REGULARISATION = 5e-4
"""Of the published runs."""
CUTS = 400
"""Steps in which all would be cut, as published."""


def sparsify_and_prune(
    dense: nn.Module,
    settings: Finetune,
    context: Context,
    *,
    sparse_epochs: int,
    fits: Callable[[nn.Module], bool],
) -> nn.Module:
    """The network after both trainings, the first network of the cutting that `fits`."""
    assert context.backbone is not None
    model = copy.deepcopy(dense)
    images = torch.randn(1, *context.backbone.input.size)
    heads = [model.get_submodule(name) for name in surgery.classifiers(model)]
    pruner: Any = tp.pruner.GroupNormPruner(
        model.requires_grad_(True),
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        reg=REGULARISATION,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=CUTS,
        round_to=8,
        ignored_layers=heads,
        unwrapped_parameters=[],
        pruning_ratio_dict={},
    )
    pruner.update_regularizer()
    train(model, settings.model_copy(update={"epochs": sparse_epochs}), context, lambda: pruner.regularize(model))
    for _ in range(CUTS):
        if fits(model):
            break
        pruner.step()
    train(model, settings, context, lambda: None)
    return model


def train(model: nn.Module, settings: Finetune, context: Context, after_backward: Callable[[], None]) -> None:
    """Cross-entropy, with a word in between gradients and step."""
    data, backbone = context.data, context.backbone
    assert data is not None
    assert backbone is not None
    model.train().requires_grad_(True)
    per_epoch = data.steps(context.loading.batch_size)
    total = per_epoch * settings.epochs
    optimizer = create_optimizer_v2(model, opt=settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = schedule_of(optimizer, total, settings.warmup)
    step = 0
    with context.progress(f"training {settings.epochs} epochs", total) as advance:
        for epoch in range(settings.epochs):
            batches = data.train_batches(
                backbone.input,
                settings,
                seed=context.seed,
                epoch=epoch,
                batch_size=context.loading.batch_size,
                num_classes=backbone.num_classes,
            )
            for batch in batches:
                schedule.step_update(step)
                optimizer.zero_grad()
                F.cross_entropy(model(batch.images).float(), batch.target).backward()
                after_backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                step += 1
                advance(1)
    model.eval()


def share_of_macs(model: nn.Module, dense: nn.Module, size: tuple[int, int, int]) -> float:
    """Multiply-accumulates over those of the dense network."""
    return costs.count_macs(model, size) / costs.count_macs(dense, size)
