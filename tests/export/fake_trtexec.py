"""Plays `trtexec` where there is no GPU: refuses what the real one refuses, writes what it writes, takes no time.

Flags, defaults, log lines, the JSON and the plan's header are facts of github.com/NVIDIA/TensorRT, samples/common. Each
list is the one of the first release of its major (10.3 is the first slim supports, 11.0), whose flags all later ones
take. What it knows of speed is made up: the times show which settings were in force and nothing else.
"""

from __future__ import annotations

import json
import random
import re
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

BOTH = """allocationStrategy allowGPUFallback allowWeightStreaming avgRuns avgTiming buildDLAStandalone
builderOptimizationLevel consistency device directIO dumpLayerInfo dumpOptimizationProfile dumpOutput dumpProfile
dumpRawBindingsToFile dumpRefit duration dynamicPlugins errorOnTimingCacheMiss excludeLeanRuntime exportLayerInfo
exportOutput exportProfile exportTimes exposeDMA getPlanVersionOnly hardwareCompatibilityLevel idleTime
ignoreParsedPluginLibs infStreams inputIOFormats iterations layerDeviceTypes leanDLLPath loadEngine loadInputs markDebug
maxAuxStreams maxShapes memPoolSize minShapes noBuilderCache noCompilationCache noDataTransfers noTF32 onnx optShapes
outputIOFormats percentile persistentCacheRatio pi pluginInstanceNorm plugins preview profile profilingVerbosity refit
runtimePlatform safe saveDebugTensors saveEngine separateProfileRun setPluginsToSerialize shapes skipInference sleepTime
sparsity staticPlugins streams stripAllWeights stripWeights stronglyTyped tacticSources tempdir tempfileControls threads
timeDeserialize timeRefit timingCacheFile useCudaGraph useDLACore useManagedMemory useProfile useRuntime useSpinWait vc
verbose versionCompatible warmUp weightStreamingBudget"""

ONLY = {
    10: """best bf16 calib calibProfile fp16 fp8 int4 int8 layerOutputTypes layerPrecisions maxShapesCalib
    minShapesCalib optShapesCalib precisionConstraints restricted weightless""",
    11: """adjustForDLA asyncFileReader cpuOnly decomposableAttentions distributiveIndependence dumpKernelText
    enablePluginOverride includeDataTransfers l2LimitForTiling markUnfusedTensorsAsDebugTensors maxTactics
    monitorMemory noCudaGraph noSpinWait refitFromOnnx remoteAutoTuningConfig reportCapabilityDLA safetyPlugins
    saveAllDebugTensors tilingOptimizationLevel uint8AsymmetricQuantizationDLA""",
}

Flags = dict[str, str]
Shape = tuple[int, ...]


class RefusedError(Exception):
    """What the real one prints before it fails."""


def accepted(major: int) -> frozenset[str]:
    """Flags that this major version takes."""
    return frozenset(f"{BOTH} {ONLY[major]}".split())


def parse(major: int, words: Sequence[str]) -> Flags:
    """Flag -> value. A flag given twice is taken once; the other stays behind, unknown."""
    flags: Flags = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name.startswith("--") or name[2:] not in accepted(major) or name[2:] in flags:
            raise RefusedError(f"Unknown option: {name} {value}")
        flags[name[2:]] = value
    return flags


def in_force(major: int, words: Sequence[str]) -> dict[str, bool | float]:
    """What these words of a command line mean to this major version."""
    flags = parse(major, words)
    if major == 10:
        switched = {
            "transfers": "noDataTransfers" not in flags,
            "cuda_graph": "useCudaGraph" in flags,
            "spin_wait": "useSpinWait" in flags,
            "separate_profile": "separateProfileRun" in flags,
        }
    else:  # the four flags of 10 are taken, warned about, and do nothing
        switched = {
            "transfers": "includeDataTransfers" in flags,
            "cuda_graph": "noCudaGraph" not in flags,
            "spin_wait": "noSpinWait" not in flags,
            "separate_profile": True,
        }
    numbers = {"warm_up_ms": ("warmUp", 200.0), "duration_s": ("duration", 3.0), "iterations": ("iterations", 10.0)}
    return switched | {name: float(flags.get(flag, default)) for name, (flag, default) in numbers.items()}


