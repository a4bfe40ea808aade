"""`python -m engine` prints the version of the engine, and of the template that it has come with."""

from engine import __version__

# That of the template's own pyproject.toml.
TEMPLATE = "0.1.0"

if __name__ == "__main__":
    print(f"engine {__version__}, cookiecutter-torch-trainer {TEMPLATE}")
