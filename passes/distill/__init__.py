"""Distillation: one pass, whose methods are small objectives that share one contract (method.py)."""

from slim.passes.distill.distill import Distill as Distill
