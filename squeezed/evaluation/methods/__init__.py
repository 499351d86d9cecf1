"""Methods: which keys of the fixed context a query reads, at what cost in bytes; ours and its rivals."""
