"""Who owns which KV rows: pool, nodes, branches, tree, ledger."""
