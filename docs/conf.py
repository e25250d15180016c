"""Sphinx configuration."""

import os
import sys

sys.path.insert(0, os.path.abspath(".."))

import sb3_flow

project = "sb3-flow"
author = "The sb3-flow developers"
copyright = "2026, The sb3-flow developers"
version = release = sb3_flow.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx.ext.viewcode", "sphinx_design"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sb3-flow {release}"

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
# Parameters of the constructor are documented in the docstring of the class, as in SB3
autoclass_content = "class"
# Links between pages must have a target. Types of other packages have none here, nor have type variables
nitpicky = True
OTHERS = "collections|gymnasium|io|numpy|os|pathlib|stable_baselines3|torch"
nitpick_ignore_regex = [
    ("py:.*", rf"({OTHERS})\..*"),
    # (type variables, and what docstrings of SB3 name)
    ("py:class", r".*\.Self\w+|.*\.Time|BaseCallback|Module|VecEnv"),
    ("py:attr", "env"),
]
