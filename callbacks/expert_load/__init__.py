"""Watch how tokens are spread over experts: count, keep a window, report."""
