"""Files, hub data sets and tables, read row by row with file and line."""
