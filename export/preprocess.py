"""From an image file to the network's input: as explicit steps, and, where that is asked for, within the graph."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from slim.artifact import Preprocessing
from slim.errors import StoreError, UsageError
from slim.export.onnx import OnnxFile, Port, reason
from slim.store import write_bytes

MODES = {1: "L", 3: "RGB"}
"""Channels -> Pillow's image mode."""

BYTES = "image_u8"
"""Name of the input of a graph that preprocesses."""

OWN = "slim/preprocess"
"""Beginning of the names of what is put in front."""


def explicit_steps(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    """Every step from an image file to the input tensor, in order; sizes are (height, width) in pixels.

    The same arithmetic as timm's evaluation transform with a centre crop: a square input resizes the short side to
    floor(size / crop) and cuts the long side down to whole pixels; any other resizes until both sides are covered, and
    rounds.

    Raises:
        UsageError: neither 1 nor 3 channels.
    """
    channels, height, width = preprocessing.size
    if channels not in MODES:
        raise UsageError(f"bundle: an input of {channels} channels is not an image file's; 1 or 3 are")
    target = [math.floor(side / preprocessing.crop) for side in (height, width)]
    size = {"short_side": target[0]} if height == width else {"cover": target}
    return [
        {"op": "convert", "mode": MODES[channels]},
        {"op": "resize", **size, "interpolation": preprocessing.interpolation},
        {"op": "center_crop", "size": [height, width]},
        {"op": "divide", "by": 255},
        {"op": "normalize", "mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        {"op": "layout", "order": "NCHW", "dtype": "float32"},
    ]


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, C, H, W) float32 of `pixels` (B, H, W, C) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels.permute(0, 3, 1, 2).float().div(255) - mean) / std


def pixels_of(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, H, W, C) uint8 whose `normalised` are `images` (B, C, H, W) float32."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    values = (images.double() * std + mean) * 255
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def with_preprocessing(file: OnnxFile, preprocessing: Preprocessing, path: Path) -> OnnxFile:
    """`file` at `path` with the arithmetic of `preprocessing` in front: input `image_u8` (batch, H, W, C) uint8.

    Resizing and cropping stay outside. Cast, one Mul, one Add and a Transpose give what the graph took before, under
    its name, to the last bit or two: files in INT8 and half precision are as welcome, but a byte that lies half-way
    between two levels of INT8 may fall on the other one. TensorRT takes uint8 inputs that are cast at once.

    Raises:
        UsageError: the file's input is not of the size of `preprocessing`, or is not float32.
        StoreError: the file cannot be read, or `path` not be written.
    """
    (source,) = file.inputs
    if source.dtype != "float32" or source.shape[1:] != preprocessing.size:
        raise UsageError(
            f"{file.path}: takes {source.dtype} {source.shape[1:]}, the preprocessing gives float32 "
            f"{preprocessing.size}; give a file that was exported with it"
        )
    try:
        proto = onnx.load(file.path, load_external_data=False)
    except Exception as error:  # protobuf's own exceptions, and the system's
        raise StoreError(f"{file.path}: not a whole ONNX file ({reason(error)}); export it again") from error
    graph, (channels, height, width) = proto.graph, preprocessing.size
    mean, std = (np.array(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
    folded = {"scale": 1 / (255 * std), "shift": -mean / std}
    nodes = [
        helper.make_node("Cast", [BYTES], [f"{OWN}/cast"], name=f"{OWN}/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{OWN}/cast", f"{OWN}/scale"], [f"{OWN}/mul"], name=f"{OWN}/Mul"),
        helper.make_node("Add", [f"{OWN}/mul", f"{OWN}/shift"], [f"{OWN}/add"], name=f"{OWN}/Add"),
        helper.make_node("Transpose", [f"{OWN}/add"], [source.name], name=f"{OWN}/Transpose", perm=[0, 3, 1, 2]),
    ]
    shape = (source.shape[0], height, width, channels)
    behind = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *behind])
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(BYTES, TensorProto.UINT8, shape))
    graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), f"{OWN}/{name}") for name, values in folded.items()
    )
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString(deterministic=True)
    write_bytes(path, data)
    return replace(
        file,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        inputs=(Port(BYTES, "uint8", shape),),
        nodes=len(graph.node),
        scopes={**{node.name: "" for node in nodes}, **file.scopes},
        parity=None,
    )
