"""The miniature: a real SDXL at toy scale, trained from nothing on a world that this package draws."""

# The stages of its build, in order.
STAGES = ("judge", "vae", "base", "lora", "styles", "tiny-vae", "scores")
