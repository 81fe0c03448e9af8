"""Run by wheel_check.sh outside the checkout: is spa_ray whole when it comes from the wheel alone?

Arguments: the folder with the unpacked wheel, the folder with wheel and sdist. Fails at the first thing missing.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path


def main(site: Path, dist: Path) -> None:
    """Compare wheel and sdist file by file, import every module, and answer `spa --help`."""
    import spa_ray

    home = Path(spa_ray.__file__).parent
    assert home == site / "spa_ray", f"imported from {home}, not from the wheel"

    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = [n.split("/", 1)[1] for n in tar.getnames() if "/" in n]
        files = {n for n, m in zip(tar.getnames(), tar.getmembers(), strict=True) if m.isfile()}
    in_sdist = {n.split("/", 1)[1] for n in files if "/spa_ray/" in n}
    in_wheel = {str(p.relative_to(site)) for p in home.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert in_sdist == in_wheel, f"only in one of sdist and wheel: {sorted(in_sdist ^ in_wheel)}"
    assert "LICENSE" in names, "the sdist has no LICENSE"

    modules = sorted(".".join(Path(n).with_suffix("").parts) for n in in_wheel if n.endswith(".py"))
    for name in modules:
        importlib.import_module(name.removesuffix(".__init__"))

    subprocess.run([sys.executable, "-P", "-m", "spa_ray.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
    print(f"wheel-check: {sdist.name} and its wheel hold {len(in_wheel)} files; {len(modules)} modules import from it")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
