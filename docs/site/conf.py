"""Settings of Sphinx for the site that build.py makes."""

import re
from importlib import metadata

from latex2mathml import converter

project = "sedd_jax"
author = copyright = "The maintainers of sedd_jax"
version = release = metadata.version("sedd_jax")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"sedd_jax {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
default_role = "code"  # Docstrings are Markdown: a word in backticks is code.
autodoc_mock_imports = ["torch", "starlette", "uvicorn"]  # The pages are the same without them.
napoleon_use_ivar = True

_CODE = re.compile(r"(``?[^`]+``?)")
_FIELD = re.compile(r"\s*(:[\w ]+:|\.\. )")


def setup(app):
    """Registers how mathematics is written, and how docstrings are read."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _escape, priority=900)  # After napoleon.
    app.connect("autodoc-process-signature", _shorten)


def _inline(writer, node):
    """Mathematics as MathML, which browsers show without a program."""
    from docutils import nodes

    writer.body.append(converter.convert(node.astext()))
    raise nodes.SkipNode


def _block(writer, node):
    from docutils import nodes

    writer.body.append(f'<div class="math">{converter.convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def _shorten(app, what, name, obj, options, signature, returns):
    """Arrays by the name under which the program imports them."""
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (signature, returns))


def _escape(app, what, name, obj, options, lines):
    """Stars, bars and underscores of formulas are no markup; what a module's docstring indents stays as it is."""
    indented = [what == "module" and line.startswith("    ") for line in lines]
    for number in range(len(lines) - 1, -1, -1):
        line, field = lines[number], _FIELD.match(lines[number])
        if indented[number]:
            if number and not lines[number - 1]:
                lines.insert(number - 1, "::")
            continue
        if field and field[1] == ".. ":
            continue
        start = field.end() if field else 0
        parts = _CODE.split(line[start:])
        parts[::2] = [re.sub(r"(?<!\*)\*(?!\*)|[|_]", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = line[:start] + "".join(parts)
