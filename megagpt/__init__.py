"""The GPT-2 and GPT-3 papers, executable."""

# The only place of the version: pyproject.toml reads it from here, so that a tree that was never installed has it too.
__version__ = "0.2.0.dev0"
