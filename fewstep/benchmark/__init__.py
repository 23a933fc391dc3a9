"""How fast fewstep is beside what else there is, with the same weights and wishes on the same machine."""
