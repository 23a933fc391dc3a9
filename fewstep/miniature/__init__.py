"""The miniature: a real SDXL at toy scale, trained from nothing on a world that this package draws."""
