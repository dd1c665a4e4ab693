"""Searches for scalings: the engine, its objectives, and each method."""
