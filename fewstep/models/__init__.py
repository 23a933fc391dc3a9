"""The models: what is known of each, its files, and how they are fetched, saved and loaded."""
