"""Images as files: opened safely, encoded, with what they were generated from."""
