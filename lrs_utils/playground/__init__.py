"""A curve that is dragged, scored in the background, predicted meanwhile, and shown by a widget."""
