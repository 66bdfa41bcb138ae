"""From files to token data sets. Here lies what all its packages share: documents, the ledger, JSON values."""
