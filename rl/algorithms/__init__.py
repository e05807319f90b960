"""From verdicts to training samples, pure: rewards, baselines, advantages, preferences; the methods as values."""
