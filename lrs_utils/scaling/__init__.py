"""The numbers and how they act on a model: of layers (positions) and of heads, folded into weights, kept in files."""
