"""From files to tokenized data sets. `documents`, `ledger` and `json_values` are shared by all packages below."""
