"""spa_ray: self-priority alignment on Ray. Nothing heavy is imported here."""

__version__ = "0.1.0"
