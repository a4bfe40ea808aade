"""Versions, of the engine and of the template that it has come with; `python -m engine` prints both."""

# Semantic versioning of the engine's public names: a new major number where code of yours may have to change.
__version__ = "0.1.0"
# That of the template's own pyproject.toml.
TEMPLATE = "0.1.0"
