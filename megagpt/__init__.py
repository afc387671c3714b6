"""The GPT-2 and GPT-3 papers, executable."""

__version__ = "0.1.0"
