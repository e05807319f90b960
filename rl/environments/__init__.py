"""Multi-turn environments: what answers the model between its turns, such as tools, and ends an episode."""
