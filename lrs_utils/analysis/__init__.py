"""What measurements say: statistics, attention heads, plots."""
