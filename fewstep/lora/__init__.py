"""LoRAs: found by name, checked, and summed into a model's weights."""
