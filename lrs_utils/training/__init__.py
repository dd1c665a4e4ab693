"""Position samplers for fine-tuning, fine-tuning itself, and the small model."""
