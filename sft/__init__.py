"""The mechanisms that the six stage modules at the top level use: one idea a file."""