def shapes_of(text: str) -> dict[str, Shape]:
    """`image:1x3x224x224,mask:1x1` as shapes by name."""
    pairs = [part.rpartition(":") for part in text.split(",") if part]
    if any(not re.fullmatch(r"\d+(x\d+)*", dims) or not name for name, _, dims in pairs):
        raise RefusedError("failed to parse minShapes/optShapes/maxShapes. Please double check your input string.")
    return {name: tuple(map(int, dims.split("x"))) for name, _, dims in pairs}


def build(version: tuple[int, ...], flags: Flags) -> None:
    """Write the plan: the header real ones have, then what the timing run must know."""
    if flags.get("profilingVerbosity", "none") not in ("none", "layer_names_only", "detailed", "default", "verbose"):
        raise RefusedError(f"Unknown profilingVerbosity: {flags['profilingVerbosity']}")
    import onnx  # slow, and needed here alone

    graph = onnx.load(flags["onnx"]).graph
    inputs = {port.name: tuple(d.dim_value for d in port.type.tensor_type.shape.dim) for port in graph.input}
    asked = [shapes_of(flags.get(f"{word}Shapes", "")) for word in ("min", "opt", "max")]
    if not any(0 in shape for shape in inputs.values()):
        if any(asked):
            raise RefusedError("Static model does not take explicit shapes")
        asked = [inputs] * 3
    low, _usual, high = [{name: profile[name] for name in inputs} for profile in asked]
    typed = version[0] > 10 or "stronglyTyped" in flags
    layers = [node.name or node.op_type for node in graph.node]
    header = struct.pack("<4sI16x4B", b"ftrt", 0, *(part % 256 for part in (*version, 0)[:4]))
    Path(flags["saveEngine"]).write_bytes(
        header + json.dumps({"typed": typed, "low": low, "high": high, "layers": layers}).encode()
    )
    if "timingCacheFile" in flags:
        Path(flags["timingCacheFile"]).write_bytes(b"tactics")


def load(version: tuple[int, ...], flags: Flags) -> tuple[int, list[str]]:
    """Images in one call and the layers of the engine, or the refusal of a plan that is not this version's."""
    plan = Path(flags["loadEngine"]).read_bytes()
    if plan[:4] != b"ftrt" or plan[24:27] != bytes(version[:3]):
        raise RefusedError("The engine plan file is not compatible with this version of TensorRT, please rebuild.")
    known = json.loads(plan[28:])
    given = shapes_of(flags.get("shapes", ""))
    images = []
    for name, low in known["low"].items():
        # Nobody said how many: the real one warns, and takes 1 for each free dimension.
        shape = given.get(name, tuple(low) if low == known["high"][name] else (1, *low[1:]))
        if not all(a <= b <= c for a, b, c in zip(low, shape, known["high"][name], strict=True)):
            raise RefusedError(f"Set dimension {shape} for tensor {name} does not satisfy any optimization profiles.")
        images.append(shape[0])
    return images[0], known["layers"]


def calls(meaning: dict[str, bool | float], images: int) -> list[list[float]]:
    """Made-up calls after the warm-up: begin and end on the host, and milliseconds to, on and from the device."""
    noise, clock_ms = random.Random(images), 0.0
    made: list[list[float]] = []
    while clock_ms < meaning["warm_up_ms"] + 1000 * meaning["duration_s"] or len(made) < meaning["iterations"]:
        copies_ms = 0.25 if meaning["transfers"] else 0.0
        launches_ms = 0.0 if meaning["cuda_graph"] else 0.5
        wake_ms = 0.0 if meaning["spin_wait"] else 0.125
        compute_ms = 2.0 * images + launches_ms + wake_ms + noise.uniform(0, 0.01)
        if clock_ms >= meaning["warm_up_ms"]:
            made.append([clock_ms, clock_ms + 0.1 + launches_ms, copies_ms, compute_ms, copies_ms / 2])
        clock_ms += compute_ms + 1.5 * copies_ms
    return made


