"""Settings of the documentation; ``make docs`` builds it, and a warning fails the build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import moe

project = "moe"
author = "The moe authors"
version = release = moe.__version__
copyright = f"{author}, Apache-2.0"  # noqa: A001

extensions = ["docstrings", "mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
_OTHERS = "torch|numpy|np|jaxtyping|tokenizers|rich|transformers|lightning|accelerate"
_OTHERS += "|abc|collections|contextlib|datetime|enum|os|pathlib|types|typing"
nitpick_ignore_regex = [
    # Other projects' names: looking them up would take the network.
    (r"py:.*", rf"({_OTHERS})\..*"),
    (r"py:class", r"Tensor|ndarray|memmap|ArrayLike|Int\[.*|Float\[.*|Bool\[.*"),
    (r"py:class", r"moe\..*\.Result"),  # a type variable
    # Words in single backticks are links where the reference has such a name, and code elsewhere.
    (r"py:obj", r".*"),
]
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Init", "Weights"]
python_maximum_signature_line_length = 88

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"moe {release}"
html_static_path = ["_static"]
html_show_sphinx = False
html_copy_source = False
