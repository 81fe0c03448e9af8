"""`spa run` as a Ray job, with its exit status and its one line of error; the JSON object is the last line.

ray job submit --working-dir . -- python jobs/spa_pipeline.py --config CONFIG [--until STAGE] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys

from spa_ray.cli.main import main as spa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML config")
    parser.add_argument("--until", default="evaluate", help="stop after this stage")
    parser.add_argument("--verbose", action="store_true", help="Ray's and vLLM's own logs too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    verbose = ["--verbose"] if args.verbose else []
    sys.argv = ["spa", "run", args.config, *args.overrides, "--until", args.until, "--json", *verbose]
    spa()


if __name__ == "__main__":
    main()
