"""Structured pruning: channels, hidden units and attention heads that really disappear."""

from slim.passes.prune.prune import Prune as Prune
