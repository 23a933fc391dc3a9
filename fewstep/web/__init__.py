"""The page that generates while one types, and the APIs of a self-hosted fewstep."""
