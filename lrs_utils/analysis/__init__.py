"""Analysis of measurements: statistics, attention heads, plots."""
