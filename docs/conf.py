"""Configuration of Sphinx: `python -m sphinx -W -b html docs OUT` builds the pages and the API
reference from the docstrings."""

project = "modern_llm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Pretrain, SFT, DPO: one loop", "page_width": "64rem"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Annotations name types of many packages; what is checked is our own docstrings.
nitpicky = False
default_role = "code"
napoleon_use_ivar = True
