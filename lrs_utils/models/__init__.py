"""Language models: from the hub, a folder, a GGUF file, the embedded ones, and tiny ones for tests."""
