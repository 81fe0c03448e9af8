"""`spa run` as a Ray job.

ray job submit --working-dir . -- python jobs/spa_pipeline.py --config CONFIG [key=value ...]
"""

from __future__ import annotations

import argparse
import sys

from spa_ray.cli.main import emit, fail
from spa_ray.config import load_config
from spa_ray.errors import InputError, RunError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML config")
    parser.add_argument("--until", default="evaluate", help="stop after this stage")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    from spa_ray.runs.commands import run_config

    try:
        emit(run_config(load_config(args.config, args.overrides), until=args.until, verbose=args.verbose), True)
    except InputError as e:
        fail(str(e), 2)
    except RunError as e:
        fail(str(e), 1)


if __name__ == "__main__":
    sys.exit(main())
