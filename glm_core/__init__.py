"""The GLM family on your own machine: models, engine, jobs and tables, without any screen.

Importing this package loads nothing heavy; torch and transformers come in with the first model.
"""

__version__ = "0.1.0"
