"""Configuration of Sphinx: `python -m sphinx -W -b html docs OUT` builds the pages, the API
reference from the docstrings, and the options from their fields."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "modern_llm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "option_lists"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "modern_llm"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sphinx = html_show_copyright = False
smartquotes = False  # "--option" is not a dash
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Annotations name types of many packages; what is checked is our own docstrings.
nitpicky = False
default_role = "code"
napoleon_use_ivar = True
