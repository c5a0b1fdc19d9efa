"""From an exported file to figures: latency, accuracy, budgets, the report."""