def export_times(path: Path, made: list[list[float]]) -> None:
    """The file of --exportTimes, with the real one's spacing and six digits."""
    rows = []
    for begin, handed_over, h2d, compute, d2h in made:
        ends = [begin, begin + h2d, begin + h2d + compute, begin + h2d + compute + d2h]
        values = [begin, handed_over, *ends[0:2], *ends[1:3], *ends[2:4], h2d, compute, d2h, h2d + compute + d2h]
        names = [f"{side}{part}Ms" for part in ("Enq", "H2d", "Compute", "D2h") for side in ("start", "end")]
        names += ["h2dMs", "computeMs", "d2hMs", "latencyMs"]
        rows.append(", ".join(f'"{name}" : {value:g}' for name, value in zip(names, values, strict=True)))
    path.write_text("[\n  " + "\n, ".join(f"{{ {row} }}" for row in rows) + "\n]\n")


def export_layers(path: Path, layers: list[str], made: list[list[float]]) -> None:
    """The file of --exportProfile: names go in as they are, quotes and all."""
    mean_ms = sum(call[3] for call in made) / len(made) / len(layers)
    text = f'[\n  {{ "count" : {len(made)} }}\n'
    for name in layers:
        text += f', {{ "name" : "{name}", "timeMs" : {mean_ms * len(made):g}, "averageMs" : {mean_ms:g}'
        text += f', "medianMs" : {mean_ms:g}, "percentage" : {100 / len(layers):g} }}\n'
    path.write_text(text + "]\n")


def log_options(meaning: dict[str, bool | float], major: int) -> None:
    """The part of the log that says what was in force."""
    word = {True: "Enabled", False: "Disabled"}
    lines = [
        "=== Inference Options ===",
        f"Iterations: {meaning['iterations']:g}",
        f"Duration: {meaning['duration_s']:g}s (+ {meaning['warm_up_ms']:g}ms warm up)",
        f"Data transfers: {word[bool(meaning['transfers'])]}",
        f"Spin-wait: {word[bool(meaning['spin_wait'])]}",
        "Multithreading: Disabled",
        f"CUDA Graph: {word[bool(meaning['cuda_graph'])]}",
        *([f"Separate profiling: {word[bool(meaning['separate_profile'])]}"] if major == 10 else []),
    ]
    for line in lines:
        log(line)


def log(line: str, severity: str = "I") -> None:
    print(f"[11/22/2026-10:00:00] [{severity}] {line}", file=sys.stderr if severity == "E" else sys.stdout)


def run(version: tuple[int, ...], words: Sequence[str]) -> None:
    """Do what `words` ask. Raises RefusedError, or what an open file raises."""
    major = version[0]
    flags, meaning = parse(major, words), in_force(major, words)
    log_options(meaning, major)
    if "loadEngine" not in flags:
        if "onnx" not in flags:
            raise RefusedError("Model missing or format not recognized")
        build(version, flags)
        flags["loadEngine"] = flags["saveEngine"]
    if "skipInference" in flags:
        return log("Skipped inference phase since --skipInference is added.")
    images, layers = load(version, flags)
    if meaning["cuda_graph"]:
        log("Successfully captured CUDA graph for the current execution context")
    made = calls(meaning, images)
    # With the profiler in the same run there is no report, and no file of times: the profiler slows every call.
    if "exportTimes" in flags and ("exportProfile" not in flags or meaning["separate_profile"]):
        export_times(Path(flags["exportTimes"]), made)
    if "exportProfile" in flags:
        export_layers(Path(flags["exportProfile"]), layers, made)


def main(version: tuple[int, ...], words: Sequence[str]) -> int:
    """Run as the trtexec of `version`; the exit code."""
    number = f"[TensorRT v{version[0] * 10000 + version[1] * 100 + version[2]}]"
    # 10.3 does not print its build number, from 10.4 on they do.
    banner = f"TensorRT.trtexec {number}" + (f" [b{version[3]}]" if version[:2] > (10, 3) else "")
    log(f"&&&& RUNNING {banner} # trtexec {' '.join(words)}")
    if "--help" in words:
        return 0
    try:
        run(version, words)
    except (RefusedError, OSError, KeyError) as error:
        log(str(error), "E")
        log(f"&&&& FAILED {banner} # trtexec {' '.join(words)}")
        return 1
    log(f"&&&& PASSED {banner} # trtexec {' '.join(words)}")
    return 0


def install(folder: Path, version: tuple[int, ...]) -> Path:
    """Put an executable `trtexec` of `version` into `folder`, such as (10, 3, 0, 26)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trtexec"
    path.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n"
        f"sys.exit(runpy.run_path({str(Path(__file__).resolve())!r})['main']({version!r}, sys.argv[1:]))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
