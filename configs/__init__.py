"""Recipes: each module has `get_config()`, and that of a sweep also `get_runs()`.

A recipe can build on another: `from tokalign_jax.configs import research`. In a checkout,
`tokalign_jax/configs` is a link to this folder, so that recipes have the same names as in an
installed wheel.
"""
