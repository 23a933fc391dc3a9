"""The page that generates while one types, and the front door of a self-hosted fewstep."""
