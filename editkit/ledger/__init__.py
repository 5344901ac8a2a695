"""What `editkit ledger` does with ledgers: show, revert, compare and merge them."""
