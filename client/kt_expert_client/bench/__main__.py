"""`python -m kt_expert_client.bench`: prints the figures as JSON on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from kt_expert_client.bench.trainer import deepseek_v3, measure_trainer


def main() -> None:
    parser = argparse.ArgumentParser(prog="kt-expert bench trainer")
    parser.add_argument("--layers", type=int, default=61, help="of DeepSeek-V3, the first three without experts")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = measure_trainer(deepseek_v3(options.layers, options.experts), options.rank, options.repeats)
    sys.stdout.write(json.dumps(asdict(found) | {"peak_in_layers": found.peak_in_layers}) + "\n")


if __name__ == "__main__":
    main()
