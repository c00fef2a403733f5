"""What a run leaves: products, receipts, record, report, state."""
