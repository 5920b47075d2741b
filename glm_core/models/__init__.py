"""The GLM architectures, and which class reads which config.json."""
