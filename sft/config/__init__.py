"""The config: its schema, the YAML reader with line numbers, overrides, validation and error messages; no torch."""
