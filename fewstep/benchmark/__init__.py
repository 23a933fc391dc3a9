"""How fast fewstep is beside what else there is, with the same weights and prompts on the same machine."""
