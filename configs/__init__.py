"""Recipes: each module has `get_config()`, and a sweep's also `get_runs()`.

A recipe builds on another by importing it: `from tokalign_jax.configs import research`. In a
checkout `tokalign_jax/configs` is a link to this folder, so that the name is the same as where the
wheel is installed.
"""
