"""Run by wheel_check.sh outside the checkout: is spa_ray whole when it comes from the wheel alone?

Arguments: the folder with the unpacked wheel, the folder with wheel and sdist, the checkout. Fails at the first thing
that is missing.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path


def main(site: Path, dist: Path, checkout: Path) -> None:
    """Compare checkout, sdist and wheel file by file, import every module, and let the wheel's `spa` plan the demo."""
    import spa_ray

    assert Path(spa_ray.__file__).parent == site / "spa_ray", f"imported {spa_ray.__file__}, not the wheel"

    files = package_files(checkout)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        in_sdist = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    for name, have in {"wheel": package_files(site), "sdist": in_sdist}.items():
        assert files <= have, f"the {name} lacks {sorted(files - have)}"
    assert in_sdist >= {"LICENSE", "README.md", "pyproject.toml"}, (
        "the sdist lacks LICENSE, README.md or pyproject.toml"
    )

    modules = sorted(name[: -len(".py")].replace("/", ".") for name in files if name.endswith(".py"))
    for name in modules:
        importlib.import_module(name.removesuffix(".__init__"))

    spa = [sys.executable, "-P", "-c", "from spa_ray.cli.main import app; app()"]
    subprocess.run([*spa, "--help"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*spa, "plan", str(site / "spa_ray/microworld/demo.yaml")], check=True, stdout=subprocess.DEVNULL)
    print(f"wheel-check: {sdist.name} and its wheel hold all {len(files)} files; {len(modules)} modules import from it")


def package_files(root: Path) -> set[str]:
    """The package's files below `root`, without what Python and editors leave there."""
    paths = (path for path in (root / "spa_ray").rglob("*") if path.is_file())
    inside = {path.relative_to(root) for path in paths}
    return {str(p) for p in inside if not any(part.startswith((".", "__pycache__")) for part in p.parts)}


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
