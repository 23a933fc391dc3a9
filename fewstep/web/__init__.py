"""The page that paints while one types, and the front door of a self-hosted fewstep, before Cog servers."""
