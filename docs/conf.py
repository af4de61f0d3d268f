"""Sphinx: the MyST pages here, the API from the package's docstrings."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = 'mla_moe'
copyright = 'the mla_moe authors, Apache-2.0'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
source_suffix = {'.md': 'markdown'}
exclude_patterns = ['_build']
html_theme = 'furo'
html_static_path = ['_static']
html_title = 'mla_moe'
# Docstrings write `names` in single backticks, as Markdown does.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_default_options = {
  'members': True,
  'undoc-members': False,
  'exclude-members': 'setup, parent, name',
}
