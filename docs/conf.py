"""Sphinx builds the documentation with this: ``tox -e docs``."""

from importlib.metadata import metadata

_metadata = metadata("sa_wsgi_session")

project = "sa_wsgi_session"
author = _metadata["Author"]
copyright = f"2026, {author}"
version = release = _metadata["Version"]

extensions = ["sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
nitpicky = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# Types that other projects document. Their inventories would have to come over the network.
nitpick_ignore_regex = [
    ("py:.*", r"(sqlalchemy|webob|wsgiref|_typeshed|contextlib|contextvars|collections|typing|types)\..*"),
    ("py:.*", r"(logging|time|opentelemetry|prometheus_client|pytest)\..*"),
    ("py:class", "(Engine|Session|CollectorRegistry|TracerProvider|_T)"),
    # Python's own exceptions and types, by their names alone.
    ("py:.*", r"(AssertionError|ResourceWarning|TypeError|ValueError|RuntimeError|OSError)"),
]
