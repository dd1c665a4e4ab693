"""Score a model on a suite under scalings: packing, one forward pass, the ledger, free answers, perplexity."""
