"""The widget that scores a curve while it is dragged, and its browser file."""
