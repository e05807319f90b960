"""Before the first step of a run: who takes part, on which devices, checked, started or resumed."""
