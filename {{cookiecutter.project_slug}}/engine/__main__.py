"""`python -m engine` prints the version of the engine, and of the template that it has come with."""

from engine.version import TEMPLATE, __version__

if __name__ == "__main__":
    print(f"engine {__version__}, cookiecutter-torch-trainer {TEMPLATE}")
