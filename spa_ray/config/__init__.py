"""Configuration: frozen models (`models`) and how files and overrides become them (`load`)."""

from spa_ray.config.load import arm_configs, load_config
from spa_ray.config.models import Config

__all__ = ["Config", "arm_configs", "load_config"]
