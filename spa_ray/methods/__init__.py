"""Training methods, one file each: what a method reads, its loss and statistics, its defaults.

A method derives from `spa_ray.training.method.Method`; its line in `spa_ray.config.plugs.METHODS` gives it a name.
"""
