"""The miniature's world: its scenes, how they are said, and how they are drawn."""
