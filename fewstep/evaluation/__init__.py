"""How well a model follows prompts in few steps, beside other ways to sample it."""
