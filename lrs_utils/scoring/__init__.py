"""What a model makes of a suite under scalings: packing, one forward pass, the ledger, free answers, perplexity."""
