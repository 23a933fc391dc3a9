"""The miniature's world: its things, its scenes, how they are said, and how they are drawn."""
