"""How long `slim --help` takes, beside `python -c 'import click, pydantic'`; limit 1.5x.

python benchmarks/startup.py            # writes benchmarks/results/startup.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from slim import environment

RESULT = Path(__file__).parent / "results" / "startup.json"
RUNS = 30
LIMIT = 1.5
HELP = "import sys; sys.argv = ['slim', '--help']; from slim.cli import main; main()"
SIDES = {"slim --help": HELP, "import click, pydantic": "import click, pydantic"}
LOADED = (
    "import sys, contextlib, io\nfrom slim.cli import main\n"
    "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
    "print(sorted({'torch', 'timm'} & set(sys.modules)))"
)


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    for code in SIDES.values():
        seconds(code)  # files into the page cache
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for run in range(RUNS):
        for name in list(SIDES) if run % 2 else reversed(list(SIDES)):
            times[name].append(seconds(SIDES[name]))
    ours, theirs = times.values()
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    loaded = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.strip()
    result = {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "limit": LIMIT,
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "heavy_modules_loaded": loaded,
        "runs": RUNS,
        "environment": environment.describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
